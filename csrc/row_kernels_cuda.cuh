// The three row kernels on CUDA. R rows, C columns; a thread block, or a cluster of them, owns a row. A row may be a range of a
// vector (Rows::ranges): those are short, so that they have few lanes and a warp for each.
//
//   statistics  reads a tile once
//   gradient    reads and writes it once
//   policy      statistics, coefficient and gradient of whole rows: two reads and one write (Rows::twice), the second read from the
//               L2 cache where the rows in flight fit it, hence the first one goes right to left and the second one back; or
//               one read and one write (Rows::kept), the row in the shared memory of a cluster's blocks meanwhile
//
// A row is cut into fixed tiles, these into pieces and these into units of 16 bytes. A warp folds a piece: lane l has its units l,
// l + 32, ... The lanes' sums are merged in one tree, the pieces of a tile from left to right, and so are the tiles. What is added
// to what depends on a tile's columns alone, so that a result has the same bits at every launch shape and alignment, and wherever a
// row is cut between two tiles. Per element: 2 exp in policy, 1 elsewhere; 16 bytes are loaded at once wherever the pointers allow
// it. Results may lie on the tile, element on element: the thread that has read a unit writes it.
#pragma once

#include <cooperative_groups.h>

#include "element_math.h"
#include "units_cuda.cuh"

namespace grpo_kernels {

namespace {

enum class Rows { twice, kept, ranges };

template <Rows Mode>
struct ClusterOf;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <>
struct ClusterOf<Rows::kept> {
  using type = cooperative_groups::cluster_group;
};
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;  // and kernels that need them are empty
#endif

// Loads a thread has under way; fewer where the registers are needed for a bias, a softcap or the entropy.
template <class T, bool Plain>
constexpr int kInFlight = sizeof(T) == 8 ? 1 : (Plain ? 2 : 1) * (sizeof(T) == 2 ? 1 : 2);
// Units that a lane folds at once, whatever is in flight: bits depend on it.
template <class T>
constexpr int kFoldedAtOnce = sizeof(T) == 4 ? 2 : 1;
template <class T>
constexpr int kUnitsOfPiece = kPieceColumns / kUnit<T>;
constexpr int kTile = int(kTileColumns);
static_assert(kPieceColumns * kPiecesOfTile == kTileColumns && kMostPieces % (32 * kPiecesOfTile) == 0);
template <class T>
constexpr int kMostThreads = sizeof(T) == 8 ? 512 : 1024;

// The units of a row that one block has, in and out: a run of them, numbered from its first. `T` is what the tile holds, `O` what
// is written.
template <class T, class O, Rows Mode>
struct Share {
  const T* in;  // the row
  O* out;
  int columns;       // of the row
  int mine, pieces;  // of each block at most, and of this one
  int first, units;  // of this block
  int whole;         // its first units that can be moved at once
  bool aligned;

  __device__ __forceinline__ Share(const Tile& tile, const Matrix& result, int64_t row, int rank, int blocks)
      : in(row_of<const T>(tile.values, row)), out(row_of<O>(result, row)), columns(int(tile.values.columns)) {
    if constexpr (Mode == Rows::ranges) {
      const int64_t first_of_row = tile.ranges[2 * row], last_of_row = tile.ranges[2 * row + 1];
      in += first_of_row;
      out += first_of_row;
      columns = int(last_of_row - first_of_row);
    }
    aligned = is_aligned<InputUnit<T>>(in) && is_aligned<Unit<O, kUnit<T>>>(out);
    mine = int(pieces_of_block(columns, blocks));
    pieces = run_of(int(pieces_of_block(columns, 1)), rank * mine, mine);
    first = rank * mine * kUnitsOfPiece<T>;
    units = run_of((columns + kUnit<T> - 1) / kUnit<T>, first, mine * kUnitsOfPiece<T>);
    whole = aligned ? run_of(columns / kUnit<T>, first, mine * kUnitsOfPiece<T>) : 0;
  }

