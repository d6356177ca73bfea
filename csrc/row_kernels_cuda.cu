// Launches of the row kernels: the instantiation for a tile's dtypes and options, and the launch shape.
#include "row_kernels_cuda.cuh"

#include <cstdio>

#include "row_kernels_cuda.h"

namespace grpo_kernels {
namespace {

template <class... Args>
const char* failure(const char* format, Args... args) {
  static thread_local char text[256];
  std::snprintf(text, sizeof(text), format, args...);
  return text;
}

// The caller's device again at the end; where it was that already nothing is set, for that would make a context on it.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before_);
    changed_ = error == cudaSuccess && device != before_;
    if (changed_) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Shape {
  bool kept;
  int cluster, threads, shared;
};

// Fills in what the caller left open; returns what is wrong with the rest, or nullptr.
const char* shape_of(const Matrix& tile, int element_size, const CudaLaunch& launch, int visits, int capability, Shape& shape) {
  if (tile.rows > INT32_MAX / kLargestCluster || tile.columns > INT32_MAX / 2) {
    return failure("%lld rows or %lld columns are too many", (long long)tile.rows, (long long)tile.columns);
  }
  shape.cluster = launch.cluster ? launch.cluster : cluster_size(tile.columns, element_size, capability);
  shape.kept = launch.variant == 2 || (launch.variant == 0 && visits == 2 && shape.cluster > 0);
  if (!shape.kept) shape.cluster = 1;
  const bool power_of_two = shape.cluster > 0 && (shape.cluster & (shape.cluster - 1)) == 0;
  const bool possible = capability >= 90 && power_of_two && shape.cluster <= kLargestCluster;
  const int64_t shared = shape.kept && possible ? block_memory(tile.columns, element_size, shape.cluster) : kScratchBytes;
  if (shape.kept && (!possible || shared > most_shared_memory(capability))) {
    return failure("a row of %lld columns does not fit the shared memory of a cluster of %d blocks at compute capability %d",
                   (long long)tile.columns, shape.cluster, capability);
  }
  shape.shared = int(shared);
  shape.threads = launch.threads ? launch.threads : threads_of(tile.columns, element_size, shape.kept ? 1 : visits, shape.cluster);
  if (shape.threads < 32 || shape.threads > most_threads(element_size) || shape.threads % 32) {
    return failure("threads must be a multiple of 32 up to %d, got %d", most_threads(element_size), shape.threads);
  }
  return nullptr;
}

template <class Params>
cudaError_t start(void (*kernel)(Params), const Params& params, const Shape& shape, int capability, void* stream) {
  if (shape.shared > 48 << 10) {
    const void* address = reinterpret_cast<const void*>(kernel);
    // the same limit from every thread: one that asked for its own launch would take away another's
    const int limit = most_shared_memory(capability);
    const cudaError_t error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(params.tile.values.rows) * unsigned(shape.cluster));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.kept ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

bool has_plain_transform(const Tile& tile) { return !tile.bias && tile.transform.softcap == 0; }

const Matrix& result_of(const StatisticsParams& p) { return p.tile.values; }
const Matrix& result_of(const GradientParams& p) { return p.out; }
const Matrix& result_of(const PolicyParams& p) { return p.out; }

template <class Params>
using Kernel = void (*)(Params);

template <class T, class O>
Kernel<StatisticsParams> instantiation(const StatisticsParams& p, bool) {
  return has_plain_transform(p.tile) ? statistics_kernel<T, true> : statistics_kernel<T, false>;
}

template <class T, class O>
Kernel<GradientParams> instantiation(const GradientParams& p, bool) {
  const bool plain = has_plain_transform(p.tile) && !p.g_entropy;
  return plain ? gradient_kernel<T, O, true> : gradient_kernel<T, O, false>;
}

template <class T, class O>
Kernel<PolicyParams> instantiation(const PolicyParams& p, bool kept) {
  const bool plain = has_plain_transform(p.tile) && !p.rows.w_entropy;
  if (kept) return plain ? policy_kernel<T, O, true, Rows::kept> : policy_kernel<T, O, false, Rows::kept>;
  return plain ? policy_kernel<T, O, true, Rows::twice> : policy_kernel<T, O, false, Rows::twice>;
}

// The instantiation for the dtypes, or nullptr where there is none.
template <class Params>
Kernel<Params> kernel_for(const Params& p, bool kept) {
  const Dtype in = p.tile.values.dtype, out = result_of(p).dtype;
  if (in == Dtype::float32) {
    if (out == Dtype::float32) return instantiation<float, float>(p, kept);
    if (out == Dtype::bfloat16) return instantiation<float, __nv_bfloat16>(p, kept);
    if (out == Dtype::float16) return instantiation<float, __half>(p, kept);
  }
  if (in != out) return nullptr;
  if (out == Dtype::bfloat16) return instantiation<__nv_bfloat16, __nv_bfloat16>(p, kept);
  if (out == Dtype::float16) return instantiation<__half, __half>(p, kept);
  return instantiation<double, double>(p, kept);
}

int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// `visits`: how often the kernel walks over a row; what is read once is never kept.
template <class Params>
const char* run(const char* name, const Params& p, const CudaLaunch& launch, int visits) {
  const Matrix& values = p.tile.values;
  if (values.rows == 0 || values.columns == 0) return nullptr;
  const OnDevice device(launch.device);
  if (device.error != cudaSuccess) {
    return failure("%s kernel: device %d: %s", name, launch.device, cudaGetErrorString(device.error));
  }
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, launch.device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, launch.device);
  const int capability = 10 * major + minor;
  CudaLaunch wanted = launch;
  if (visits == 1) wanted.variant = 1;
  while (true) {
    Shape shape;
    if (const char* wrong = shape_of(values, size_of(values.dtype), wanted, visits, capability, shape)) {
      return failure("%s kernel: %s", name, wrong);
    }
    const auto kernel = kernel_for(p, shape.kept);
    if (!kernel) {
      return failure("%s kernel: no result of dtype %d from a tile of dtype %d", name, int(result_of(p).dtype), int(values.dtype));
    }
    const cudaError_t error = start(kernel, p, shape, capability, launch.stream);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // or the next check of anybody would meet it again
    // A part of a GPU may be too small for a cluster. Two reads give the same bits.
    const bool no_room = error == cudaErrorInvalidClusterSize || error == cudaErrorLaunchOutOfResources;
    if (wanted.variant != 0 || !shape.kept || !no_room) return failure("%s kernel: %s", name, cudaGetErrorString(error));
    wanted.variant = 1;
  }
}

}  // namespace

extern "C" {

const char* grpo_cuda_statistics(const StatisticsParams* params, const CudaLaunch* launch) {
  return run("statistics", *params, *launch, 1);
}

const char* grpo_cuda_gradient(const GradientParams* params, const CudaLaunch* launch) {
  return run("gradient", *params, *launch, 1);
}

const char* grpo_cuda_policy(const PolicyParams* params, const CudaLaunch* launch) { return run("policy", *params, *launch, 2); }

#ifndef GRPO_SOURCES
#define GRPO_SOURCES ""
#endif
const char* grpo_cuda_sources() { return GRPO_SOURCES; }

const char* grpo_cuda_probe() {
  cudaFuncAttributes attributes;
  const void* kernel = reinterpret_cast<const void*>(gradient_kernel<float, float, true>);
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return failure("%s", cudaGetErrorString(error));
}
}

}  // namespace grpo_kernels
