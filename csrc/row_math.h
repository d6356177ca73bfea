// The mathematics of one row on scalars: folding statistics, closing them, the coefficient of the policy and KL terms, and what of a
// row its gradient needs. The only place in C++ where the formulas stand; host and device code share it.
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

template <class T>
GRPO_HD T* row_of(const Matrix& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.row_stride;  // passes 2^31 at 14k rows of 152k
}

template <class A>
GRPO_HD A value(const void* vector, int64_t row) {  // 0 where it is absent
  return vector ? static_cast<const A*>(vector)[row] : A(0);
}

// Factors of one row's z: slope * (raw + bias), or cap * tanh(share_slope * (raw + bias)). Divided in `Wide`.
template <class S, class Wide = S>
struct RowTransform {
  S slope;             // logit_scale / temperature
  S cap, share_slope;  // softcap / temperature, 0 without a softcap; logit_scale / softcap
  const S* bias;       // or null

  GRPO_HD RowTransform(const Tile& tile, int64_t row) : bias(static_cast<const S*>(tile.bias)) {
    const Transform& t = tile.transform;
    const Wide temperature = tile.temperature ? Wide(value<S>(tile.temperature, row)) : Wide(t.temperature);
    slope = S(Wide(t.logit_scale) / temperature);
    cap = S(Wide(t.softcap) / temperature);
    share_slope = S(Wide(t.logit_scale) / Wide(t.softcap));
  }
};

// A column block's part of a row. `others` leaves out the target's column, so that p near 1 loses no digits.
template <class S>
struct RowStatistics {
  S max = -infinity<S>();
  S others = 0;                // sum of exp(z - max) over all columns but the target
  S moment = 0;                // sum of (z - max) exp(z - max) over all columns
  S target = -infinity<S>();  // the target's z; -inf while not met
};

// With one sum more, from which that of p^2 comes. Near p = 1 it leaves out the target for what the others add to it: 1 - 2 p + sum
// of all p^2 is (1 - p)^2 + sum of the others' p^2, and beside p^2 these would have no digit left.
template <class S>
struct RowSquares : RowStatistics<S> {
  S squares = 0;  // sum of exp(2 (z - max)) over all columns but the target
};

template <class Statistics>
constexpr bool has_squares = false;
template <class S>
constexpr bool has_squares<RowSquares<S>> = true;

// The same in another type.
template <class S, class F>
GRPO_HD RowStatistics<S> as(const RowStatistics<F>& s) {
  return {S(s.max), S(s.others), S(s.moment), S(s.target)};
}
template <class S, class F>
GRPO_HD RowSquares<S> as(const RowSquares<F>& s) {
  return {as<S>(static_cast<const RowStatistics<F>&>(s)), S(s.squares)};
}

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

template <class S>
GRPO_HD void raise_max(RowSquares<S>& s, S max) {
  const S before = s.max;
  raise_max(static_cast<RowStatistics<S>&>(s), max);
  if (s.max != before && before != -infinity<S>()) {
    const S factor = std::exp(before - s.max);
    s.squares *= factor * factor;
  }
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

template <class S>
GRPO_HD RowSquares<S> merged(RowSquares<S> a, RowSquares<S> b) {
  raise_max(a, b.max);
  raise_max(b, a.max);
  return {merged<S>(static_cast<RowStatistics<S>&>(a), static_cast<RowStatistics<S>&>(b)), a.squares + b.squares};
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

// Sum of p^2 over all columns but the target.
template <class S>
GRPO_HD S squared_probs(const RowSquares<S>& s) {
  const S sum = total(s);
  return s.squares / (sum * sum);
}

// Into vectors of `A`.
template <class A, class S>
GRPO_HD void write(const Scored& scored, int64_t row, const RowResult<S>& result) {
  static_cast<A*>(scored.logps)[row] = A(result.logps);
  static_cast<A*>(scored.lse)[row] = A(result.lse);
  static_cast<A*>(scored.entropy)[row] = A(result.entropy);
}

template <class S>
GRPO_HD S clamp_exponent(S x) {  // nan stays nan
  return x > S(80) ? S(80) : x < S(-80) ? S(-80) : x;
}

// d / d logps of the policy term of losses/terms.py at ratio w = exp(logps - old). The derivative of w is w itself, its clamp passing.
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

// c = d loss / d logps of one row, whose vectors are in `A`.
template <class A, class S>
GRPO_HD S policy_coefficient(const PolicyParams& p, int64_t row, S logps) {
  const PolicyRows& rows = p.rows;
  const S w = rows.old ? std::exp(clamp_exponent(logps - S(value<A>(rows.old, row)))) : S(1);
  S c = S(value<A>(rows.w_policy, row));
  if (p.terms.kind != PolicyKind::linear) c *= policy_slope(p.terms, w, S(value<A>(rows.advantages, row)));
  if (rows.ref) {
    const S r = S(value<A>(rows.ref, row)) - logps;
    // d (w k3) = w (1 - e) + w (e - r - 1), where e cancels
    c += S(value<A>(rows.w_kl, row)) * (p.terms.use_bias_correction_kl ? -w * r : -std::expm1(clamp_exponent(r)));
  }
  return c;
}

// Below this, exp is 0; and 0 times it is not nan, as 0 times -inf is.
template <class S>
GRPO_HD S above_nothing(S x) {
  return std::fmax(x, S(-1e4));
}

// 1 - tanh(u)^2 without its cancellation
template <class S>
GRPO_HD S tanh_slope(S u) {
  const S q = std::exp(S(-2) * std::fabs(u));
  return S(4) * q / ((S(1) + q) * (S(1) + q));
}

// What a second visit writes in one row: (g (onehot - p) - g_entropy p (log p + entropy)) dz / d raw, p = exp(z - shift - log_sum).
template <class S>
struct RowGradient {
  bool idle;            // nothing but zeros
  bool capped;          // times the derivative of the softcap
  S shift, log_sum, entropy;
  // These with the factor logit_scale / temperature, before the softcap's derivative:
  S weight;     // of exp(z - shift)
  S g_entropy;  // of p (log p + entropy)
  S at_target;  // the target's result: p near 1 has no digits left for 1 - p

  template <class Factors>
  GRPO_HD RowGradient(const Factors& transform, S g, S g_of_entropy, S shift, S log_sum, S logps, S entropy)
      : idle(g == S(0) && g_of_entropy == S(0)), capped(transform.cap != 0), shift(shift), log_sum(log_sum), entropy(entropy) {
    const S factor = S(transform.slope);
    weight = -g * factor * std::exp(-log_sum);
    g_entropy = g_of_entropy * factor;
    at_target = -g * factor * std::expm1(logps);
    if (g_entropy != S(0)) at_target -= g_entropy * std::exp(logps) * (above_nothing(logps) + entropy);
  }
};

}  // namespace
}  // namespace grpo_kernels
