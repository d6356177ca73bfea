// The mathematics of one element on scalars: what a raw logit counts in its row's statistics, and what the second visit makes
// of it. Beside row_math.h, for kernels whose lanes are scalars.
#pragma once

#include "row_math.h"

namespace grpo_kernels {
namespace {

// exp of a difference of logits. The hardware's exponential is off by |x| 2^-23 at most: so much did rounding x cost before.
GRPO_HD float exp_of_difference(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}
GRPO_HD double exp_of_difference(double x) { return std::exp(x); }

// z of a raw logit, of one row. `Plain`: neither bias nor softcap.
template <class S, bool Plain>
struct ElementTransform : RowTransform<S> {
  using RowTransform<S>::RowTransform;

  // The argument of the softcap's tanh.
  GRPO_HD S share(S raw, int column) const { return (this->bias ? raw + this->bias[column] : raw) * this->share_slope; }

  GRPO_HD S operator()(S raw, int column) const {
    if (Plain) return raw * this->slope;
    if (this->cap == S(0)) return (this->bias ? raw + this->bias[column] : raw) * this->slope;
    return this->cap * std::tanh(share(raw, column));
  }
};

// N neighbours of z folded into a row's statistics; -inf counts nothing.
template <class S, int N>
GRPO_HD void fold(RowStatistics<S>& s, const S (&z)[N]) {
  S top = z[0];
#pragma unroll
  for (int j = 1; j < N; j++) top = std::fmax(top, z[j]);
  raise_max(s, top);
  const S shift = finite(s.max);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const S x = z[j] - shift, e = exp_of_difference(x);
    s.others += e;
    s.moment += above_nothing(x) * e;
  }
}

// What the second visit of a row writes.
template <class S, bool Plain>
struct ElementResult {
  ElementTransform<S, Plain> transform;
  RowGradient<S> d;
  int target;  // column, or -1
  S inv_sum;

  GRPO_HD ElementResult(const ElementTransform<S, Plain>& transform, const RowGradient<S>& d, int target)
      : transform(transform), d(d), target(target), inv_sum(std::exp(-d.log_sum)) {}

  GRPO_HD S operator()(S x, int column) const {
    const bool here = column == target;
    if (Plain) return here ? d.at_target : d.weight * exp_of_difference(transform(x, column) - d.shift);
    const S difference = transform(x, column) - d.shift, e = exp_of_difference(difference);
    S result = here ? d.at_target : d.weight * e;
    if (d.g_entropy != S(0) && !here) result -= d.g_entropy * (e * inv_sum * (above_nothing(difference - d.log_sum) + d.entropy));
    return d.capped ? result * tanh_slope(transform.share(x, column)) : result;
  }
};

}  // namespace
}  // namespace grpo_kernels
