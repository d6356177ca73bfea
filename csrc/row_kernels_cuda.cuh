// The three row kernels on CUDA. R rows, C columns; a thread block, or a cluster of them, owns a row.
//
//   statistics  reads a tile once; with probabilities, once more (Rows::twice) or not (Rows::kept), and writes it
//   gradient    reads and writes it once
//   policy      statistics, coefficient and gradient of whole rows: two reads and one write (Rows::twice), the second read from the
//               L2 cache where the rows in flight fit it, hence the first one goes right to left and the second one back; or
//               one read and one write (Rows::kept), the row in the shared memory of a cluster's blocks meanwhile
//
// A row is cut into units of 16 bytes. Thread t of n has the units t, t + n, t + 2n, ..., the same ones in both visits and at any
// alignment, so that the bits of a result depend on the launch shape alone. Per element: 2 exp in policy and in statistics with
// probabilities, 1 elsewhere; 16 bytes are loaded at once wherever the pointers allow it.
//
// A result of half the width over the tile's own memory: the first step's stores land on columns of that step, those of step k on
// columns of step k / 2. So all threads must have loaded their part of step k / 2 before anyone stores step k.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "element_math.h"

namespace grpo_kernels {

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#else
unsigned char* shared_memory();  // the tests run this source on the host
#endif

namespace {

enum class Rows { twice, kept };

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

constexpr int kUnitBytes = 16;
// Loads a thread has under way; fewer where the registers are needed for a bias, a softcap or the entropy.
template <class T, bool Plain>
constexpr int kInFlight = sizeof(T) == 8 ? 1 : !Plain ? 2 : sizeof(T) == 2 ? 3 : 4;
constexpr int kMostWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
using acc_of = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
constexpr int kUnit = kUnitBytes / int(sizeof(T));  // columns
template <class T>
constexpr int kMostThreads = sizeof(T) == 8 ? 512 : 1024;

// ---- elements and units

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }

template <class O, class A>
__device__ __forceinline__ O rounded(A x) {
  if constexpr (std::is_same_v<O, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<O, __half>) return __float2half_rn(x);
  else return x;
}

template <int Bytes>
using bits_of = std::conditional_t<
    Bytes == 2, unsigned short,
    std::conditional_t<Bytes == 4, unsigned, std::conditional_t<Bytes == 8, uint2, uint4>>>;

// Past the first-level cache: no element is read twice out of it, and results may lie over the tile.
template <class V>
__device__ __forceinline__ V load(const V* p) {
  const bits_of<sizeof(V)> bits = __ldcg(reinterpret_cast<const bits_of<sizeof(V)>*>(p));
  V v;
  memcpy(&v, &bits, sizeof(V));
  return v;
}

template <class V>
__device__ __forceinline__ void store(V* p, const V& v) {
  bits_of<sizeof(V)> bits;
  memcpy(&bits, &v, sizeof(V));
  __stcg(reinterpret_cast<bits_of<sizeof(V)>*>(p), bits);
}

// N neighbouring elements, moved at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Unit {
  T at[N];
};

template <class T>
using InputUnit = Unit<T, kUnit<T>>;

template <class V>
__device__ __forceinline__ bool is_aligned(const V*, const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0;
}

// A row's part that one block owns, in and out. `T` is what it holds, `O` what is written.
template <class T, class O>
struct Span {
  const T* in;
  O* out;
  int first;    // column of the row
  int columns;  // how many
  bool aligned;

  __device__ __forceinline__ InputUnit<T> whole(int c) const { return load(reinterpret_cast<const InputUnit<T>*>(in + c)); }

  // Up to the end; zeros behind it.
  __device__ __forceinline__ InputUnit<T> part(int c) const {
    if (aligned && c + kUnit<T> <= columns) return whole(c);
    InputUnit<T> unit = {};
#pragma unroll
    for (int j = 0; j < kUnit<T>; j++) {
      if (c + j < columns) unit.at[j] = load(in + c + j);
    }
    return unit;
  }

  __device__ __forceinline__ void write(int c, const Unit<O, kUnit<T>>& unit) const {
    if (aligned && c + kUnit<T> <= columns) return store(reinterpret_cast<Unit<O, kUnit<T>>*>(out + c), unit);
#pragma unroll
    for (int j = 0; j < kUnit<T>; j++) {
      if (c + j < columns) store(out + c + j, unit.at[j]);
    }
  }
};

