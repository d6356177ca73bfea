// Launches of the row and pair kernels: the instantiation for dtypes and options, and the launch shape.
#include "row_kernels_cuda.cuh"

#include <cstdio>

#include "divergence_cuda.cuh"
#include "pairs_cuda.cuh"

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

// Of a kernel: bytes of shared memory without a row, threads of a block at most and, but for 0, as chosen.
struct Limits {
  int scratch, threads, chosen;
};

// Fills in what the caller left open; returns what is wrong with the rest, or nullptr.
const char* shape_of(const Tile& tile, int element_size, const CudaLaunch& launch, int visits, const Limits& limits, int capability,
                     Shape& shape) {
  const Matrix& values = tile.values;
  if (values.rows > INT32_MAX / kLargestCluster || values.columns > INT32_MAX / 2) {
    return failure("%lld rows or %lld columns are too many", (long long)values.rows, (long long)values.columns);
  }
  shape.cluster = launch.cluster ? launch.cluster : cluster_size(values.columns, element_size, capability);
  shape.kept = launch.variant == 2 || (launch.variant == 0 && visits == 2 && shape.cluster > 0);
  if (!shape.kept) shape.cluster = 1;
  const bool power_of_two = shape.cluster > 0 && (shape.cluster & (shape.cluster - 1)) == 0;
  const bool possible = capability >= 90 && power_of_two && shape.cluster <= kLargestCluster;
  const int64_t shared = shape.kept && possible ? block_memory(values.columns, element_size, shape.cluster) : limits.scratch;
  if (shape.kept && (!possible || shared > most_shared_memory(capability))) {
    return failure("a row of %lld columns does not fit the shared memory of a cluster of %d blocks at compute capability %d",
                   (long long)values.columns, shape.cluster, capability);
  }
  shape.shared = int(shared);
  const int of_rows = threads_of(values.columns, element_size, shape.kept ? 1 : visits, shape.cluster);
  const int chosen = tile.ranges ? kThreadsOfRange : limits.chosen ? limits.chosen : of_rows;
  shape.threads = launch.threads ? launch.threads : chosen;
  const int most = shape.kept ? kMostThreadsKept : limits.threads;
  if (shape.threads < 32 || shape.threads > most || shape.threads % 32) {
    return failure("threads must be a multiple of 32 up to %d, got %d", most, shape.threads);
  }
  return nullptr;
}

