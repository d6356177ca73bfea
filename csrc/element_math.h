// The mathematics of one element on scalars: what a raw logit counts in its row's statistics, and what the second visit makes
// of it. Beside row_math.h, for kernels whose lanes are scalars.
#pragma once

#include <type_traits>

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

// Operations that the compiler leaves apart, and one that is fused: two kernels with one function inlined might else round it
// differently.
GRPO_HD float times(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
GRPO_HD double times(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
GRPO_HD float plus(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
GRPO_HD double plus(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
template <class S>
GRPO_HD S minus(S a, S b) {
  return plus(a, -b);
}
template <class S>
GRPO_HD S fused(S a, S b, S c) {  // a b + c
#ifdef __CUDA_ARCH__
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// z of a raw logit, of one row. `Plain`: neither bias nor softcap.
template <class S, bool Plain>
struct ElementTransform : RowTransform<S> {
  using RowTransform<S>::RowTransform;

  // The argument of the softcap's tanh.
  GRPO_HD S share(S raw, int column) const {
    return times(this->bias ? plus(raw, this->bias[column]) : raw, this->share_slope);
  }

  GRPO_HD S operator()(S raw, int column) const {
    if (Plain) return times(raw, this->slope);
    if (this->cap == S(0)) return times(this->bias ? plus(raw, this->bias[column]) : raw, this->slope);
    return times(this->cap, std::tanh(share(raw, column)));
  }
};

// What a maximum that is no less than `max` makes of sums beside it: factor * others, factor * (moment + drop * sum of all exp).
template <class S>
struct Drop {
  S drop, factor;

  GRPO_HD Drop(S max, S higher) : drop(minus(max, finite(higher))), factor(exp_of_difference(drop)) { drop = above_nothing(drop); }
  GRPO_HD S moment(S moment, S sum) const { return times(factor, fused(drop, sum, moment)); }
};

// exp(z - max) of a target; 0 while it was not met.
template <class S>
GRPO_HD S exp_of_target(const RowStatistics<S>& s) {
  return exp_of_difference(minus(s.target, finite(s.max)));
}

// The sums, which leave out the target, beside another maximum.
template <class S>
GRPO_HD void restate(RowStatistics<S>& s, S max) {
  const Drop<S> to(s.max, max);
  s.moment = to.moment(s.moment, s.others);
  s.others = times(to.factor, s.others);
  s.max = max;
}

template <class S>
GRPO_HD void restate(RowSquares<S>& s, S max) {
  const S factor = exp_of_difference(minus(s.max, finite(max)));
  s.squares = times(times(factor, factor), s.squares);
  restate(static_cast<RowStatistics<S>&>(s), max);
}

// N neighbours of z folded into the statistics of columns without the target; -inf counts nothing.
template <class Statistics, class S, int N>
GRPO_HD void fold(Statistics& s, const S (&z)[N]) {
  S top = z[0];
#pragma unroll
  for (int j = 1; j < N; j++) top = std::fmax(top, z[j]);
  if (top > s.max) restate(s, top);
  const S shift = finite(s.max);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const S x = minus(z[j], shift), e = exp_of_difference(x);
    s.others = plus(s.others, e);
    s.moment = fused(above_nothing(x), e, s.moment);
    if constexpr (has_squares<Statistics>) s.squares = fused(e, e, s.squares);
  }
}

// Adds the target's z, -inf where it is not among the columns.
template <class Statistics, class S>
GRPO_HD void meet_target(Statistics& s, S z) {
  restate(s, std::fmax(s.max, z));
  const S x = minus(z, finite(s.max));
  s.moment = fused(above_nothing(x), exp_of_difference(x), s.moment);
  s.target = z;
}

// What merging a set of columns with those to its left takes, but for the sums of these, which may come later. Nothing merged with
// another set is the other one, to the bit.
template <class S>
struct Merge {
  S max, target;     // of both
  S drop, factor;    // of those to the left
  S seen;            // exp of their target
  S others, moment;  // of the set, beside `max`

  GRPO_HD Merge(S left_max, S left_target, const RowStatistics<S>& s)
      : Merge(left_max, left_target, s, std::fmax(left_max, s.max)) {
    target = s.target == -infinity<S>() ? left_target : s.target;
  }
  // With the maximum of both, which the caller knows; so it does the target.
  GRPO_HD Merge(S left_max, S left_target, const RowStatistics<S>& s, S max)
      : max(max), target(left_target), seen(exp_of_difference(minus(left_target, finite(left_max)))) {
    const Drop<S> left(left_max, max), own(s.max, max);
    drop = left.drop;
    factor = left.factor;
    others = times(own.factor, s.others);
    moment = own.moment(s.moment, plus(s.others, exp_of_target(s)));
  }
};

template <class S>
GRPO_HD void add(RowStatistics<S>& left, const Merge<S>& m) {
  left.moment = fused(m.factor, fused(m.drop, plus(left.others, m.seen), left.moment), m.moment);
  left.others = fused(m.factor, left.others, m.others);
}

template <class S>
struct MergeSquares : Merge<S> {
  S squares;  // of the set, beside `max`

  template <class... Max>
  GRPO_HD MergeSquares(S left_max, S left_target, const RowSquares<S>& s, Max... max) : Merge<S>(left_max, left_target, s, max...) {
    const S factor = exp_of_difference(minus(s.max, finite(this->max)));
    squares = times(times(factor, factor), s.squares);
  }
};

template <class S>
GRPO_HD void add(RowSquares<S>& left, const MergeSquares<S>& m) {
  left.squares = fused(times(m.factor, m.factor), left.squares, m.squares);
  add(static_cast<RowStatistics<S>&>(left), static_cast<const Merge<S>&>(m));
}

template <class Statistics, class S = decltype(Statistics::max)>
using MergeOf = std::conditional_t<has_squares<Statistics>, MergeSquares<S>, Merge<S>>;

// `close` of row_math.h, the same bits in every kernel.
template <class S>
GRPO_HD RowResult<S> closed(const RowStatistics<S>& s) {
  const S x = plus(minus(s.max, s.target), std::log(s.others));
  const S softplus = plus(x > S(0) ? x : S(0), std::log1p(std::exp(-std::fabs(x))));
  const S sum = s.target == -infinity<S>() ? s.others : plus(s.others, std::exp(minus(s.target, s.max))), log_sum = std::log(sum);
  return {plus(s.max, log_sum), log_sum, -softplus, minus(log_sum, s.moment / sum)};
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
    const S difference = minus(transform(x, column), d.shift), e = exp_of_difference(difference);
    S result = here ? d.at_target : times(d.weight, e);
    if (Plain) return result;
    if (d.g_entropy != S(0) && !here) {
      const S p = times(e, inv_sum), log_p = minus(difference, d.log_sum);
      result = fused(-d.g_entropy, times(p, plus(above_nothing(log_p), d.entropy)), result);
    }
    return d.capped ? times(result, tanh_slope(transform.share(x, column))) : result;
  }
};

}  // namespace
}  // namespace grpo_kernels