// The span of this thread's block: the whole row, or for a cluster's block its share, in lines of 128 bytes.
template <class T, class O>
__device__ __forceinline__ Span<T, O> span_of(const Tile& tile, const Output& out, int64_t row, int rank, int blocks) {
  constexpr int line = 128 / int(sizeof(T));
  const int columns = int(tile.columns);
  const int share = blocks == 1 ? columns : ((columns + line - 1) / line + blocks - 1) / blocks * line;
  const int first = rank * share < columns ? rank * share : columns;
  Span<T, O> s;
  // row * stride passes 2^31 at 14k rows of 152k
  s.in = static_cast<const T*>(tile.data) + row * tile.row_stride + first;
  s.out = out.data ? static_cast<O*>(out.data) + row * out.row_stride + first
                   : reinterpret_cast<O*>(static_cast<T*>(tile.data) + row * tile.row_stride) + first;
  s.first = first;
  s.columns = columns - first < share ? columns - first : share;
  s.aligned = is_aligned<InputUnit<T>>(nullptr, s.in) && is_aligned<Unit<O, kUnit<T>>>(nullptr, s.out);
  return s;
}

// ---- the two visits

// Calls f(unit, column, ragged) for this thread's units of a span, right to left; `ragged` units may reach past its end.
template <int InFlight, class T, class O, class F>
__device__ __forceinline__ void read_backward(const Span<T, O>& span, F f) {
  const int stride = int(blockDim.x) * kUnit<T>, mine = int(threadIdx.x) * kUnit<T>;
  const int steps = span.aligned ? span.columns / (stride * InFlight) : 0;
  for (int c = (span.columns - 1) / stride * stride + mine; c >= steps * stride * InFlight; c -= stride) {
    if (c < span.columns) f(span.part(c), c, true);
  }
  for (int k = steps - 1; k >= 0; k--) {
    const int c = k * stride * InFlight + mine;
    InputUnit<T> units[InFlight];
#pragma unroll
    for (int i = 0; i < InFlight; i++) units[i] = span.whole(c + i * stride);
#pragma unroll
    for (int i = InFlight - 1; i >= 0; i--) f(units[i], c + i * stride, false);
  }
}

// Writes f(unit, column) of this thread's units, left to right. `overlay`: what is written covers what others have yet to load.
template <int InFlight, class T, class O, class Load, class F>
__device__ __forceinline__ void write_forward(const Span<T, O>& span, bool overlay, Load load_unit, F f) {
  const int stride = int(blockDim.x) * kUnit<T>, mine = int(threadIdx.x) * kUnit<T>;
  const int steps = span.aligned ? span.columns / (stride * InFlight) : 0;
  for (int k = 0; k < steps; k++) {
    const int c = k * stride * InFlight + mine;
    InputUnit<T> units[InFlight];
#pragma unroll
    for (int i = 0; i < InFlight; i++) units[i] = load_unit(c + i * stride, false);
    // k / 2 is below the last power of two, so one barrier at each of them is enough
    if (overlay && (k & (k - 1)) == 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < InFlight; i++) {
      store(reinterpret_cast<Unit<O, kUnit<T>>*>(span.out + c + i * stride), f(units[i], c + i * stride));
    }
  }
  for (int k = steps * InFlight; k * stride < span.columns; k++) {
    const int c = k * stride + mine;
    InputUnit<T> unit = {};
    if (c < span.columns) unit = load_unit(c, true);
    if (overlay && (k & (k - 1)) == 0) __syncthreads();
    if (c < span.columns) span.write(c, f(unit, c));
  }
}

template <class T, class O>
__device__ __forceinline__ void write_zeros(const Span<T, O>& span) {
  const Unit<O, kUnit<T>> zeros = {};
  for (int c = int(threadIdx.x) * kUnit<T>; c < span.columns; c += int(blockDim.x) * kUnit<T>) span.write(c, zeros);
}

// ---- reductions