template <class Params>
cudaError_t start(void (*kernel)(Params), const Params& params, int64_t blocks, const Shape& shape, int capability, void* stream) {
  if (shape.shared > 48 << 10) {
    const void* address = reinterpret_cast<const void*>(kernel);
    // the same limit from every thread: one that asked for its own launch would take away another's
    const int limit = most_shared_memory(capability);
    const cudaError_t error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
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

template <class Params>
constexpr bool of_two_tiles = std::is_same_v<Params, ComparisonParams> || std::is_same_v<Params, JensenShannonParams> ||
                              std::is_same_v<Params, DivergenceGradientParams>;

bool has_plain_transform(const Tile& tile) { return !tile.bias && tile.transform.softcap == 0; }

template <class Params>
const Tile& tile_of(const Params& p) {
  if constexpr (of_two_tiles<Params>) return p.tiles.student;
  else return p.tile;
}

bool has_plain_transforms(const TwoTiles& tiles) {
  return has_plain_transform(tiles.student) && has_plain_transform(tiles.teacher);
}

const Matrix& result_of(const StatisticsParams& p) { return p.tile.values; }
const Matrix& result_of(const GradientParams& p) { return p.out; }
const Matrix& result_of(const PolicyParams& p) { return p.out; }
const Matrix& result_of(const ComparisonParams& p) { return p.tiles.student.values; }
const Matrix& result_of(const JensenShannonParams& p) { return p.tiles.student.values; }
const Matrix& result_of(const DivergenceGradientParams& p) { return p.out; }

template <class Params>
using Kernel = void (*)(Params);

template <class T, class O, Rows Mode>
Kernel<StatisticsParams> instantiation_of(const StatisticsParams& p) {
  const bool plain = has_plain_transform(p.tile);
  if (p.squares) return plain ? statistics_kernel<T, true, Mode, true> : statistics_kernel<T, false, Mode, true>;
  return plain ? statistics_kernel<T, true, Mode, false> : statistics_kernel<T, false, Mode, false>;
}

template <class T, class O, Rows Mode>
Kernel<GradientParams> instantiation_of(const GradientParams& p) {
  const bool plain = has_plain_transform(p.tile) && !p.g_entropy;
  return plain ? gradient_kernel<T, O, true, Mode> : gradient_kernel<T, O, false, Mode>;
}

template <class T, class O, Rows Mode>
Kernel<ComparisonParams> instantiation_of(const ComparisonParams& p) {
  return has_plain_transforms(p.tiles) ? divergence_statistics_kernel<T, true, Mode> : divergence_statistics_kernel<T, false, Mode>;
}

template <class T, class O, Rows Mode>
Kernel<JensenShannonParams> instantiation_of(const JensenShannonParams& p) {
  return has_plain_transforms(p.tiles) ? jensen_shannon_kernel<T, true, Mode> : jensen_shannon_kernel<T, false, Mode>;
}

template <class T, class O, Rows Mode>
Kernel<DivergenceGradientParams> instantiation_of(const DivergenceGradientParams& p) {
  const bool plain = has_plain_transforms(p.tiles) && !p.g_entropy;
  return plain ? divergence_gradient_kernel<T, O, true, Mode> : divergence_gradient_kernel<T, O, false, Mode>;
}

// Ranges are of acc, and results lie on them.
template <class T, class O, class Params>
Kernel<Params> instantiation(const Params& p, bool) {
  if (!tile_of(p).ranges) return instantiation_of<T, O, Rows::twice>(p);
  if constexpr (std::is_same_v<T, acc_of<T>> && std::is_same_v<T, O>) return instantiation_of<T, O, Rows::ranges>(p);
  return nullptr;
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
  const Dtype in = tile_of(p).values.dtype, out = result_of(p).dtype;
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
  const Tile& tile = tile_of(p);
  const Matrix& values = tile.values;
  if (values.rows == 0 || values.columns == 0) return nullptr;
  const OnDevice device(launch.device);
  if (device.error != cudaSuccess) {
    return failure("%s kernel: device %d: %s", name, launch.device, cudaGetErrorString(device.error));
  }
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, launch.device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, launch.device);
  const int capability = 10 * major + minor;
  const int size = size_of(values.dtype);
  const Limits of_two = {scratch_of_two_tiles(size), kMostThreadsOfTwoTiles, threads_of_two_tiles(values.columns, size)};
  int scratch = kScratchBytes;
  if constexpr (std::is_same_v<Params, StatisticsParams>) scratch = p.squares ? kScratchBytesOfSquares : scratch;
  const Limits of_one = {scratch, most_threads(size), 0};
  const Limits& limits = of_two_tiles<Params> ? of_two : of_one;
  CudaLaunch wanted = launch;
  if (visits == 1) wanted.variant = 1;
  while (true) {
    Shape shape;
    if (const char* wrong = shape_of(tile, size, wanted, visits, limits, capability, shape)) {
      return failure("%s kernel: %s", name, wrong);
    }
    const auto kernel = kernel_for(p, shape.kept);
    if (!kernel) {
      return failure("%s kernel: no result of dtype %d from a tile of dtype %d", name, int(result_of(p).dtype), int(values.dtype));
    }
    const cudaError_t error = start(kernel, p, values.rows * shape.cluster, shape, capability, launch.stream);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // or the next check of anybody would meet it again
    // A part of a GPU may be too small for a cluster. Two reads give the same bits.
    const bool no_room = error == cudaErrorInvalidClusterSize || error == cudaErrorLaunchOutOfResources;
    if (wanted.variant != 0 || !shape.kept || !no_room) return failure("%s kernel: %s", name, cudaGetErrorString(error));
    wanted.variant = 1;
  }
}

template <class T>
Kernel<PairLogitsParams> instantiation(const PairLogitsParams&, bool aligned) {
  return aligned ? pair_logits_kernel<T, true> : pair_logits_kernel<T, false>;
}

template <class T>
Kernel<PairSumsParams> instantiation(const PairSumsParams& p, bool aligned) {
  using A = acc_of<T>;
  if (p.out.dtype == p.source.dtype) return aligned ? pair_sums_kernel<T, T, true> : pair_sums_kernel<T, T, false>;
  return aligned ? pair_sums_kernel<T, A, true> : pair_sums_kernel<T, A, false>;
}

bool is_aligned(const Matrix& m) {
  const int64_t size = size_of(m.dtype);
  const bool begins = reinterpret_cast<uintptr_t>(m.data) % kUnitBytes == 0;
  return begins && m.row_stride * size % kUnitBytes == 0 && m.columns * size % kUnitBytes == 0;
}

// `per_row` and `per_id` are the matrices that rows and ids are of.
template <class Params>
const char* run_pairs(const char* name, const Params& p, const Matrix& per_row, const Matrix& per_id, int64_t blocks, Shape shape,
                      const CudaLaunch& launch) {
  if (p.pairs.count == 0) return nullptr;
  if (blocks > INT32_MAX || per_row.rows > INT32_MAX || per_id.rows > INT32_MAX || per_id.columns > INT32_MAX / 2) {
    return failure("%s kernel: %lld rows with pairs, or of %lld ids, or %lld columns are too many", name, (long long)p.pairs.count,
                   (long long)per_id.rows, (long long)per_id.columns);
  }
  if (launch.threads) shape.threads = launch.threads;
  if (shape.threads < 32 || shape.threads > kMostPairThreads || shape.threads % 32) {
    return failure("%s kernel: threads must be a multiple of 32 up to %d, got %d", name, kMostPairThreads, shape.threads);
  }
  const OnDevice device(launch.device);
  if (device.error != cudaSuccess) {
    return failure("%s kernel: device %d: %s", name, launch.device, cudaGetErrorString(device.error));
  }
  const bool aligned = is_aligned(per_row) && is_aligned(per_id);
  const Dtype dtype = per_id.dtype;
  const auto kernel = dtype == Dtype::bfloat16  ? instantiation<__nv_bfloat16>(p, aligned)
                      : dtype == Dtype::float16 ? instantiation<__half>(p, aligned)
                      : dtype == Dtype::float32 ? instantiation<float>(p, aligned)
                                                : instantiation<double>(p, aligned);
  const cudaError_t error = start(kernel, p, blocks, shape, 0, launch.stream);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next check of anybody would meet it again
  return failure("%s kernel: %s", name, cudaGetErrorString(error));
}

}  // namespace

