// The two pair kernels on CUDA, over K columns: dot products and sums of pairs (row of one matrix, row of another).
//
//   pair_logits  a warp computes a pair: it reads its 8 bytes of id, the K elements of a row of the weight past the first-level
//                cache, and the row of hidden through it. A lane has 8 loads of 16 bytes under way, a warp 4 KiB.
//   pair_sums    a warp sums 512 bytes of a row over its pairs: it reads them of a row of the source for each pair, and the pair's
//                id and g, 12 bytes (16 in double), which makes 2 % more. A lane has 8 loads of 16 bytes under way, each of another
//                pair, and the next 32 ids; its sums are in registers, and the result is written once.
//
// A unit is 16 bytes. In pair_logits lane l has the units l, l + 32, ... of a row, one sum for each place in a unit, and the lanes'
// sums are merged in one tree. In pair_sums a lane has one unit and adds the pairs in their order; the pairs of a long range are
// dealt out in runs of 32 to kSlices slices, whose sums a warp adds in order. So the bits depend on K and a range's length alone.
#pragma once

#include "row_math.h"
#include "units_cuda.cuh"

namespace grpo_kernels {
namespace {

// Of a lane, under way; without alignment a unit takes several loads.
template <bool Aligned>
constexpr int kPairLoads = Aligned ? 8 : 2;

// A unit as it was loaded: ptxas would rather have a register for every two bytes of it until they are used.
template <class T>
struct Packed {
  bits_of<kUnitBytes> bits;

  __device__ __forceinline__ Packed() : bits{} {}
  __device__ __forceinline__ Packed(const InputUnit<T>& unit) { memcpy(&bits, &unit, kUnitBytes); }
  __device__ __forceinline__ InputUnit<T> unit() const {
    InputUnit<T> unit;
    memcpy(&unit, &bits, kUnitBytes);
    return unit;
  }
};

// The unit from column `c` on; zeros behind the row's end.
template <bool Aligned, bool Again, class T>
__device__ __forceinline__ InputUnit<T> unit_of(const T* row, int c, int columns) {
  if constexpr (Aligned) {
    return load<Again>(reinterpret_cast<const InputUnit<T>*>(row + c));
  } else {
    InputUnit<T> unit = {};
#pragma unroll
    for (int j = 0; j < kUnit<T>; j++) {
      if (c + j < columns) unit.at[j] = load<Again>(row + c + j);
    }
    return unit;
  }
}

// hidden . weight, in every lane.
template <bool Aligned, class T, class A = acc_of<T>>
__device__ __forceinline__ A dot_of_warp(const T* hidden, const T* weight, int columns) {
  constexpr int kStep = 32 * kUnit<T>, kLoads = kPairLoads<Aligned>;
  A sums[kUnit<T>] = {};
  for (int first = int(threadIdx.x % 32) * kUnit<T>; first < columns; first += kLoads * kStep) {
    Packed<T> units[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (first + i * kStep < columns) units[i] = unit_of<Aligned, false>(weight, first + i * kStep, columns);
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (first + i * kStep >= columns) break;
      const InputUnit<T> unit = units[i].unit(), other = unit_of<Aligned, true>(hidden, first + i * kStep, columns);
#pragma unroll
      for (int j = 0; j < kUnit<T>; j++) sums[j] += widened(other.at[j]) * widened(unit.at[j]);
    }
  }
#pragma unroll
  for (int distance = kUnit<T> / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int j = 0; j < distance; j++) sums[j] += sums[j + distance];
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sums[0] += __shfl_xor_sync(kWholeWarp, sums[0], distance);
  return sums[0];
}

// An id, or -1 where it is none of the matrix's; these have fewer than 2^31 rows, and half the registers are saved.
__device__ __forceinline__ int id_of(const Pairs& pairs, int64_t j, const Matrix& per_id) {
  const int64_t id = pairs.ids[j];
  return id >= 0 && id < per_id.rows ? int(id) : -1;
}

__device__ __forceinline__ int64_t place_of(const Pairs& pairs, int64_t r) { return pairs.rows ? pairs.rows[r] : r; }

// The pairs of a block's rows, one behind the other; each warp takes those that are its own.
struct PairWalk {
  const int64_t first_row;
  int length = 0;  // of the row that is this lane's
  int of = 0;      // row that holds the pair
  int before = 0;  // pairs of the rows before it