// Without the target, which no lane has seen. The maximum first: one exponential instead of one per exchange.
template <class A>
__device__ __forceinline__ RowStatistics<A> merged_over_warp(RowStatistics<A> s) {
  A max = s.max;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) max = std::fmax(max, __shfl_xor_sync(kAllLanes, max, distance));
  raise_max(s, max);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    s.others += __shfl_xor_sync(kAllLanes, s.others, distance);
    s.moment += __shfl_xor_sync(kAllLanes, s.moment, distance);
  }
  return s;
}

// In front of a block's shared memory.
template <class A>
struct Scratch {
  RowStatistics<A> warps[kMostWarps];
  RowStatistics<A> block;
};
constexpr int kScratchBytes = (int(sizeof(Scratch<double>)) + kUnitBytes - 1) / kUnitBytes * kUnitBytes;

// Of all threads of a block, in all of its threads. Once per kernel: its scratch is not cleared for a second time.
template <class A>
__device__ __forceinline__ RowStatistics<A> merged_over_block(RowStatistics<A> s) {
  Scratch<A>* scratch = reinterpret_cast<Scratch<A>*>(shared_memory());
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  s = merged_over_warp(s);
  if (lane == 0) scratch->warps[warp] = s;
  __syncthreads();
  return merged_over_warp(lane < warps ? scratch->warps[lane] : RowStatistics<A>());
}

// ---- a row

// Folds the columns of a unit but the target's, and those behind the span's end.
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
  Span<T, O> span;
  int target;                // column of the row; -1: not in this tile
  bool overlay;
  ElementTransform<A, Plain> transform;

  __device__ __forceinline__ Row(const Tile& tile, const Output& out, const Transform& t, const int64_t* targets)
      : row(index()), span(span_of<T, O>(tile, out, row, rank, blocks)), transform(t, row) {
    const int64_t c = targets[row];
    target = c >= 0 && c < tile.columns ? int(c) : -1;
    overlay = sizeof(O) < sizeof(T) && out.data == tile.data;
    whole_row = static_cast<const T*>(tile.data) + row * tile.row_stride;
  }

  // The statistics of the row, in every thread. All loads of the first visit are done when it returns, in all of its blocks.
  __device__ __forceinline__ RowStatistics<A> statistics() {
    const A z = target < 0 ? -infinity<A>() : transform(widened(load(whole_row + target)), target);
    RowStatistics<A> s;
    const int end = span.first + span.columns;
    read_backward<kInFlight<T, Plain>>(span, [&](const InputUnit<T>& unit, int c, bool ragged) {
      if constexpr (Mode == Rows::kept) kept()[c / kUnit<T>] = unit;
      // without `ragged` the compiler drops the comparisons
      fold_unit<T, Plain>(s, unit, span.first + c, ragged ? end : span.first + c + kUnit<T>, target, transform);
    });
    s = merged_over_block(s);
    if constexpr (Mode == Rows::kept) s = merged_over_cluster(s);
    add_target(s, z);
    return s;
  }

  template <Source From>
  __device__ __forceinline__ void write(const ElementResult<A, Plain, From>& result) const {
    const auto f = [&](const InputUnit<T>& unit, int c) {
      Unit<O, kUnit<T>> written;
#pragma unroll
      for (int j = 0; j < kUnit<T>; j++) written.at[j] = rounded<O>(result(widened(unit.at[j]), span.first + c + j));
      return written;
    };
    if constexpr (Mode == Rows::kept) {
      write_forward<kInFlight<T, Plain>>(span, false, [&](int c, bool) { return kept()[c / kUnit<T>]; }, f);
    } else {
      const auto from_tile = [&](int c, bool ragged) { return ragged ? span.part(c) : span.whole(c); };
      write_forward<kInFlight<T, Plain>>(span, overlay, from_tile, f);
    }
  }

  __device__ __forceinline__ bool is_first_thread() const { return rank == 0 && threadIdx.x == 0; }

  // Before a kernel ends: no block may leave while another reads its shared memory.
  __device__ __forceinline__ void leave() const {
    if constexpr (Mode == Rows::kept) ClusterOf<Mode>::type::barrier_wait();
  }

 private:
  const T* whole_row;

  __device__ __forceinline__ int64_t index() {
    if constexpr (Mode == Rows::kept) {
      rank = int(ClusterOf<Mode>::type::block_rank());
      blocks = int(ClusterOf<Mode>::type::num_blocks());
    }
    return int64_t(blockIdx.x) / blocks;
  }

  __device__ __forceinline__ InputUnit<T>* kept() const {
    return reinterpret_cast<InputUnit<T>*>(shared_memory() + kScratchBytes);
  }

  __device__ __forceinline__ RowStatistics<A> merged_over_cluster(RowStatistics<A> s) const {
    using Cluster = typename ClusterOf<Mode>::type;
    RowStatistics<A>* mine = &reinterpret_cast<Scratch<A>*>(shared_memory())->block;
    if (threadIdx.x == 0) *mine = s;
    Cluster::sync();
    const int lane = int(threadIdx.x) % 32;
    s = lane < blocks ? *Cluster::map_shared_rank(mine, lane) : RowStatistics<A>();
    Cluster::barrier_arrive();
    return merged_over_warp(s);
  }
};