extern "C" {

const char* grpo_cuda_statistics(const StatisticsParams* params, const CudaLaunch* launch) {
  return run("statistics", *params, *launch, 1);
}

const char* grpo_cuda_close(const CloseParams* params, const CudaLaunch* launch) {
  if (params->rows == 0) return nullptr;
  const int64_t blocks = (params->rows + kThreadsOfClose / 32 - 1) / (kThreadsOfClose / 32);
  if (blocks > INT32_MAX) return failure("close kernel: %lld rows are too many", (long long)params->rows);
  const OnDevice device(launch->device);
  if (device.error != cudaSuccess) {
    return failure("close kernel: device %d: %s", launch->device, cudaGetErrorString(device.error));
  }
  const bool wide = params->dtype == Dtype::float64;
  const auto kernel = params->squared ? (wide ? close_kernel<double, true> : close_kernel<float, true>)
                                      : (wide ? close_kernel<double, false> : close_kernel<float, false>);
  const cudaError_t error = start(kernel, *params, blocks, {false, 1, kThreadsOfClose, 0}, 0, launch->stream);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next check of anybody would meet it again
  return failure("close kernel: %s", cudaGetErrorString(error));
}

const char* grpo_cuda_gradient(const GradientParams* params, const CudaLaunch* launch) {
  return run("gradient", *params, *launch, 1);
}

const char* grpo_cuda_policy(const PolicyParams* params, const CudaLaunch* launch) { return run("policy", *params, *launch, 2); }

const char* grpo_cuda_divergence_statistics(const ComparisonParams* params, const CudaLaunch* launch) {
  return run("divergence_statistics", *params, *launch, 1);
}

const char* grpo_cuda_jensen_shannon(const JensenShannonParams* params, const CudaLaunch* launch) {
  return run("jensen_shannon", *params, *launch, 1);
}

const char* grpo_cuda_divergence_gradient(const DivergenceGradientParams* params, const CudaLaunch* launch) {
  return run("divergence_gradient", *params, *launch, 1);
}

const char* grpo_cuda_pair_logits(const PairLogitsParams* params, const CudaLaunch* launch) {
  const int64_t rows = params->pairs.count;
  const int64_t blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock * blocks_of_rows(rows);
  return run_pairs("pair_logits", *params, params->hidden, params->weight, blocks, {false, 1, kLogitsThreads, 0}, *launch);
}

const char* grpo_cuda_pair_sums(const PairSumsParams* params, const CudaLaunch* launch) {
  const int64_t rows = params->pairs.count, of_block = rows_of_block(rows);
  const int64_t pieces = pieces_of_sum(params->source.columns, size_of(params->source.dtype));
  return run_pairs("pair_sums", *params, params->out, params->source, (rows + of_block - 1) / of_block * pieces,
                   {false, 1, kSumsThreads, kSumsSharedBytes}, *launch);
}

#ifndef GRPO_SOURCES
#define GRPO_SOURCES ""
#endif
const char* grpo_cuda_sources() { return GRPO_SOURCES; }

const char* grpo_cuda_probe() {
  cudaFuncAttributes attributes;
  const void* kernel = reinterpret_cast<const void*>(gradient_kernel<float, float, true, Rows::twice>);
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return failure("%s", cudaGetErrorString(error));
}
}

}  // namespace grpo_kernels