  struct Pair {
    int64_t j = -1;  // -1: there is none
    int row, id;
  };

  __device__ __forceinline__ PairWalk(const Pairs& pairs, int64_t first_row) : first_row(first_row) {
    const int64_t r = first_row + threadIdx.x % 32;
    if (threadIdx.x % 32 < kRowsOfBlock && r < pairs.count) length = int(pairs.ranges[2 * r + 1] - pairs.ranges[2 * r]);
  }

  // The at-th pair; `at` never falls.
  __device__ __forceinline__ Pair operator()(const Pairs& pairs, const Matrix& per_id, int at) {
    for (; of < kRowsOfBlock; of++) {
      const int pairs_of_row = __shfl_sync(kWholeWarp, length, of);
      if (at - before < pairs_of_row) break;
      before += pairs_of_row;
    }
    Pair pair;
    if (of == kRowsOfBlock) return pair;
    pair.j = pairs.ranges[2 * (first_row + of)] + at - before;
    pair.row = int(place_of(pairs, first_row + of));
    pair.id = id_of(pairs, pair.j, per_id);
    return pair;
  }
};

// kRowsOfBlock rows are shared by blocks_of_rows blocks, whose warps take turns at the pairs.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kMostPairThreads, 3) pair_logits_kernel(const PairLogitsParams p) {
  using A = acc_of<T>;
  const int blocks = blocks_of_rows(p.pairs.count), warps = int(blockDim.x / 32);
  PairWalk walk(p.pairs, int64_t(blockIdx.x / unsigned(blocks)) * kRowsOfBlock);
  int at = int(blockIdx.x % unsigned(blocks)) * warps + int(threadIdx.x / 32);
  auto pair = walk(p.pairs, p.weight, at);
  while (pair.j >= 0) {
    const auto next = walk(p.pairs, p.weight, at += blocks * warps);  // its id is on the way meanwhile
    const bool here = pair.id >= 0;
    A z = -infinity<A>();
    if (here) {
      z = dot_of_warp<Aligned>(row_of<const T>(p.hidden, pair.row), row_of<const T>(p.weight, pair.id), int(p.weight.columns));
      z = A(p.scale) * z + value<A>(p.bias, pair.id);
    }
    A* out = static_cast<A*>(p.out) + pair.j;
    if (threadIdx.x % 32 == 0 && (here || !p.add)) *out = p.add ? *out + z : z;
    pair = next;
  }
}

// Adds a unit of the `count` pairs from `first` on, of every `step`-th run of 32 of them, to the lane's sums.
template <bool Aligned, class T, class A>
__device__ __forceinline__ void add_pairs(A (&sums)[kUnit<T>], const PairSumsParams& p, int64_t first, int count, int step,
                                          int column) {
  constexpr int kLoads = kPairLoads<Aligned>;
  const int lane = int(threadIdx.x % 32), columns = int(p.source.columns);
  int id = -1, next_id;  // of the pair that is this lane's
  A g = 0, next_g;
  const auto read = [&](int at, int& id, A& g) {
    id = at < count ? id_of(p.pairs, first + at, p.source) : -1;
    g = id >= 0 ? value<A>(p.g, first + at) : A(0);
  };
  read(lane, id, g);
  for (int run = 0; run < count; run += 32 * step, id = next_id, g = next_g) {
    read(run + 32 * step + lane, next_id, next_g);
#pragma unroll 1
    for (int i = 0; i < 32 && run + i < count; i += kLoads) {
      Packed<T> units[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; k++) {
        const int row = __shfl_sync(kWholeWarp, id, i + k);
        if (row >= 0 && column < columns) units[k] = unit_of<Aligned, false>(row_of<const T>(p.source, row), column, columns);
      }
#pragma unroll
      for (int k = 0; k < kLoads; k++) {
        const A factor = __shfl_sync(kWholeWarp, g, i + k);
        const InputUnit<T> unit = units[k].unit();
#pragma unroll
        for (int j = 0; j < kUnit<T>; j++) sums[j] += factor * widened(unit.at[j]);
      }
    }
  }
}

// Writes the lane's sums, at most 16 bytes at once.
template <bool Aligned, class O, class A, int N>
__device__ __forceinline__ void write_sums(const A (&sums)[N], const PairSumsParams& p, int64_t row, int column) {
  constexpr int kPart = !Aligned ? 1 : N < kUnit<O> ? N : kUnit<O>;
  O* out = row_of<O>(p.out, row) + column;
#pragma unroll
  for (int at = 0; at < N; at += kPart) {
    if (column + at >= p.out.columns) return;
    auto* place = reinterpret_cast<Unit<O, kPart>*>(out + at);
    Unit<O, kPart> part = {};
    if (p.add) part = load(place);
#pragma unroll
    for (int j = 0; j < kPart; j++) part.at[j] = rounded<O>(A(p.scale) * sums[at + j] + A(widened(part.at[j])));
    store(place, part);
  }
}

// A block has some rows, most of which may be empty, and 32 units of each. Its warps take turns at them, and share the long ones.
template <class T, class O, bool Aligned>
__global__ void __launch_bounds__(kMostPairThreads, 2) pair_sums_kernel(const PairSumsParams p) {
  using A = acc_of<T>;
  const int warp = int(threadIdx.x / 32), warps = int(blockDim.x / 32), lane = int(threadIdx.x % 32);
  const unsigned pieces = unsigned(pieces_of_sum(p.out.columns, sizeof(T)));
  const int rows = rows_of_block(p.pairs.count), column = int(blockIdx.x % pieces * 32 + unsigned(lane)) * kUnit<T>;
  const int64_t first_row = int64_t(blockIdx.x / pieces) * rows;
  const int64_t* ranges = p.pairs.ranges + 2 * first_row;
  int length = 0;  // of the row that is this lane's
  if (lane < rows && first_row + lane < p.pairs.count) length = int(ranges[2 * lane + 1] - ranges[2 * lane]);
  if (length > 0) {
    const int64_t place = place_of(p.pairs, first_row + lane);
    if (place < 0 || place >= p.out.rows) length = 0;
  }
  const unsigned some = __ballot_sync(kWholeWarp, length > 0), many = __ballot_sync(kWholeWarp, length > kLongRange);
  int turn = 0;
  for (unsigned rest = some & ~many; rest; rest &= rest - 1, turn++) {
    if (turn % warps != warp) continue;
    const int of = __ffs(int(rest)) - 1;
    A sums[kUnit<T>] = {};
    add_pairs<Aligned, T>(sums, p, ranges[2 * of], __shfl_sync(kWholeWarp, length, of), 1, column);
    write_sums<Aligned, O>(sums, p, place_of(p.pairs, first_row + of), column);
  }
  A* partial = reinterpret_cast<A*>(shared_memory()) + lane;  // [kSlices, kUnit, 32]
  for (unsigned rest = many; rest; rest &= rest - 1) {
    const int of = __ffs(int(rest)) - 1, count = __shfl_sync(kWholeWarp, length, of);
    for (int slice = warp; slice < kSlices; slice += warps) {
      A sums[kUnit<T>] = {};
      add_pairs<Aligned, T>(sums, p, ranges[2 * of] + 32 * slice, count - 32 * slice, kSlices, column);
#pragma unroll
      for (int j = 0; j < kUnit<T>; j++) partial[(slice * kUnit<T> + j) * 32] = sums[j];
    }
    __syncthreads();
    if (warp == 0) {
      A sums[kUnit<T>] = {};
      for (int slice = 0; slice < kSlices; slice++) {
#pragma unroll
        for (int j = 0; j < kUnit<T>; j++) sums[j] += partial[(slice * kUnit<T> + j) * 32];
      }
      write_sums<Aligned, O>(sums, p, place_of(p.pairs, first_row + of), column);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace grpo_kernels