  // How many of `all` are among the `most` from `first` on.
  __device__ __forceinline__ static int run_of(int all, int first, int most) { return min(max(all - first, 0), most); }

  // First column of this block's unit i.
  __device__ __forceinline__ int column(int i) const { return (Mode == Rows::kept ? first + i : i) * kUnit<T>; }

  __device__ __forceinline__ InputUnit<T> load_whole(int c) const { return whole_of(in, c); }
  __device__ __forceinline__ InputUnit<T> load_part(int c) const { return part_of(in, c); }

  // Of this row in any tile that is aligned as this one.
  __device__ __forceinline__ static InputUnit<T> whole_of(const T* in, int c) {
    return load(reinterpret_cast<const InputUnit<T>*>(in + c));
  }

  // Up to the row's end; zeros behind it.
  __device__ __forceinline__ InputUnit<T> part_of(const T* in, int c) const {
    if (aligned && c + kUnit<T> <= columns) return whole_of(in, c);
    InputUnit<T> unit = {};
#pragma unroll
    for (int j = 0; j < kUnit<T>; j++) {
      if (c + j < columns) unit.at[j] = load(in + c + j);
    }
    return unit;
  }

  __device__ __forceinline__ void store_whole(int c, const Unit<O, kUnit<T>>& unit) const {
    store(reinterpret_cast<Unit<O, kUnit<T>>*>(out + c), unit);
  }

  __device__ __forceinline__ void store_part(int c, const Unit<O, kUnit<T>>& unit) const {
    if (aligned && c + kUnit<T> <= columns) return store_whole(c, unit);
#pragma unroll
    for (int j = 0; j < kUnit<T>; j++) {
      if (c + j < columns) store(out + c + j, unit.at[j]);
    }
  }
};

// ---- the two visits

// Folds the columns of N units but the target's and, of `ragged` ones, those from `end` on.
template <class T, int N, bool Plain, class Statistics, class A = acc_of<T>>
__device__ __forceinline__ void fold_units(Statistics& s, const InputUnit<T>* units, const int (&columns)[N], int end,
                                           int target, const ElementTransform<A, Plain>& transform, bool ragged) {
  constexpr int of_unit = kUnit<T>;
  A z[N * of_unit];
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int j = 0; j < of_unit; j++) {
      const int c = columns[i] + j;
      z[i * of_unit + j] = !ragged || c < end ? transform(widened(units[i].at[j]), c) : -infinity<A>();
    }
    if (unsigned(target - columns[i]) < unsigned(of_unit)) {
#pragma unroll
      for (int j = 0; j < of_unit; j++) {
        if (columns[i] + j == target) z[i * of_unit + j] = -infinity<A>();
      }
    }
  }
  fold(s, z);
}

// Writes f(unit, column) of this thread's units, left to right.
template <int InFlight, class S, class Load, class F>
__device__ __forceinline__ void write_forward(const S& share, Load load_unit, F f) {
  using Input = decltype(share.load_whole(0));
  const int threads = int(blockDim.x), steps = share.whole / (threads * InFlight);
  for (int k = 0; k < steps; k++) {
    const int first = k * threads * InFlight + int(threadIdx.x);
    Input units[InFlight];
#pragma unroll
    for (int i = 0; i < InFlight; i++) units[i] = load_unit(first + i * threads, false);
#pragma unroll
    for (int i = 0; i < InFlight; i++) {
      const int c = share.column(first + i * threads);
      share.store_whole(c, f(units[i], c));
    }
  }
  for (int k = steps * InFlight; k * threads < share.units; k++) {
    const int i = k * threads + int(threadIdx.x), c = share.column(i);
    if (i < share.units) share.store_part(c, f(load_unit(i, true), c));
  }
}

