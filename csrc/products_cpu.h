// Products of matrices on the CPU whose bits depend on nothing but the numbers. products_cpu.cpp defines one such function each
// time it is compiled, named GK_ISA.
#pragma once

#include "params.h"

namespace grpo_kernels {

using Product = void (*)(const ProductParams&, int threads);

namespace products {
extern const Product baseline;
#ifdef GRPO_KERNELS_X86_VARIANTS
extern const Product avx2;
extern const Product avx512;
#endif
#ifdef GRPO_KERNELS_AMX
extern const Product amx;
#endif
}  // namespace products

#ifdef GRPO_KERNELS_AMX
bool amx_usable();  // whether processor and system have bfloat16 tiles; asks the system for them
#endif

}  // namespace grpo_kernels
