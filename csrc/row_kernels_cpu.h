// The CPU kernels of one instruction set. row_kernels_cpu.cpp defines one such table each time it is compiled, named GK_ISA.
#pragma once

#include "params.h"

namespace grpo_kernels {

struct RowKernels {
  void (*statistics)(const StatisticsParams&, int threads);
  void (*close)(const CloseParams&, int threads);
  void (*gradient)(const GradientParams&, int threads);
  void (*policy)(const PolicyParams&, int threads);
  void (*transpose)(const TransposeParams&, int threads);
  void (*pair_logits)(const PairLogitsParams&, int threads);
  void (*pair_sums)(const PairSumsParams&, int threads);
  void (*divergence_statistics)(const ComparisonParams&, int threads);
  void (*jensen_shannon)(const JensenShannonParams&, int threads);
  void (*divergence_gradient)(const DivergenceGradientParams&, int threads);
  void (*divergence)(const DivergenceParams&, int threads);
};

}  // namespace grpo_kernels
