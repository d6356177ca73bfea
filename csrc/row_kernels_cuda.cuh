// The three row kernels on CUDA. R rows, C columns; a thread block, or a cluster of them, owns a row. A row may be a range of a
// vector (Rows::ranges): those are short, so that they have few lanes and a warp for each.
//
//   statistics  reads a tile once
//   gradient    reads and writes it once
//   policy      statistics, coefficient and gradient of whole rows: two reads and one write (Rows::twice), the second read from the
//               L2 cache where the rows in flight fit it, hence the first one goes right to left and the second one back; or
//               one read and one write (Rows::kept), the row in the shared memory of a cluster's blocks meanwhile
//
// A row is cut into units of 16 bytes, and these are dealt out to L lanes: lane l has the units l, l + L, l + 2L, ... and folds them
// from right to left; the lanes' sums are merged in one tree. L depends on the row's length alone. A block has a run of the lanes
// and a thread one of them after the other, so that a result has the same bits at every launch shape and alignment. Per element:
// 2 exp in policy, 1 elsewhere; 16 bytes are loaded at once wherever the pointers allow it. Results may lie on the tile, element on
// element: the thread that has read a unit writes it.
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
template <class T>
constexpr int kMostThreads = sizeof(T) == 8 ? 512 : 1024;

// The units of a row that one block has, in and out: numbered from left to right, unit i is in lane i % mine of them. `T` is what
// the tile holds, `O` what is written.
template <class T, class O, Rows Mode>
struct Share {
  const T* in;  // the row
  O* out;
  int columns;      // of the row
  int lanes;        // of the row
  int first, mine;  // lanes of this block
  int units;        // of this block
  int whole;        // its first units that can be moved at once
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
    const int of_row = (columns + kUnit<T> - 1) / kUnit<T>;
    lanes = lanes_of(of_row, Mode == Rows::ranges ? kFewestLanesOfRange : kFewestLanes);
    mine = lanes / blocks;
    first = rank * mine;
    units = share_of(of_row, lanes, first, mine);
    whole = aligned ? share_of(columns / kUnit<T>, lanes, first, mine) : 0;
  }

  // First column of the k-th unit of this block's lane.
  __device__ __forceinline__ int column(int lane, int k) const { return (first + lane + k * lanes) * kUnit<T>; }

  // First column of this block's unit i.
  __device__ __forceinline__ int column(int i) const {
    if constexpr (Mode != Rows::kept) return i * kUnit<T>;
    const int k = i >> (31 - __clz(mine));  // a power of two
    return column(i - k * mine, k);
  }

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

// Calls f(units, k, ragged) for the units k, k + 1, .. of one lane, as many as are loaded at once, right to left; `ragged` units may
// reach past the row's end, or lie behind it.
template <int InFlight, class S, class F>
__device__ __forceinline__ void read_steps_backward(const S& share, int lane, F f) {
  using Input = decltype(share.load_whole(0));
  const auto of_lane = [&](int units) { return (units - lane + share.mine - 1) >> (31 - __clz(share.mine)); };
  const int steps = of_lane(share.whole) / InFlight;
  Input units[InFlight];
  for (int step = (of_lane(share.units) + InFlight - 1) / InFlight - 1; step >= steps; step--) {
#pragma unroll
    for (int i = 0; i < InFlight; i++) units[i] = share.load_part(share.column(lane, step * InFlight + i));
    f(units, step * InFlight, true);
  }
  for (int step = steps - 1; step >= 0; step--) {
#pragma unroll
    for (int i = 0; i < InFlight; i++) units[i] = share.load_whole(share.column(lane, step * InFlight + i));
    f(units, step * InFlight, false);
  }
}

// Calls f(unit, k, ragged) for each of them.
template <int InFlight, class S, class F>
__device__ __forceinline__ void read_backward(const S& share, int lane, F f) {
  read_steps_backward<InFlight>(share, lane, [&](const auto& units, int k, bool ragged) {
#pragma unroll
    for (int i = InFlight - 1; i >= 0; i--) f(units[i], k + i, ragged);
  });
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

// Of all lanes of a warp, N from each. Without the target, which no lane has seen. The maximum first: it is the same in any order,
// and one exponential then does for all exchanges.
template <class A, int N>
__device__ __forceinline__ RowStatistics<A> merged_over_warp(RowStatistics<A> (&parts)[N]) {
  A max = parts[0].max;
#pragma unroll
  for (int i = 1; i < N; i++) max = std::fmax(max, parts[i].max);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) max = std::fmax(max, __shfl_xor_sync(kWholeWarp, max, distance));
  RowStatistics<A> sum;
#pragma unroll
  for (int i = 0; i < N; i++) {
    raise_max(parts[i], max);
    sum.others += parts[i].others;
    sum.moment += parts[i].moment;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum.others += __shfl_xor_sync(kWholeWarp, sum.others, distance);
    sum.moment += __shfl_xor_sync(kWholeWarp, sum.moment, distance);
  }
  sum.max = max;
  return sum;
}

// In front of a block's shared memory.
template <class A>
struct Scratch {
  RowStatistics<A> lanes[kMostLanes / 32];  // of 32 lanes each
  RowStatistics<A> row;
};
static_assert(sizeof(Scratch<double>) <= kScratchBytes && kScratchBytes % kUnitBytes == 0);