template <class A>
__device__ __forceinline__ A value(const void* vector, int64_t row) {
  return vector ? static_cast<const A*>(vector)[row] : A(0);
}

// ---- the kernels

template <class T, class O, bool Plain, Rows Mode>
__global__ void __launch_bounds__(kMostThreads<T>, 1) statistics_kernel(const StatisticsParams p) {
  if constexpr (Mode == Rows::twice || kHasClusters) {
    using A = acc_of<T>;
    Row<T, O, Plain, Mode> row(p.tile, p.out, p.transform, p.target);
    A* stats = static_cast<A*>(p.stats) + 4 * row.row;
    const RowStatistics<A> before{stats[0], stats[1], stats[2], stats[3]};
    const RowStatistics<A> s = merged(before, row.statistics());
    if (row.is_first_thread()) {
      stats[0] = s.max;
      stats[1] = s.others;
      stats[2] = s.moment;
      stats[3] = s.target;
    }
    if (p.probs) row.write(ElementResult<A, Plain, Source::logits>::softmax(row.transform, s));
    row.leave();
  }
}

template <class T, class O, bool Plain, Source From>
__global__ void __launch_bounds__(kMostThreads<T>, 1) gradient_kernel(const GradientParams p) {
  using A = acc_of<T>;
  const Row<T, O, Plain, Rows::twice> row(p.tile, p.out, p.transform, p.target);
  const A g = value<A>(p.g, row.row), g_entropy = value<A>(p.g_entropy, row.row);
  if (g == A(0) && g_entropy == A(0)) return write_zeros(row.span);
  row.write(ElementResult<A, Plain, From>::gradient(row.transform, row.target, g, g_entropy, value<A>(p.lse, row.row), A(0),
                                                    value<A>(p.logps, row.row), value<A>(p.entropy, row.row)));
}

template <class T, class O, bool Plain, Rows Mode>
__global__ void __launch_bounds__(kMostThreads<T>, 1) policy_kernel(const PolicyParams p) {
  if constexpr (Mode == Rows::twice || kHasClusters) {
    using A = acc_of<T>;
    Row<T, O, Plain, Mode> row(p.tile, p.out, p.transform, p.target);
    const RowStatistics<A> s = row.statistics();
    const RowResult<A> result = close(s);
    if (row.is_first_thread()) {
      static_cast<A*>(p.logps)[row.row] = result.logps;
      static_cast<A*>(p.entropy)[row.row] = result.entropy;
    }
    const PolicyRow<A> inputs{p.old != nullptr,
                              p.ref != nullptr,
                              value<A>(p.old, row.row),
                              value<A>(p.ref, row.row),
                              value<A>(p.advantages, row.row),
                              value<A>(p.w_policy, row.row),
                              value<A>(p.w_kl, row.row)};
    const A g = policy_coefficient(p.terms, inputs, result.logps), g_entropy = value<A>(p.w_entropy, row.row);
    if (g == A(0) && g_entropy == A(0)) {
      write_zeros(row.span);
    } else {
      row.write(ElementResult<A, Plain, Source::logits>::gradient(row.transform, row.target, g, g_entropy, s.max, result.log_sum,
                                                                  result.logps, result.entropy));
    }
    row.leave();
  }
}

}  // namespace
}  // namespace grpo_kernels