template <class T, class O, Rows Mode>
__device__ __forceinline__ void write_zeros(const Share<T, O, Mode>& share) {
  const Unit<O, kUnit<T>> zeros = {};
  for (int i = int(threadIdx.x); i < share.units; i += int(blockDim.x)) share.store_part(share.column(i), zeros);
}

// ---- reductions

// Of all lanes of a warp, none of which has seen the target. The maximum first: it is the same in any order, and one exponential
// then does for all exchanges.
template <class Statistics>
__device__ __forceinline__ Statistics merged_over_warp(Statistics s) {
  auto max = s.max;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) max = std::fmax(max, __shfl_xor_sync(kWholeWarp, max, distance));
  restate(s, max);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    s.others = plus(s.others, __shfl_xor_sync(kWholeWarp, s.others, distance));
    s.moment = plus(s.moment, __shfl_xor_sync(kWholeWarp, s.moment, distance));
    if constexpr (has_squares<Statistics>) s.squares = plus(s.squares, __shfl_xor_sync(kWholeWarp, s.squares, distance));
  }
  return s;
}

// What the first `count` lanes of a warp have, from left to right, merged into `left`, which is the same in all lanes. The maxima
// and all exponentials side by side, for these do not depend on the order; only the sums one after another.
template <class Statistics, class A = decltype(Statistics::max)>
__device__ __forceinline__ Statistics merged_in_order(Statistics left, const Statistics& s, int count) {
  const int lane = int(threadIdx.x) % 32;
  A max = std::fmax(left.max, s.max), target = s.target;  // of all up to this lane
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const A max_before = __shfl_sync(kWholeWarp, max, lane - min(lane, distance));
    const A target_before = __shfl_sync(kWholeWarp, target, lane - min(lane, distance));
    max = std::fmax(max, max_before);
    if (target == -infinity<A>()) target = target_before;
  }
  const int before = lane - min(lane, 1);
  A max_before = __shfl_sync(kWholeWarp, max, before), target_before = __shfl_sync(kWholeWarp, target, before);
  if (lane == 0) max_before = left.max;
  if (lane == 0 || target_before == -infinity<A>()) target_before = left.target;
  const MergeOf<Statistics> mine(max_before, target_before, s, max);
  for (int i = 0; i < count; i++) {
    MergeOf<Statistics> m = mine;
    m.drop = __shfl_sync(kWholeWarp, mine.drop, i);
    m.factor = __shfl_sync(kWholeWarp, mine.factor, i);
    m.seen = __shfl_sync(kWholeWarp, mine.seen, i);
    m.others = __shfl_sync(kWholeWarp, mine.others, i);
    m.moment = __shfl_sync(kWholeWarp, mine.moment, i);
    if constexpr (has_squares<Statistics>) m.squares = __shfl_sync(kWholeWarp, mine.squares, i);
    add(left, m);
  }
  left.max = __shfl_sync(kWholeWarp, max, 31);
  target = __shfl_sync(kWholeWarp, target, 31);
  if (target != -infinity<A>()) left.target = target;
  return left;
}

// In front of a block's shared memory.
template <class Statistics>
struct Scratch {
  Statistics pieces[kMostPieces];
  Statistics row;
};
static_assert(sizeof(Scratch<RowStatistics<double>>) <= kScratchBytes && kScratchBytes % kUnitBytes == 0);
static_assert(sizeof(Scratch<RowSquares<double>>) <= kScratchBytesOfSquares);

// ---- a row

// One block's work on one row. With `Mode` kept, a cluster's blocks share it, and the units stay in shared memory.
template <class T, class O, bool Plain, Rows Mode, template <class> class StatisticsOf = RowStatistics>
struct Row {
  using A = acc_of<T>;
  using Statistics = StatisticsOf<A>;
  static_assert(Mode != Rows::kept || !has_squares<Statistics>, "kept units lie behind the scratch of four statistics");
  int rank = 0, blocks = 1;  // of the cluster
  int64_t row;
  Share<T, O, Mode> share;
  int target;  // column; -1: not in this tile
  ElementTransform<A, Plain> transform;