// ---- a row

// Folds the columns of a unit but the target's, and those from `end` on.
template <class T, bool Plain, class A = acc_of<T>>
__device__ __forceinline__ void fold_unit(RowStatistics<A>& s, const InputUnit<T>& unit, int column, int end, int target,
                                          const ElementTransform<A, Plain>& transform) {
  A z[kUnit<T>];
#pragma unroll
  for (int j = 0; j < kUnit<T>; j++) {
    const bool inside = column + j < end;
    z[j] = inside ? transform(widened(unit.at[j]), column + j) : -infinity<A>();
  }
  if (unsigned(target - column) < unsigned(kUnit<T>)) {
#pragma unroll
    for (int j = 0; j < kUnit<T>; j++) {
      if (column + j == target) z[j] = -infinity<A>();
    }
  }
  fold(s, z);
}

// One block's work on one row. With `Mode` kept, a cluster's blocks share it, and the units stay in shared memory.
template <class T, class O, bool Plain, Rows Mode>
struct Row {
  using A = acc_of<T>;
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

  // The statistics of the row, in every thread; once per kernel.
  __device__ __forceinline__ RowStatistics<A> statistics() {
    for (int lane = int(threadIdx.x); lane < share.mine; lane += int(blockDim.x)) {
      RowStatistics<A> s[1];
      read_backward<kInFlight<T, Plain>>(share, lane, [&](const InputUnit<T>& unit, int k, bool ragged) {
        const int c = share.column(lane, k);
        if (ragged && c >= share.columns) return;
        if constexpr (Mode == Rows::kept) kept()[lane + k * share.mine] = unit;
        // without `ragged` the compiler drops the comparisons
        fold_unit<T, Plain>(s[0], unit, c, ragged ? share.columns : c + kUnit<T>, target, transform);
      });
      s[0] = merged_over_warp(s);
      if (lane % 32 == 0) scratch()->lanes[lane / 32] = s[0];
    }
    // after the loop, where the row is in a cache: before it, every row would begin by waiting for this one
    const A z = target < 0 ? -infinity<A>() : transform(widened(load(share.in + target)), target);
    RowStatistics<A> s = merged_over_lanes();
    add_target(s, z);
    return s;
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

  __device__ __forceinline__ Scratch<A>* scratch() const { return reinterpret_cast<Scratch<A>*>(shared_memory()); }

  __device__ __forceinline__ InputUnit<T>* kept() const {
    return reinterpret_cast<InputUnit<T>*>(shared_memory() + kScratchBytes);
  }

  // What stands in the scratch of all blocks, in every thread. The first warp of each block reads it.
  __device__ __forceinline__ RowStatistics<A> merged_over_lanes() const {
    if constexpr (Mode == Rows::kept) ClusterOf<Mode>::type::sync();
    else __syncthreads();
    if (threadIdx.x < 32) {
      RowStatistics<A> parts[kMostLanes / 32 / 32];
#pragma unroll
      for (int i = 0; i < kMostLanes / 32 / 32; i++) {
        const int lane = (int(threadIdx.x) + 32 * i) * 32, block = lane / share.mine;
        if (lane < share.lanes) parts[i] = *of_block(&scratch()->lanes[(lane - block * share.mine) / 32], block);
      }
      parts[0] = merged_over_warp(parts);
      if (threadIdx.x == 0) scratch()->row = parts[0];
    }
    if constexpr (Mode == Rows::kept) ClusterOf<Mode>::type::barrier_arrive();
    __syncthreads();
    return scratch()->row;
  }

  // The same address in another block of the cluster.
  template <class X>
  __device__ __forceinline__ X* of_block(X* mine, int block) const {
    if constexpr (Mode == Rows::kept) return ClusterOf<Mode>::type::map_shared_rank(mine, block);
    return mine;
  }
};

// ---- the kernels

template <class T, bool Plain, Rows Mode>
__global__ void __launch_bounds__(kMostThreads<T>, 1) statistics_kernel(const StatisticsParams p) {
  using A = acc_of<T>;
  Row<T, T, Plain, Mode> row(p.tile, p.tile.values);
  auto& stats = static_cast<RowStatistics<A>*>(p.stats)[row.row];
  const RowStatistics<A> before = stats, s = row.statistics();
  if (row.is_first_thread()) stats = merged(before, s);
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
__global__ void __launch_bounds__(kMostThreads<T>, 1) policy_kernel(const PolicyParams p) {
  if constexpr (Mode != Rows::kept || kHasClusters) {
    using A = acc_of<T>;
    Row<T, O, Plain, Mode> row(p.tile, p.out);
    const RowStatistics<A> s = row.statistics();
    const RowResult<A> result = close(s);
    const A g = policy_coefficient<A>(p, row.row, result.logps), g_entropy = Plain ? A(0) : value<A>(p.rows.w_entropy, row.row);
    row.write({row.transform, g, g_entropy, s.max, result.log_sum, result.logps, result.entropy});
    // at the end: sooner, the addresses cost more registers than 1024 threads have
    if (row.is_first_thread()) write<A>(p.scored, row.row, result);
    row.leave();
  }
}

}  // namespace
}  // namespace grpo_kernels
