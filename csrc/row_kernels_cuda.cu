// Launches of the row kernels: the instantiation for a tile's dtypes and options, and the launch shape.
#include "row_kernels_cuda.cuh"

#include <cstdio>

#include "row_kernels_cuda.h"

namespace grpo_kernels {
namespace {

constexpr int kLargestCluster = 8;     // more need a permission of their own, and not every GPU has them
constexpr int kPerMultiprocessor = 2;  // blocks that a row's pieces leave room for, so that one computes while another loads

template <class... Args>
const char* failure(const char* format, Args... args) {
  static thread_local char text[256];
  std::snprintf(text, sizeof(text), format, args...);
  return text;
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    error = device == before_ ? cudaSuccess : cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before_); }
  cudaError_t error;

 private:
  int before_ = 0;
};

int bytes_per_block(int64_t columns, int element_size, int blocks) {
  const int64_t lines = (columns * element_size + 127) / 128;
  return kScratchBytes + int((lines + blocks - 1) / blocks * 128);
}

struct Shape {
  bool kept;
  int cluster, threads, shared;
};

// Fills in what the caller left open; returns what is wrong with the rest, or nullptr.
const char* shape_of(const Tile& tile, int element_size, const CudaLaunch& launch, int visits, int capability, Shape& shape) {
  shape.cluster = launch.cluster ? launch.cluster : grpo_cuda_cluster_size(tile.columns, element_size, capability);
  shape.kept = launch.variant == 2 || (launch.variant == 0 && visits == 2 && shape.cluster > 0);
  if (!shape.kept) shape.cluster = 1;
  shape.shared = shape.kept && shape.cluster ? bytes_per_block(tile.columns, element_size, shape.cluster) : kScratchBytes;
  const bool power_of_two = shape.cluster > 0 && (shape.cluster & (shape.cluster - 1)) == 0;
  if (shape.kept && (capability < 90 || !power_of_two || shape.cluster > kLargestCluster ||
                     shape.shared > grpo_cuda_shared_memory(capability))) {
    return failure("a row of %lld columns does not fit the shared memory of a cluster of %d blocks at compute capability %d",
                   (long long)tile.columns, shape.cluster, capability);
  }
  const int64_t share = (tile.columns + shape.cluster - 1) / shape.cluster;
  shape.threads = launch.threads ? launch.threads : grpo_cuda_threads(share, element_size, shape.kept ? 1 : visits);
  const int most = element_size == 8 ? 512 : 1024;
  if (shape.threads < 32 || shape.threads > most || shape.threads % 32) {
    return failure("threads must be a multiple of 32 up to %d, got %d", most, shape.threads);
  }
  if (tile.rows > INT32_MAX / shape.cluster || tile.columns > INT32_MAX / 2) {
    return failure("%lld rows or %lld columns are too many", (long long)tile.rows, (long long)tile.columns);
  }
  return nullptr;
}