  __device__ __forceinline__ Row(const Tile& tile, const Matrix& out)
      : row(index()), share(tile, out, row, rank, blocks), transform(tile, row) {
    const int64_t c = tile.target[row];
    target = c >= 0 && c < share.columns ? int(c) : -1;
  }

  // Calls f(tile, first, count) in the first warp of each block, whose lane i < count has the statistics of the row's fixed tile
  // `first` + i, from left to right; others have nothing. Once per kernel.
  template <class F>
  __device__ __forceinline__ void for_tiles(F f) const {
    const int at_once = Mode == Rows::kept ? share.pieces : kMostPieces;
    int from = 0;
    do {  // blocks of a cluster meet each other, even if they have no piece
      const int count = min(share.pieces - from, at_once);
      fold_pieces(from, count);
      // before the barrier, where the row is in a cache: before the loop, every row would begin by waiting for this one
      const A z = target < 0 || threadIdx.x >= 32 ? -infinity<A>() : transform(widened(load(share.in + target)), target);
      if constexpr (Mode == Rows::kept) ClusterOf<Mode>::type::sync();
      else __syncthreads();
      if (threadIdx.x < 32) {
        const int until = Mode == Rows::kept ? share.columns : min(share.columns, (from + count) * kPieceColumns);
        for (int tile = from / kPiecesOfTile; tile * kTile < until; tile += 32) {
          const int mine = tile + int(threadIdx.x), tiles = (until - tile * kTile + kTile - 1) / kTile;
          Statistics s;
          if (mine * kTile < until) s = of_tile(mine, from, z);
          f(s, tile, min(tiles, 32));
        }
      }
      from += count;
      if (from < share.pieces) __syncthreads();
    } while (from < share.pieces);
  }

  // The statistics of the row, in every thread.
  __device__ __forceinline__ Statistics statistics() const {
    Statistics row;
    for_tiles([&](const Statistics& tile, int, int count) { row = merged_in_order(row, tile, count); });
    if (threadIdx.x == 0) scratch()->row = row;
    if constexpr (Mode == Rows::kept) ClusterOf<Mode>::type::barrier_arrive();
    __syncthreads();
    return scratch()->row;
  }

  __device__ __forceinline__ void write(const RowGradient<A>& d) const {
    if (d.idle) return write_zeros(share);
    const ElementResult<A, Plain> result(transform, d, target);
    const auto load_unit = [&](int i, bool ragged) {
      if constexpr (Mode == Rows::kept) return kept()[i];
      else return ragged ? share.load_part(share.column(i)) : share.load_whole(share.column(i));
    };
    const auto f = [&](const InputUnit<T>& unit, int c) {
      Unit<O, kUnit<T>> written;
#pragma unroll
      for (int j = 0; j < kUnit<T>; j++) written.at[j] = rounded<O>(result(widened(unit.at[j]), c + j));
      return written;
    };
    write_forward<kInFlight<T, Plain>>(share, load_unit, f);
  }

  __device__ __forceinline__ bool is_first_thread() const { return rank == 0 && threadIdx.x == 0; }

  // Before a kernel ends: no block may leave while another reads its shared memory.
  __device__ __forceinline__ void leave() const {
    if constexpr (Mode == Rows::kept) ClusterOf<Mode>::type::barrier_wait();
  }

 private:
  __device__ __forceinline__ int64_t index() {
    if constexpr (Mode == Rows::kept) {
      rank = int(ClusterOf<Mode>::type::block_rank());
      blocks = int(ClusterOf<Mode>::type::num_blocks());
    }
    return int64_t(blockIdx.x) / blocks;
  }

  __device__ __forceinline__ Scratch<Statistics>* scratch() const {
    return reinterpret_cast<Scratch<Statistics>*>(shared_memory());
  }

