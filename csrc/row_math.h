// The mathematics of one row on scalars: folding statistics, closing them, and the coefficient of the policy and KL terms.
// The only place in C++ where the formulas stand; includes nothing of a framework, so that host and device code share it.
#pragma once

#include <cmath>
#include <cstdint>

#include "params.h"

#ifdef __CUDACC__
#define GRPO_HD __host__ __device__ __forceinline__
#else
#define GRPO_HD inline
#endif

namespace grpo_kernels {
// Unnamed: variants of one kernel built for different instruction sets must not share a function through the linker.
namespace {

template <class S>
GRPO_HD S infinity() {
  return S(INFINITY);
}

// A column block's part of a row. `others` leaves out the target's column, so that p near 1 loses no digits.
template <class S>
struct RowStatistics {
  S max = -infinity<S>();
  S others = 0;                // sum of exp(z - max) over all columns but the target
  S moment = 0;                // sum of (z - max) exp(z - max) over all columns
  S target = -infinity<S>();  // the target's z; -inf while not met
};

// Sum of exp(z - max) over all columns.
template <class S>
GRPO_HD S total(const RowStatistics<S>& s) {
  return s.target == -infinity<S>() ? s.others : s.others + std::exp(s.target - s.max);
}

// Restates the sums relative to max(s.max, max). An empty or all -inf row has no sums to restate: exp(-inf - -inf) is nan.
template <class S>
GRPO_HD void raise_max(RowStatistics<S>& s, S max) {
  if (!(max > s.max)) return;
  if (s.max != -infinity<S>()) {
    const S shift = s.max - max, factor = std::exp(shift), sum = total(s);
    s.others *= factor;
    s.moment = factor == S(0) ? S(0) : factor * (s.moment + shift * sum);
  }
  s.max = max;
}

// 0 for the maximum of nothing: -inf - -inf is nan.
template <class S>
GRPO_HD S finite(S max) {
  return max == -infinity<S>() ? S(0) : max;
}

// The statistics of two sets of columns without a common one. Which of them comes first changes no bit.
template <class S>
GRPO_HD RowStatistics<S> merged(RowStatistics<S> a, RowStatistics<S> b) {
  raise_max(a, b.max);
  raise_max(b, a.max);
  return {a.max, a.others + b.others, a.moment + b.moment, b.target == -infinity<S>() ? a.target : b.target};
}

// Adds the target's z to statistics that have met every other column; -inf: it is not among them.
template <class S>
GRPO_HD void add_target(RowStatistics<S>& s, S z) {
  raise_max(s, z);
  const S x = z - s.max;
  if (z != -infinity<S>()) s.moment += x * std::exp(x);
  s.target = z;
}

template <class S>
struct RowResult {
  S lse;      // log sum exp(z)
  S log_sum;  // lse - max, exact where logits share a large offset
  S logps;    // log p of the target
  S entropy;
};

template <class S>
GRPO_HD RowResult<S> close(const RowStatistics<S>& s) {
  const S x = (s.max - s.target) + std::log(s.others);  // lse of the others - z of the target
  const S softplus = (x > S(0) ? x : S(0)) + std::log1p(std::exp(-std::fabs(x)));
  const S sum = total(s), log_sum = std::log(sum);
  return {s.max + log_sum, log_sum, -softplus, log_sum - s.moment / sum};
}

template <class S>
GRPO_HD S clamp_exponent(S x) {  // nan stays nan
  return x > S(80) ? S(80) : x < S(-80) ? S(-80) : x;
}

// d s / d logps of math.md's table at ratio w = exp(logps - old). The derivative of w is w itself, its clamp passing.
template <class S>
GRPO_HD S policy_slope(const PolicyTerms& t, S w, S advantage) {
  if (w != w || advantage != advantage) return w + advantage;
  if (advantage == S(0)) return S(0);
  if (t.kind == PolicyKind::clipped) {
    // Below the lower and above the upper bound one branch is constant; which of the two is the minimum decides by sign.
    const S low = S(1 - t.epsilon_low), high = S(1 + t.epsilon_high), delta = S(t.delta);
    const bool passes = advantage > S(0) ? w <= (high < delta ? high : delta) : w >= low && w <= (high > delta ? high : delta);
    return passes ? -advantage * w : S(0);
  }
  if (t.kind == PolicyKind::cispo) {
    const S cap = S(t.epsilon_high);
    return -(w < cap ? w : cap) * advantage;
  }
  // sapo: -4 / tau * sigmoid(tau (w - 1)) A; sigmoid' = e / (1 + e)^2 does not overflow with e = exp(-|x|)
  const S tau = advantage > S(0) ? S(t.sapo_temperature_pos) : S(t.sapo_temperature_neg);
  const S e = std::exp(-std::fabs(tau * (w - S(1))));
  return S(-4) * (e / ((S(1) + e) * (S(1) + e))) * w * advantage;
}

// The inputs of one row's objective; absent weights are 0.
template <class S>
struct PolicyRow {
  bool has_old, has_ref;
  S old, ref, advantage, w_policy, w_kl;
};

// c = d loss / d logps of one row.
template <class S>
GRPO_HD S policy_coefficient(const PolicyTerms& t, const PolicyRow<S>& row, S logps) {
  const S w = row.has_old ? std::exp(clamp_exponent(logps - row.old)) : S(1);
  S c = t.kind == PolicyKind::linear ? row.w_policy : row.w_policy * policy_slope(t, w, row.advantage);
  if (row.has_ref) {
    const S r = row.ref - logps;
    // d (w k3) = w (1 - e) + w (e - r - 1), where e cancels
    c += row.w_kl * (t.use_bias_correction_kl ? -w * r : -std::expm1(clamp_exponent(r)));
  }
  return c;
}

}  // namespace
}  // namespace grpo_kernels
