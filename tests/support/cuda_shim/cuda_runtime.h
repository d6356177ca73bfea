// What the row kernels use of the CUDA runtime, on the host: every thread of a block, and all blocks of a cluster, is a fiber.
//
// Which fiber runs next is drawn from a seed at every barrier, every shuffle and now and then at an access to global memory, so
// that a kernel that leaves out a barrier goes wrong for some seed. Shared memory is NaN until it is written, and again once its
// block has left. A barrier that not all threads reach is an error and not a hang.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorInvalidClusterSize = 912,
};
struct cudaFuncAttributes {};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// The running thread's.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

void maybe_yield();
void check_alignment(const void* p, size_t bytes);
void block_barrier(int line);
void cluster_arrive(int line);
void cluster_wait(int line);
unsigned cluster_rank();
unsigned cluster_blocks();
void* map_shared(void* own, int rank);
// Every lane of `mask` leaves `value` and takes that of lane `from`.
uint64_t exchange(unsigned mask, uint64_t value, unsigned from, int line);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(void*), void* closure);

template <class T>
T shuffle(unsigned mask, T value, unsigned from, int line) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, from, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return threadIdx.x % 32; }

}  // namespace shim

inline void __syncthreads(int line = __builtin_LINE()) { shim::block_barrier(line); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int = 32, int line = __builtin_LINE()) {
  return shim::shuffle(mask, value, shim::lane() ^ unsigned(distance), line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int = 32, int line = __builtin_LINE()) {
  return shim::shuffle(mask, value, unsigned(from), line);
}

inline unsigned __ballot_sync(unsigned mask, bool holds, int line = __builtin_LINE()) {
  unsigned bits = unsigned(holds) << shim::lane();
  for (int distance = 16; distance > 0; distance /= 2) bits |= __shfl_xor_sync(mask, bits, distance, 32, line);
  return bits;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

template <class T>
T __ldcg(const T* p) {
  shim::check_alignment(p, sizeof(T));
  shim::maybe_yield();
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return __ldcg(p);
}
template <class T>
void __stcg(T* p, T value) {
  shim::check_alignment(p, sizeof(T));
  shim::maybe_yield();
  *p = value;
}

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  struct Closure {
    void (*kernel)(Params);
    Params params;
  } closure{kernel, params};
  return shim::launch(*config, reinterpret_cast<const void*>(kernel),
                      [](void* p) { static_cast<Closure*>(p)->kernel(static_cast<Closure*>(p)->params); }, &closure);
}
