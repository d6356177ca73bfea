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

// Below this, exp is 0; and 0 times it is not nan, as 0 times -inf is.
template <class S>
GRPO_HD S above_nothing(S x) {
  return std::fmax(x, S(-1e4));
}

// z of a raw logit, of one row. `Plain`: neither bias nor softcap.
template <class S, bool Plain>
struct ElementTransform {
  S slope;  // logit_scale / temperature: z = slope * raw where Plain
  S softcap, temperature, cap, share_slope;
  const S* bias;

  GRPO_HD ElementTransform(const Transform& t, int64_t row)
      : softcap(S(t.softcap)), bias(static_cast<const S*>(t.bias)) {
    temperature = t.row_temperature ? static_cast<const S*>(t.row_temperature)[row] : S(t.temperature);
    slope = S(t.logit_scale) / temperature;
    cap = softcap / temperature;
    share_slope = S(t.logit_scale) / softcap;
  }

  // The argument of the softcap's tanh.
  GRPO_HD S share(S raw, int column) const { return (bias ? raw + bias[column] : raw) * share_slope; }

  GRPO_HD S operator()(S raw, int column) const {
    if (Plain) return raw * slope;
    if (softcap == S(0)) return (bias ? raw + bias[column] : raw) * slope;
    return cap * std::tanh(share(raw, column));
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

enum class Source { logits, probs };

// What the second visit of a row writes: dz, or p. exp(z - shift) = p exp(log_sum); a stash holds p itself.
template <class S, bool Plain, Source From>
struct ElementResult {
  ElementTransform<S, Plain> transform;
  int target;          // column, or -1
  S weight;            // of exp(z - shift), or of p
  S at_target;         // what stands in the target's column before the entropy and the softcap
  S shift, log_sum, inv_sum;
  S g_entropy;         // with the factor logit_scale / temperature
  S entropy, logps;
  bool capped;         // times the derivative of the softcap

  // dz from d loss / d logps and d loss / d entropy. `log_sum`: lse - shift.
  GRPO_HD static ElementResult gradient(const ElementTransform<S, Plain>& transform, int target, S g, S g_entropy, S shift,
                                        S log_sum, S logps, S entropy) {
    const S rows_g = g * transform.slope;
    const S inv_sum = From == Source::probs ? S(1) : std::exp(-log_sum);
    return {transform, target, -rows_g * inv_sum, -rows_g * std::expm1(logps), shift, log_sum, inv_sum,
            g_entropy * transform.slope, entropy, logps, transform.softcap != S(0)};
  }

  // p of a whole row
  GRPO_HD static ElementResult softmax(const ElementTransform<S, Plain>& transform, const RowStatistics<S>& s) {
    return {transform, -1, S(1) / total(s), S(0), s.max, S(0), S(1), S(0), S(0), S(0), false};
  }

  GRPO_HD S operator()(S x, int column) const {
    if (Plain) {
      const S e = From == Source::probs ? x : exp_of_difference(transform(x, column) - shift);
      return column == target ? at_target : weight * e;
    }
    const bool here = column == target;
    S e = x, log_p = S(0), slope = S(1);
    if (From == Source::logits) {
      const S d = transform(x, column) - shift;
      e = exp_of_difference(d);
      log_p = d - log_sum;
      if (capped) {
        const S q = std::exp(S(-2) * std::fabs(transform.share(x, column)));
        slope = S(4) * q / ((S(1) + q) * (S(1) + q));  // 1 - tanh^2 without its cancellation
      }
    } else {
      log_p = here ? logps : std::log(x);
      if (capped) {
        const S share = transform.temperature * (log_p + (shift + log_sum)) / transform.softcap;
        slope = std::fmax(S(1) - share * share, S(0));
      }
    }
    S result = here ? at_target : weight * e;
    if (g_entropy != S(0)) {
      result -= g_entropy * (e * inv_sum * (above_nothing(log_p) + entropy));
    }
    return result * slope;
  }
};

}  // namespace
}  // namespace grpo_kernels
