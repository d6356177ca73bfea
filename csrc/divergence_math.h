// The mathematics of one row and one element of two tiles, a student's logits z and a teacher's y; see grpo_kernels/backends/comparison.py
// for why it is summed so. The only place in C++ where the scalar formulas stand; host and device code share it.
#pragma once

#include "row_math.h"

namespace grpo_kernels {
namespace {

template <class S>
constexpr double kNear = 0.125;  // |x| below which bend is a series

// (exp(-x) - 1 + x) / x^2 for |x| < kNear, up to 1e-8 (float) or 1e-16 of itself.
template <class S>
GRPO_HD S bend_series(S x) {
  constexpr int kTerms = sizeof(S) == 8 ? 10 : 5;
  constexpr double kInverseFactorial[10] = {1.0 / 2,    1.0 / 6,     1.0 / 24,     1.0 / 120,     1.0 / 720,
                                            1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800};
  S sum = 0;
#pragma unroll
  for (int n = kTerms - 1; n >= 0; n--) sum = S(kInverseFactorial[n]) - sum * x;
  return sum;
}

// weight (exp(-x) - 1 + x), given other = weight exp(-x): not by its cancelling terms near 0; other where the weight is 0.
template <class S>
GRPO_HD S bend(S x, S weight, S other) {
  if (weight == S(0)) return other;
  if (std::fabs(x) < S(kNear<S>)) return weight * x * x * bend_series(x);
  return other - weight + weight * x;
}

// A column block's part of a row of both tiles. weight = exp(z - max z), x = (z - max z) - (y - max y); for forward_kl z and y are
// exchanged in both.
template <class S>
struct RowComparison {
  RowStatistics<S> student;
  S teacher_max = -infinity<S>();
  S teacher_sum = 0;  // of exp(y - max y)
  S tilt = 0;         // sum of weight x
  S bent = 0;         // sum of weight bend(x)
};

// 0 for what was nothing so far.
template <class S>
GRPO_HD S drop_factor(S own, S max) {
  return own == -infinity<S>() ? S(0) : std::exp(own - max);
}

// Restates the sums relative to max(own, given) of both.
template <class S>
GRPO_HD void raise_max(RowComparison<S>& s, S max_z, S max_y, bool forward) {
  max_z = max_z > s.student.max ? max_z : s.student.max;
  max_y = max_y > s.teacher_max ? max_y : s.teacher_max;
  if (max_z == s.student.max && max_y == s.teacher_max) return;
  const S drop_z = s.student.max - max_z, drop_y = s.teacher_max - max_y;
  const S factor_z = drop_factor(s.student.max, max_z), factor_y = drop_factor(s.teacher_max, max_y);
  const S factor = forward ? factor_y : factor_z, other = forward ? factor_z : factor_y;
  const S weight = forward ? s.teacher_sum : total(s.student);
  if (s.bent == infinity<S>()) {
    s.tilt = s.tilt * (factor == S(0) ? S(0) : factor);  // the divergence is infinite and stays so
  } else if (weight == S(0)) {
    s.bent *= other;
  } else {
    const S t = forward ? drop_y - drop_z : drop_z - drop_y;  // what is added to x
    const S bent_t = bend(t, factor, other), slant = factor == S(0) ? S(0) : factor * t;
    s.bent = other * s.bent + bent_t * weight - (bent_t - slant) * s.tilt;
    s.tilt = factor * s.tilt + slant * weight;
  }
  s.teacher_sum *= factor_y;
  s.teacher_max = max_y;
  raise_max(s.student, max_z);
}

// The statistics of two sets of columns without a common one.
template <class S>
GRPO_HD RowComparison<S> merged(RowComparison<S> a, RowComparison<S> b, bool forward) {
  raise_max(a, b.student.max, b.teacher_max, forward);
  raise_max(b, a.student.max, a.teacher_max, forward);
  return {merged(a.student, b.student), a.teacher_max, a.teacher_sum + b.teacher_sum, a.tilt + b.tilt, a.bent + b.bent};
}

template <class S>
struct RowCompared {
  S gap, own, value;
};

// As `compare` of comparison.py; own and value of jsd are for jensen_shannon to sum. In double: a term of bend cancels another here.
GRPO_HD RowCompared<double> compare(const RowComparison<double>& s, DivergenceKind kind) {
  const bool forward = kind == DivergenceKind::forward_kl;
  const double sum_z = total(s.student), weight = forward ? s.teacher_sum : sum_z, other = forward ? sum_z : s.teacher_sum;
  const double difference = (s.bent - s.tilt) / weight;
  const bool near = std::fabs(difference) < 0.5;
  // bent - tilt cancels where both are large, of distributions far apart
  const double eta = s.bent + std::fabs(s.tilt) < 0.5 * weight ? -std::log1p(difference) : std::log(weight / other);
  double value = near ? s.bent / weight - bend(eta, 1.0, std::exp(-eta)) : s.tilt / weight - eta;
  value = s.bent == infinity<double>() ? s.bent : value < 0 ? 0 : value;
  return {s.student.max - s.teacher_max + (forward ? -eta : eta), value, value};
}

// log p - log m and log q - log m at d = log p - log q, m = (1 - beta) p + beta q. No argument of exp is positive.
template <class S>
struct ToMixture {
  S of_p, of_q;

  GRPO_HD ToMixture(S d, S beta) {
    if (d >= S(0)) {
      of_p = -std::log1p(beta * std::expm1(-d));
      of_q = of_p - d;
    } else {  // nan too
      of_q = -std::log1p((S(1) - beta) * std::expm1(d));
      of_p = of_q + d;
    }
  }
};

// Of one element: its part of KL(p || m), and of KL(q || m).
template <class S>
GRPO_HD void add_jensen_shannon(S p, S q, S d, S beta, S& of_p, S& of_q) {
  const ToMixture<S> to(d, beta);
  of_p += bend(to.of_p, p, p + beta * (q - p));
  of_q += bend(to.of_q, q, q + (S(1) - beta) * (p - q));
}

// d divergence / d z of one element. `own` as of Compared.
template <class S>
GRPO_HD S divergence_slope(DivergenceKind kind, S p, S q, S d, S own, S beta) {
  if (kind == DivergenceKind::forward_kl) return std::fabs(d) < S(kNear<S>) ? p * d - bend(d, p, q) : p - q;  // p (1 - exp(-d))
  if (p == S(0)) return S(0);
  if (kind == DivergenceKind::reverse_kl) return p * (d - own);
  return (S(1) - beta) * p * (ToMixture<S>(d, beta).of_p - own);
}

}  // namespace
}  // namespace grpo_kernels
