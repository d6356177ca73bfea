// What the CUDA kernels move and compute with: elements, units of 16 bytes of them, a block's shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "launch_shape.h"

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

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
using acc_of = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
constexpr int kUnit = kUnitBytes / int(sizeof(T));  // columns

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

// Past the first-level cache, for no element is read twice out of it; with `Again` it is, and nobody writes it meanwhile.
template <bool Again = false, class V>
__device__ __forceinline__ V load(const V* p) {
  const auto* at = reinterpret_cast<const bits_of<sizeof(V)>*>(p);
  const bits_of<sizeof(V)> bits = Again ? __ldg(at) : __ldcg(at);
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
__device__ __forceinline__ bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0;
}

}  // namespace
}  // namespace grpo_kernels
