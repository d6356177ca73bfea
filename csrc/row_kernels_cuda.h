// The row and pair kernels on CUDA: launchers with a plain C interface, no framework.
//
// Tiles are float32, bfloat16, float16 or float64; results have the tile's dtype, or bfloat16 or float16 from a float32 tile. All
// pointers are the device's. A launcher returns nullptr, or what went wrong; the text is the calling thread's until its next call.
#pragma once

#include "params.h"

#ifdef _WIN32
#define GRPO_API __declspec(dllexport)
#else
#define GRPO_API __attribute__((visibility("default")))
#endif

namespace grpo_kernels {

// Where a kernel runs and in what shape. Zeros are filled in by a pure function of tile and device.
struct CudaLaunch {
  int device;
  void* stream;  // cudaStream_t
  int variant;   // 0: chosen; 1: two reads of the tile, any device; 2: a cluster of blocks keeps the row, compute capability 9.0 on
  int cluster;   // blocks of a cluster, 0: chosen
  int threads;   // of a block, a multiple of 32; 0: chosen. Pair kernels have this choice alone
};

extern "C" {
GRPO_API const char* grpo_cuda_statistics(const StatisticsParams* params, const CudaLaunch* launch);
GRPO_API const char* grpo_cuda_close(const CloseParams* params, const CudaLaunch* launch);
GRPO_API const char* grpo_cuda_gradient(const GradientParams* params, const CudaLaunch* launch);
GRPO_API const char* grpo_cuda_policy(const PolicyParams* params, const CudaLaunch* launch);
GRPO_API const char* grpo_cuda_divergence_statistics(const ComparisonParams* params, const CudaLaunch* launch);
GRPO_API const char* grpo_cuda_jensen_shannon(const JensenShannonParams* params, const CudaLaunch* launch);
GRPO_API const char* grpo_cuda_divergence_gradient(const DivergenceGradientParams* params, const CudaLaunch* launch);
GRPO_API const char* grpo_cuda_pair_logits(const PairLogitsParams* params, const CudaLaunch* launch);
GRPO_API const char* grpo_cuda_pair_sums(const PairSumsParams* params, const CudaLaunch* launch);

// What the build said the sources were, see build_cuda.py.
GRPO_API const char* grpo_cuda_sources();
// Why no kernel can be launched on the current device, or nullptr: a GPU without code for it, a driver too old.
GRPO_API const char* grpo_cuda_probe();
}

}  // namespace grpo_kernels