  __device__ __forceinline__ InputUnit<T>* kept() const {
    return reinterpret_cast<InputUnit<T>*>(shared_memory() + kScratchBytes);
  }

  // Folds `count` of this block's pieces into the scratch, right to left; a warp has one at a time.
  __device__ __forceinline__ void fold_pieces(int from, int count) const {
    constexpr int units = kUnitsOfPiece<T> / 32, in_flight = kInFlight<T, Plain>;
    static_assert(units % in_flight == 0 && in_flight % kFoldedAtOnce<T> == 0);
    const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int whole = share.whole / kUnitsOfPiece<T> - from, begin = from * kUnitsOfPiece<T> + lane;
    int piece = (count - 1 - warp + warps) / warps * warps + warp - warps;  // the last one of this warp
    for (; piece >= max(whole, 0); piece -= warps) {
      Statistics s;
      for (int k = 0; k < units; k += in_flight) read_and_fold(s, begin + piece * kUnitsOfPiece<T> + 32 * k, true);
      s = merged_over_warp(s);
      if (lane == 0) scratch()->pieces[piece] = s;
    }
    for (; piece >= 0; piece -= warps) {
      Statistics s;
#pragma unroll
      for (int k = 0; k < units; k += in_flight) read_and_fold(s, begin + piece * kUnitsOfPiece<T> + 32 * k, false);
      s = merged_over_warp(s);
      if (lane == 0) scratch()->pieces[piece] = s;
    }
  }

  // Of as many units as are loaded at once; `ragged` ones may reach past the row's end, or lie behind it.
  __device__ __forceinline__ void read_and_fold(Statistics& s, int begin, bool ragged) const {
    constexpr int in_flight = kInFlight<T, Plain>, folded = kFoldedAtOnce<T>;
    InputUnit<T> units[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; i++) {
      const int c = share.column(begin + 32 * i);
      units[i] = ragged ? share.load_part(c) : share.load_whole(c);
    }
#pragma unroll
    for (int i = 0; i < in_flight; i += folded) {
      int columns[folded];
#pragma unroll
      for (int j = 0; j < folded; j++) {
        columns[j] = share.column(begin + 32 * (i + j));
        if constexpr (Mode == Rows::kept) {
          if (!ragged || columns[j] < share.columns) kept()[begin + 32 * (i + j)] = units[i + j];
        }
      }
      fold_units<T, folded, Plain>(s, units + i, columns, share.columns, target, transform, ragged);
    }
  }

  // A fixed tile, of its pieces: the block's, whose scratch begins with `from`, or those of all blocks of the cluster.
  __device__ __forceinline__ Statistics of_tile(int tile, int from, A z) const {
    Statistics parts[kPiecesOfTile], s;
#pragma unroll
    for (int i = 0; i < kPiecesOfTile; i++) {
      const int piece = tile * kPiecesOfTile + i;
      if (piece * kPieceColumns >= share.columns) continue;
      const int block = Mode == Rows::kept ? piece / share.mine : 0;
      parts[i] = *of_block(&scratch()->pieces[Mode == Rows::kept ? piece - block * share.mine : piece - from], block);
      s.max = std::fmax(s.max, parts[i].max);
    }
#pragma unroll
    for (int i = 0; i < kPiecesOfTile; i++) {
      restate(parts[i], s.max);
      s.others = plus(s.others, parts[i].others);
      s.moment = plus(s.moment, parts[i].moment);
      if constexpr (has_squares<Statistics>) s.squares = plus(s.squares, parts[i].squares);
    }
    if (target >= 0 && target / kTile == tile) meet_target(s, z);
    return s;
  }

  // The same address in another block of the cluster.
  template <class X>
  __device__ __forceinline__ X* of_block(X* mine, int block) const {
    if constexpr (Mode == Rows::kept) return ClusterOf<Mode>::type::map_shared_rank(mine, block);
    return mine;
  }
};