template <class Params>
cudaError_t start(void (*kernel)(Params), const Params& params, const Shape& shape, void* stream) {
  if (shape.shared > 48 << 10) {
    const void* address = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(params.tile.rows) * unsigned(shape.cluster));
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

template <class T, class O>
struct StatisticsOf {
  static void (*kernel(const StatisticsParams& p, bool kept))(StatisticsParams) {
    const bool plain = !p.transform.bias && p.transform.softcap == 0;
    if (kept) return plain ? statistics_kernel<T, O, true, Rows::kept> : statistics_kernel<T, O, false, Rows::kept>;
    return plain ? statistics_kernel<T, O, true, Rows::twice> : statistics_kernel<T, O, false, Rows::twice>;
  }
};

template <class T, class O>
struct GradientOf {
  static void (*kernel(const GradientParams& p, bool))(GradientParams) {
    const bool plain = !(p.transform.bias && !p.from_probs) && p.transform.softcap == 0 && !p.g_entropy;
    if (p.from_probs) return plain ? gradient_kernel<T, O, true, Source::probs> : gradient_kernel<T, O, false, Source::probs>;
    return plain ? gradient_kernel<T, O, true, Source::logits> : gradient_kernel<T, O, false, Source::logits>;
  }
};

template <class T, class O>
struct PolicyOf {
  static void (*kernel(const PolicyParams& p, bool kept))(PolicyParams) {
    const bool plain = !p.transform.bias && p.transform.softcap == 0 && !p.w_entropy;
    if (kept) return plain ? policy_kernel<T, O, true, Rows::kept> : policy_kernel<T, O, false, Rows::kept>;
    return plain ? policy_kernel<T, O, true, Rows::twice> : policy_kernel<T, O, false, Rows::twice>;
  }
};

// The instantiation for the dtypes, or nullptr where there is none.
template <template <class, class> class Of, class Params>
auto kernel_for(const Params& p, bool kept) -> void (*)(Params) {
  const Dtype out = p.out.data ? p.out.dtype : p.tile.dtype;
  if (p.tile.dtype == Dtype::float32) {
    if (out == Dtype::float32) return Of<float, float>::kernel(p, kept);
    if (out == Dtype::bfloat16) return Of<float, __nv_bfloat16>::kernel(p, kept);
    if (out == Dtype::float16) return Of<float, __half>::kernel(p, kept);
  }
  if (p.tile.dtype != out) return nullptr;
  if (out == Dtype::bfloat16) return Of<__nv_bfloat16, __nv_bfloat16>::kernel(p, kept);
  if (out == Dtype::float16) return Of<__half, __half>::kernel(p, kept);
  return Of<double, double>::kernel(p, kept);
}

int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

template <template <class, class> class Of, class Params>
const char* run(const char* name, const Params& p, const CudaLaunch& launch, int visits, bool may_keep) {
  if (p.tile.rows == 0 || p.tile.columns == 0) return nullptr;
  const OnDevice device(launch.device);
  if (device.error != cudaSuccess) {
    return failure("%s kernel: device %d: %s", name, launch.device, cudaGetErrorString(device.error));
  }
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, launch.device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, launch.device);
  CudaLaunch wanted = launch;
  if (!may_keep) wanted.variant = 1;
  Shape shape;
  if (const char* wrong = shape_of(p.tile, size_of(p.tile.dtype), wanted, visits, 10 * major + minor, shape)) {
    return failure("%s kernel: %s", name, wrong);
  }
  const auto kernel = kernel_for<Of>(p, shape.kept);
  if (!kernel) {
    return failure("%s kernel: no result of dtype %d from a tile of dtype %d", name, int(p.out.dtype), int(p.tile.dtype));
  }
  const cudaError_t error = start(kernel, p, shape, launch.stream);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next check of anybody would meet it again
  return failure("%s kernel: %s", name, cudaGetErrorString(error));
}

}  // namespace

extern "C" {

const char* grpo_cuda_statistics(const StatisticsParams* params, const CudaLaunch* launch) {
  return run<StatisticsOf>("statistics", *params, *launch, params->probs ? 2 : 1, params->probs);
}

const char* grpo_cuda_gradient(const GradientParams* params, const CudaLaunch* launch) {
  return run<GradientOf>("gradient", *params, *launch, 1, false);
}

const char* grpo_cuda_policy(const PolicyParams* params, const CudaLaunch* launch) {
  return run<PolicyOf>("policy", *params, *launch, 2, true);
}

// Source: CUDA C++ Programming Guide, technical specifications per compute capability.
int grpo_cuda_shared_memory(int capability) {
  switch (capability) {
    case 80:
    case 87:
      return 163 << 10;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 << 10;
    case 90:
    case 100:
    case 101:
    case 103:
    case 110:
      return 227 << 10;
    default:
      return 48 << 10;  // every device has these
  }
}

int grpo_cuda_cluster_size(int64_t columns, int element_size, int capability) {
  if (capability < 90) return 0;
  const int limit = grpo_cuda_shared_memory(capability);
  int fits = 0;
  for (int blocks = kLargestCluster; blocks >= 1; blocks /= 2) {
    const int64_t lines = (columns * element_size + 127) / 128;
    const int64_t bytes = kScratchBytes + (lines + blocks - 1) / blocks * 128;
    if (bytes > limit) break;
    if (fits == 0 || bytes <= limit / kPerMultiprocessor) fits = blocks;
  }
  return fits;
}

int grpo_cuda_threads(int64_t columns, int element_size, int visits) {
  // A long row that is read twice gets a whole multiprocessor, so that few rows are in flight and the second read finds its row in
  // the L2 cache; otherwise several blocks share one, and one's reductions hide behind another's loads. Reasoned, not measured.
  const int64_t per_step = kUnitBytes / element_size * kInFlight<float, true>;
  const int most = element_size == 8 ? 512 : visits > 1 && columns >= 65536 ? 1024 : 512;
  int threads = 128;
  while (threads < most && threads * per_step < columns) threads *= 2;
  return threads;
}
}

}  // namespace grpo_kernels
