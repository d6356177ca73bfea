// The two pair kernels on CUDA, over K columns: dot products and sums of pairs (row of one matrix, row of another).
//
//   pair_logits  a warp computes a pair: it reads the K elements of a row of the weight past the first-level cache, and the row of
//                hidden through it, whose pairs are a block's. A lane has 8 loads of 16 bytes under way, a warp 4 KiB.
//   pair_sums    a warp sums 512 bytes of a row over its pairs: it reads them of a row of the source for each pair, and the pair's id
//                and g, 12 bytes (16 in double), which makes 2 % more. A lane has 8 loads of 16 bytes under way, each of another pair,
//                and the next 32 ids; its sums are in registers, and the result is written once.
//
// A unit is 16 bytes. In pair_logits lane l has the units l, l + 32, ... of a row, one sum for each place in a unit, and the lanes'
// sums are merged in one tree. In pair_sums a lane has one unit and adds the pairs in their order; the pairs of a long range are dealt
// out in runs of 32 to kSlices slices, whose sums a warp adds in order. So the bits depend on K and a range's length alone.
#pragma once

#include "row_math.h"
#include "units_cuda.cuh"

namespace grpo_kernels {
namespace {

constexpr int kPairLoads = 8;  // of a lane, under way

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
  constexpr int kStep = 32 * kUnit<T>;
  A sums[kUnit<T>] = {};
  for (int first = int(threadIdx.x % 32) * kUnit<T>; first < columns; first += kPairLoads * kStep) {
    InputUnit<T> units[kPairLoads];
#pragma unroll
    for (int i = 0; i < kPairLoads; i++) {
      if (first + i * kStep < columns) units[i] = unit_of<Aligned, false>(weight, first + i * kStep, columns);
    }
#pragma unroll
    for (int i = 0; i < kPairLoads; i++) {
      if (first + i * kStep >= columns) break;
      const InputUnit<T> other = unit_of<Aligned, true>(hidden, first + i * kStep, columns);
#pragma unroll
      for (int j = 0; j < kUnit<T>; j++) sums[j] += widened(other.at[j]) * widened(units[i].at[j]);
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

// A block has every `blocks_of_range`-th run of its row's pairs, a warp one pair of a run.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kMostPairThreads) pair_logits_kernel(const PairLogitsParams p) {
  using A = acc_of<T>;
  const int blocks = blocks_of_range(p.pairs.count), warps = int(blockDim.x / 32), turn = blocks * warps;
  const int64_t r = blockIdx.x / unsigned(blocks), last = p.pairs.ranges[2 * r + 1];
  int64_t j = p.pairs.ranges[2 * r] + blockIdx.x % unsigned(blocks) * warps + threadIdx.x / 32;
  if (j >= last) return;
  const T* hidden = row_of<const T>(p.hidden, p.pairs.rows ? p.pairs.rows[r] : r);
  const bool writes = threadIdx.x % 32 == 0;
  for (int64_t id = p.pairs.ids[j], next; j < last; j += turn, id = next) {
    next = j + turn < last ? p.pairs.ids[j + turn] : -1;
    A* out = static_cast<A*>(p.out) + j;
    if (id < 0 || id >= p.weight.rows) {
      if (writes && !p.add) *out = -infinity<A>();
      continue;
    }
    const A sum = dot_of_warp<Aligned>(hidden, row_of<const T>(p.weight, id), int(p.weight.columns));
    if (writes) *out = A(p.scale) * sum + value<A>(p.bias, id) + (p.add ? *out : A(0));
  }
}

// Adds a unit of every pair j of [first, last), of every `step`-th run of 32 pairs, to the lane's sums.
template <bool Aligned, class T, class A>
__device__ __forceinline__ void add_pairs(A (&sums)[kUnit<T>], const PairSumsParams& p, int64_t first, int64_t last, int step, int column) {
  const int lane = int(threadIdx.x % 32), columns = int(p.source.columns);
  int id = -1, next_id;  // of the pair that is this lane's; -1: none
  A g = 0, next_g;
  const auto read = [&](int64_t j, int& id, A& g) {
    const int64_t found = j < last ? p.pairs.ids[j] : -1;
    const bool here = found >= 0 && found < p.source.rows;
    id = here ? int(found) : -1;
    g = here ? value<A>(p.g, j) : A(0);
  };
  read(first + lane, id, g);
  for (; first < last; first += 32 * step, id = next_id, g = next_g) {
    read(first + 32 * step + lane, next_id, next_g);
    for (int i = 0; i < 32 && first + i < last; i += kPairLoads) {
      InputUnit<T> units[kPairLoads];
      A factors[kPairLoads];
#pragma unroll
      for (int k = 0; k < kPairLoads; k++) {
        const int row = __shfl_sync(kWholeWarp, id, i + k);
        factors[k] = __shfl_sync(kWholeWarp, g, i + k);
        units[k] = {};
        if (row >= 0 && column < columns) units[k] = unit_of<Aligned, false>(row_of<const T>(p.source, row) + column, 0, columns - column);
      }
#pragma unroll
      for (int k = 0; k < kPairLoads; k++) {
#pragma unroll
        for (int j = 0; j < kUnit<T>; j++) sums[j] += factors[k] * widened(units[k].at[j]);
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
__global__ void __launch_bounds__(kMostPairThreads) pair_sums_kernel(const PairSumsParams p) {
  using A = acc_of<T>;
  const int warp = int(threadIdx.x / 32), warps = int(blockDim.x / 32), lane = int(threadIdx.x % 32);
  const unsigned pieces = unsigned(pieces_of_sum(p.out.columns, sizeof(T)));
  const int rows = rows_of_block(p.pairs.count), column = int(blockIdx.x % pieces * 32 + unsigned(lane)) * kUnit<T>;
  const int64_t r = int64_t(blockIdx.x / pieces) * rows + lane;
  int64_t first = 0, last = 0, row = -1;  // of the row that is this lane's
  if (lane < rows && r < p.pairs.count) {
    first = p.pairs.ranges[2 * r];
    last = p.pairs.ranges[2 * r + 1];
    if (first < last) row = p.pairs.rows ? p.pairs.rows[r] : r;
  }
  const bool here = row >= 0 && row < p.out.rows, is_long = last - first > kLongRange;
  const unsigned short_rows = __ballot_sync(kWholeWarp, here && !is_long), long_rows = __ballot_sync(kWholeWarp, here && is_long);
  int turn = 0;
  for (unsigned rest = short_rows; rest; rest &= rest - 1, turn++) {
    if (turn % warps != warp) continue;
    const int of = __ffs(int(rest)) - 1;
    A sums[kUnit<T>] = {};
    add_pairs<Aligned, T>(sums, p, __shfl_sync(kWholeWarp, first, of), __shfl_sync(kWholeWarp, last, of), 1, column);
    write_sums<Aligned, O>(sums, p, __shfl_sync(kWholeWarp, row, of), column);
  }
  A* partial = reinterpret_cast<A*>(shared_memory()) + lane;  // [kSlices, kUnit, 32]
  for (unsigned rest = long_rows; rest; rest &= rest - 1) {
    const int of = __ffs(int(rest)) - 1;
    const int64_t from = __shfl_sync(kWholeWarp, first, of), end = __shfl_sync(kWholeWarp, last, of), to = __shfl_sync(kWholeWarp, row, of);
    for (int slice = warp; slice < kSlices; slice += warps) {
      A sums[kUnit<T>] = {};
      add_pairs<Aligned, T>(sums, p, from + 32 * slice, end, kSlices, column);
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
      write_sums<Aligned, O>(sums, p, to, column);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace grpo_kernels