// ---- the kernels

template <class T, bool Plain, Rows Mode, bool Squares>
__global__ void __launch_bounds__(kMostThreads<T>, 1) statistics_kernel(const StatisticsParams p) {
  using Walk = std::conditional_t<Squares, Row<T, T, Plain, Mode, RowSquares>, Row<T, T, Plain, Mode>>;
  using Statistics = typename Walk::Statistics;
  const Walk row(p.tile, p.tile.values);
  auto* stats = static_cast<Statistics*>(p.stats) + row.row * p.parts;
  Statistics all;
  if (p.parts == 1) all = stats[0];
  row.for_tiles([&](const Statistics& tile, int first, int count) {
    if (p.parts == 1) {
      all = merged_in_order(all, tile, count);
    } else if (int(threadIdx.x) < count) {
      Statistics& own = stats[first + int(threadIdx.x)];
      const MergeOf<Statistics> m(own.max, own.target, tile);
      add(own, m);
      own.max = m.max;
      own.target = m.target;
    }
  });
  if (p.parts == 1 && threadIdx.x == 0) stats[0] = all;
}

// A warp for each row.
template <class A, bool Squares>
__global__ void __launch_bounds__(kThreadsOfClose) close_kernel(const CloseParams p) {
  const int64_t row = int64_t(blockIdx.x) * (kThreadsOfClose / 32) + threadIdx.x / 32;
  if (row >= p.rows) return;
  using Statistics = std::conditional_t<Squares, RowSquares<A>, RowStatistics<A>>;
  const auto* stats = static_cast<const Statistics*>(p.stats) + row * p.parts;
  const int lane = int(threadIdx.x) % 32;
  Statistics all;
  for (int64_t first = 0; first < p.parts; first += 32) {
    Statistics s;
    if (first + lane < p.parts) s = stats[first + lane];
    all = merged_in_order(all, s, int(p.parts - first < 32 ? p.parts - first : 32));
  }
  if (lane != 0) return;
  write<A>(p.scored, row, closed(all));
  if constexpr (Squares) static_cast<A*>(p.squared)[row] = squared_probs(all);
}

template <class T, class O, bool Plain, Rows Mode>
__global__ void __launch_bounds__(kMostThreads<T>, 1) gradient_kernel(const GradientParams p) {
  using A = acc_of<T>;
  const Row<T, O, Plain, Mode> row(p.tile, p.out);
  const A lse = value<A>(p.scored.lse, row.row), logps = value<A>(p.scored.logps, row.row), entropy = value<A>(p.scored.entropy, row.row);
  const A g = value<A>(p.g, row.row), g_entropy = Plain ? A(0) : value<A>(p.g_entropy, row.row);
  row.write({row.transform, g, g_entropy, lse, A(0), logps, entropy});
}

template <class T, class O, bool Plain, Rows Mode>
__global__ void
__launch_bounds__(Mode == Rows::kept ? kMostThreadsKept : kMostThreads<T>, Mode == Rows::kept && sizeof(T) < 8 ? 2 : 1)
    policy_kernel(const PolicyParams p) {
  if constexpr (Mode != Rows::kept || kHasClusters) {
    using A = acc_of<T>;
    Row<T, O, Plain, Mode> row(p.tile, p.out);
    const RowStatistics<A> s = row.statistics();
    const RowResult<A> result = closed(s);
    const A g = policy_coefficient<A>(p, row.row, result.logps), g_entropy = Plain ? A(0) : value<A>(p.rows.w_entropy, row.row);
    row.write({row.transform, g, g_entropy, s.max, result.log_sum, result.logps, result.entropy});
    // at the end: sooner, the addresses cost more registers than 1024 threads have
    if (row.is_first_thread()) write<A>(p.scored, row.row, result);
    row.leave();
  }
}

}  // namespace
}  // namespace grpo_kernels
