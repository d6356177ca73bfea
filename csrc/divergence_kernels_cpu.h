// The row kernels over two tiles on the CPU, a student's logits z and a teacher's y.
//
//   divergence_statistics  reads both once. Per pair of elements: 2 exp, some 20 multiplications and additions.
//   jensen_shannon         reads both once. Per pair: 2 exp, 1 expm1, 1 log1p.
//   divergence_gradient    reads both once and writes one. Per pair: 1 exp (forward_kl 2, jsd 1 more and 1 log1p).
//   divergence             statistics, and a second visit out of the second-level cache that takes no exponential; for jsd a third.
//                          Of rows of 151,936 bf16 on a core of a Xeon with AMX it takes 1.7 times `policy`'s time for reverse_kl,
//                          1.9 for forward_kl, 4 for jsd.
//
// Every row is walked as in rows_cpu.h.
#pragma once

#include <type_traits>

#include "divergence_math.h"
#include "rows_cpu.h"

namespace grpo_kernels {
namespace {

// One row of both tiles.
template <class T>
struct BothRows {
  using A = acc_t<T>;
  const T* z;
  const T* y;
  int64_t columns, target;
  VectorTransform<T> to_z, to_y;
  A ratio;  // of slopes: where it is 1, (z - ratio y) slope is exact of close logits
  bool linear;

  BothRows(const TwoTiles& tiles, int64_t r)
      : columns(Span<T>(tiles.student.values, tiles.student.ranges, r).columns),
        target(tiles.student.target[r]),
        to_z(tiles.student, r),
        to_y(tiles.teacher, r),
        ratio(A(double(to_y.slope) / double(to_z.slope))) {
    z = Span<T>(tiles.student.values, tiles.student.ranges, r).data;
    y = Span<T>(tiles.teacher.values, tiles.teacher.ranges, r).data;
    linear = to_z.linear && to_y.linear && ratio > 0 && ratio < A(INFINITY);
  }

  bool is_plain_at(int64_t first, int64_t n) const { return linear && is_plain(to_z, first, n, target); }
};

// A block of columns of both: raw logits, slope of which is z, or z itself out of a buffer.
template <class E>
struct BothLogits {
  const E* z;
  const E* y;
  acc_t<E> slope_z, slope_y, ratio;
};

template <class A>
struct Buffers {
  static constexpr int64_t kSize = kBlock<A> + 2 * kLanes<A>;
  alignas(64) A z[kSize];
  alignas(64) A y[kSize];
  alignas(64) A derivatives[kSize];  // of the student's softcap
};

// Calls f(first, n, logits, buffers) for every block of columns; buffers is null where logits are raw.
template <class T, class F>
GK_INLINE void for_each_block(const BothRows<T>& row, bool derivatives, F f) {
  using A = acc_t<T>;
  Buffers<A> buffers;
  for (int64_t first = 0; first < row.columns; first += kBlock<T>) {
    const int64_t n = row.columns - first < kBlock<T> ? row.columns - first : kBlock<T>;
    if (row.is_plain_at(first, n)) {
      const BothLogits<T> raw{row.z + first, row.y + first, row.to_z.slope, row.to_y.slope, row.ratio};
      f(first, n, raw, static_cast<Buffers<A>*>(nullptr));
    } else {
      const int64_t padded = fill(row.z, first, n, row.to_z, buffers.z, derivatives ? buffers.derivatives : nullptr);
      fill(row.y, first, n, row.to_y, buffers.y);
      f(first, padded, BothLogits<A>{buffers.z, buffers.y, A(1), A(1), A(1)}, &buffers);
    }
  }
}

// As `bend` of scalars, but for weights of 0.
template <class V>
GK_INLINE V bend_lanes(V x, V weight, V other) {
  using S = std::decay_t<decltype(x[0])>;
  const V square = x * x, near = weight * square * bend_series<S>(x), far = other - weight + weight * x;
  return square < S(kNear<S> * kNear<S>) ? near : far;
}

// What is summed of x beside the exponentials: tilt and bent of RowComparison, in its direction; or only their difference, as bent.
enum class Sums { of_student, of_teacher, difference };

// A block's part of RowComparison.
template <class S>
struct BlockSums {
  double others = 0, moment = 0, teacher = 0, tilt = 0, bent = 0;
  S top_z = -S(INFINITY), top_y = -S(INFINITY);  // maxima relative to the shifts
};

// Over n columns, n a multiple of two vectors. Leaves the exponentials in `kept`, in the order of load_pair, unless that is null.
// `Careful`: logits may be -inf.
template <Sums kSums, bool kCareful, class E>
BlockSums<acc_t<E>> compare_block(const BothLogits<E>& both, int64_t n, double shift_of_z, double shift_of_y, acc_t<E>* kept_z,
                                  acc_t<E>* kept_y) {
  using A = acc_t<E>;
  using V = vec_t<E>;
  constexpr int L = kLanes<E>;
  const A shift_z = A(shift_of_z), shift_y = A(shift_of_y), apart = A(shift_of_z - shift_of_y);
  const A slope_z = both.slope_z, slope_y = both.slope_y, ratio = both.ratio;
  V others = {}, teacher = {}, bent = {}, moment[2] = {}, tilt[2] = {}, top_z = splat<V>(-A(INFINITY)), top_y = top_z;
  for (int64_t c = 0; c < n; c += 2 * L) {
    V z[2], y[2], ez[2], ey[2], bends[2];
    fetch_ahead(both.z + c);
    fetch_ahead(both.y + c);
    load_pair(both.z + c, z[0], z[1]);
    load_pair(both.y + c, y[0], y[1]);
    for (int i = 0; i < 2; i++) {
      V a = z[i] * slope_z - shift_z, b = y[i] * slope_y - shift_y;
      top_z = vmax(a, top_z);
      top_y = vmax(b, top_y);
      ez[i] = exp_clamping(a);
      ey[i] = exp_clamping(b);
      moment[i] = moment[i] + a * ez[i];
      if constexpr (kSums == Sums::difference) {
        bends[i] = ey[i] - ez[i];
      } else {
        constexpr bool swapped = kSums == Sums::of_teacher;
        const V weight = swapped ? ey[i] : ez[i], other = swapped ? ez[i] : ey[i], difference = z[i] - ratio * y[i];
        V x = swapped ? apart - difference * slope_z : difference * slope_z - apart;
        if (kCareful) x = weight == A(0) ? splat<V>(A(1)) : x;
        tilt[i] = tilt[i] + weight * x;
        bends[i] = bend_lanes(x, weight, other);
      }
      if (kept_z) store(kept_z + c + i * L, ez[i]);
      if (kept_y) store(kept_y + c + i * L, ey[i]);
    }
    others = others + (ez[0] + ez[1]);
    teacher = teacher + (ey[0] + ey[1]);
    bent = bent + (bends[0] + bends[1]);
  }
  BlockSums<A> sums;
  add_lanes(others, sums.others);
  add_lanes(moment[0] + moment[1], sums.moment);
  add_lanes(teacher, sums.teacher);
  add_lanes(tilt[0] + tilt[1], sums.tilt);
  add_lanes(bent, sums.bent);
  sums.top_z = largest(top_z);
  sums.top_y = largest(top_y);
  return sums;
}

// Adds what one column of both counts, the student's target.
template <Sums kSums>
void add_column(RowComparison<double>& s, double z, double y, double& ez, double& ey) {
  const double a = z - finite(s.student.max), b = y - finite(s.teacher_max);
  ez = std::exp(a);
  ey = std::exp(b);
  s.student.target = z;
  if (ez != 0) s.student.moment += a * ez;
  s.teacher_sum += ey;
  if (kSums == Sums::difference) {
    s.bent += ey - ez;
    return;
  }
  const bool swapped = kSums == Sums::of_teacher;
  const double weight = swapped ? ey : ez, x = swapped ? b - a : a - b;
  if (weight != 0) s.tilt += weight * x;
  s.bent += bend(x, weight, swapped ? ez : ey);
}

// Folds a row of both; `kept` of the student and of the teacher, or null.
template <Sums kSums, class T>
void fold_both(const BothRows<T>& row, RowComparison<double>& s, const Kept<acc_t<T>>* kept) {
  using A = acc_t<T>;
  constexpr bool swapped = kSums == Sums::of_teacher;
  for_each_block(row, false, [&](int64_t first, int64_t n, const auto& both, Buffers<A>* buffers) {
    A* keep_z = kept ? kept[0].values + first : nullptr;
    A* keep_y = kept && kept[1].values ? kept[1].values + first : nullptr;
    double shift_z = s.student.max, shift_y = s.teacher_max, ez = 0, ey = 0;
    const auto raise = [&] {
      raise_max(s, double(maximum(both.z, n) * both.slope_z), double(maximum(both.y, n) * both.slope_y), swapped);
    };
    BlockSums<A> sums;
    const auto sum = [&](auto careful) {
      sums = compare_block<kSums, decltype(careful)::value>(both, n, finite(shift_z), finite(shift_y), keep_z, keep_y);
    };
    if (buffers) {
      const int64_t at = row.target - first;
      const bool here = row.target >= first && row.target < first + kBlock<T> && row.target < row.columns;
      raise();
      shift_z = s.student.max;
      shift_y = s.teacher_max;
      double z = 0, y = 0;
      if (here) {
        z = buffers->z[at];
        y = buffers->y[at];
        buffers->z[at] = buffers->y[at] = -A(INFINITY);
      }
      sum(std::true_type());
      if (here) {
        add_column<kSums>(s, z, y, ez, ey);
        if (keep_z) keep_z[at] = A(ez);
        if (keep_y) keep_y[at] = A(ey);
      }
      sums.top_z = sums.top_y = 0;
    } else {
      // As in fold_row: sums relative to the maxima of the blocks before.
      sums.top_z = sums.top_y = A(INFINITY);
      if (shift_z > -INFINITY && shift_y > -INFINITY) sum(std::false_type());
      if (sums.top_z > 4 || sums.top_y > 4) {
        raise();
        shift_z = s.student.max;
        shift_y = s.teacher_max;
        sum(std::false_type());
        sums.top_z = sums.top_y = 0;
      }
      const double found = sums.tilt + sums.bent;
      if (found != found) sum(std::true_type());  // a logit is -inf, if not nan
    }
    s.student.others += sums.others;
    s.student.moment += sums.moment;
    s.teacher_sum += sums.teacher;
    s.tilt += sums.tilt;
    s.bent += sums.bent;
    if (!buffers && (sums.top_z > 0 || sums.top_y > 0)) raise();
    if (keep_z) kept[0].shifts[first / kBlock<T>] = finite(shift_z);
    if (keep_y) kept[1].shifts[first / kBlock<T>] = finite(shift_y);
  });
}

template <class T>
void fold_both(Sums sums, const BothRows<T>& row, RowComparison<double>& s, const Kept<acc_t<T>>* kept) {
  if (sums == Sums::of_student) return fold_both<Sums::of_student>(row, s, kept);
  if (sums == Sums::of_teacher) return fold_both<Sums::of_teacher>(row, s, kept);
  fold_both<Sums::difference>(row, s, kept);
}

// log p - log m and log q - log m at d = log p - log q, as ToMixture of scalars.
GK_INLINE void to_mixture(vfloat d, float beta, vfloat& of_p, vfloat& of_q) {
  const vfloat below = vmin(vfloat{}, d), above = vmax(vfloat{}, d);  // nan if d is
  const vfloat share = d >= 0.0f ? splat<vfloat>(beta) : splat<vfloat>(1.0f - beta);
  const vfloat log_mixed = log1p_of_negative(share * expm1_of_negative(below - above));
  of_p = below - log_mixed;
  of_q = -above - log_mixed;
}
GK_INLINE void to_mixture(vdouble d, double beta, vdouble& of_p, vdouble& of_q) {
  for (int i = 0; i < int(sizeof(vdouble) / sizeof(double)); i++) {
    const ToMixture<double> to(d[i], beta);
    of_p[i] = to.of_p;
    of_q[i] = to.of_q;
  }
}

// What a later visit of a row needs.
struct Visit {
  double shift_z, shift_y;
  double scale_z, scale_y;  // p = scale_z exp(z - shift_z), and q likewise; with the factor of results where those are written
  double gap, own, beta;

  // Of a block: its exponentials that were kept have shifts of their own.
  template <class A>
  Visit at(const Kept<A>* kept, int64_t block) const {
    Visit own_scales = *this;
    if (kept) own_scales.scale_z *= std::exp(kept[0].shifts[block] - shift_z);
    if (kept && kept[1].values) own_scales.scale_y *= std::exp(kept[1].shifts[block] - shift_y);
    return own_scales;
  }
};

// A block's part of KL(p || m) and of the divergence. `Kept`: exponentials are given, and log p - log m takes the teacher's place.
template <bool kKept, class E>
void mix_block(const BothLogits<E>& both, int64_t n, const Visit& row, const acc_t<E>* kept_z, acc_t<E>* kept_y,
               double& own, double& value) {
  using A = acc_t<E>;
  using V = vec_t<E>;
  constexpr int L = kLanes<E>;
  const A slope = both.slope_z, slope_y = both.slope_y, ratio = both.ratio, gap = A(row.gap), beta = A(row.beta);
  const A shift_z = A(row.shift_z), shift_y = A(row.shift_y), scale_z = A(row.scale_z), scale_y = A(row.scale_y);
  V owns = {}, values = {};
  const auto add = [&](V z, V y, int64_t c) __attribute__((always_inline)) {
    V a = z * slope - shift_z, b = y * slope_y - shift_y, to_p, to_q;
    const V p = (kKept ? load(kept_z + c) : exp_clamping(a)) * scale_z, q = (kKept ? load(kept_y + c) : exp_clamping(b)) * scale_y;
    to_mixture((z - ratio * y) * slope - gap, beta, to_p, to_q);
    if (kKept) store(kept_y + c, to_p);
    const V mixed = p + beta * (q - p);
    owns = owns + (p == A(0) ? V{} : p * to_p);
    values = values + (1 - beta) * bend_lanes(p == A(0) ? splat<V>(A(1)) : to_p, p, mixed) +
             beta * bend_lanes(q == A(0) ? splat<V>(A(1)) : to_q, q, mixed);
  };
  for (int64_t c = 0; c < n; c += 2 * L) {
    V z0, z1, y0, y1;
    fetch_ahead(both.z + c);
    fetch_ahead(both.y + c);
    load_pair(both.z + c, z0, z1);
    load_pair(both.y + c, y0, y1);
    add(z0, y0, c);
    add(z1, y1, c + L);
  }
  add_lanes(owns, own);
  add_lanes(values, value);
}

// What the gradient has beside the divergence's: of g and of g_entropy, exp(z - shift_z) being p.
template <class A>
struct Beside {
  A weight, g_entropy, entropy;
};

// out[c] = the gradient of raw z; see mix_block for what is kept of jsd. `Short`: exponentials of the digits that bfloat16 has.
template <DivergenceKind kKind, bool kKept, bool kShort, class E, class O>
void gradient_block(const BothLogits<E>& both, int64_t n, const Visit& row, const Beside<acc_t<E>>* beside,
                    const acc_t<E>* derivatives, const acc_t<E>* kept_z, const acc_t<E>* kept_y, O* out) {
  using A = acc_t<E>;
  using V = vec_t<E>;
  constexpr int L = kLanes<E>;
  constexpr Digits digits = kShort ? Digits::bfloat16 : Digits::full;
  const A slope = both.slope_z, slope_y = both.slope_y, ratio = both.ratio, own = A(row.own), beta = A(row.beta);
  const A shift_z = A(row.shift_z), shift_y = A(row.shift_y), scale_z = A(row.scale_z), scale_y = A(row.scale_y);
  const A gap = A(kKind == DivergenceKind::reverse_kl ? row.gap + row.own : row.gap);
  const auto gradient = [&](V z, V y, int64_t c) __attribute__((always_inline)) {
    V a = z * slope - shift_z, b = y * slope_y - shift_y;
    const V e = kKept ? load(kept_z + c) : exp_clamping<digits>(a), p = e * scale_z, d = (z - ratio * y) * slope - gap;
    V dz;
    if constexpr (kKind == DivergenceKind::forward_kl) {
      const V q = (kKept ? load(kept_y + c) : exp_clamping<digits>(b)) * scale_y, square = d * d;
      // Kept exponentials have all digits: p - q loses none that bfloat16 has.
      dz = p == q ? V{} : p - q;  // a contracted product leaves its rounding where the two are equal
      if (!(kKept && kShort)) dz = square < A(kNear<A> * kNear<A>) ? p * (d - square * bend_series<A>(d)) : dz;
    } else if constexpr (kKind == DivergenceKind::reverse_kl) {
      dz = p == A(0) ? V{} : p * d;
    } else {
      V of_p, of_q;
      if constexpr (kKept) {
        of_p = load(kept_y + c);
      } else {
        to_mixture(d, beta, of_p, of_q);
      }
      dz = p == A(0) ? V{} : p * (of_p - own);
    }
    if (beside) dz = dz + beside->weight * e - beside->g_entropy * (e * (a + beside->entropy));
    return derivatives ? dz * load(derivatives + c) : dz;
  };
  for (int64_t c = 0; c < n; c += 2 * L) {
    V z0, z1, y0, y1;
    fetch_ahead(both.z + c);
    fetch_ahead(both.y + c);
    load_pair(both.z + c, z0, z1);
    load_pair(both.y + c, y0, y1);
    store_pair(out + c, gradient(z0, y0, c), gradient(z1, y1, c + L));
  }
}

// A buffer's columns into a row of results.
template <class T>
void narrow(const acc_t<T>* from, T* to, int64_t columns) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  for (; c + L <= columns; c += L) store(to + c, load(from + c));
  for (; c < columns; c++) store_scalar(to + c, from[c]);
}

template <DivergenceKind kKind, class T>
void gradient_both(const BothRows<T>& row, const Visit& visit, const Beside<acc_t<T>>* beside, const Kept<acc_t<T>>* kept,
                   T* out) {
  using A = acc_t<T>;
  constexpr bool is_short = kDigits<T> == Digits::bfloat16;
  const bool capped = row.to_z.cap != 0;
  for_each_block(row, capped, [&](int64_t first, int64_t n, const auto& both, Buffers<A>* buffers) {
    const Visit block = visit.at(kept, first / kBlock<T>);
    const A* derivatives = buffers && capped ? buffers->derivatives : nullptr;
    const auto write = [&](auto* to) {
      if (kept) {
        const A* kept_y = kept[1].values ? kept[1].values + first : nullptr;
        gradient_block<kKind, true, is_short>(both, n, block, beside, derivatives, kept[0].values + first, kept_y, to);
      } else {
        gradient_block<kKind, false, is_short>(both, n, block, beside, derivatives, static_cast<const A*>(nullptr),
                                               static_cast<const A*>(nullptr), to);
      }
    };
    if constexpr (std::is_same_v<std::decay_t<decltype(*both.z)>, T>) {
      if (!buffers) return write(out + first);
    }
    if constexpr (std::is_same_v<std::decay_t<decltype(*both.z)>, A>) {
      write(buffers->z);
      narrow(buffers->z, out + first, row.columns - first < kBlock<T> ? row.columns - first : kBlock<T>);
    }
  });
}

template <class T>
void gradient_both(DivergenceKind kind, const BothRows<T>& row, const Visit& visit, const Beside<acc_t<T>>* beside,
                   const Kept<acc_t<T>>* kept, T* out) {
  if (kind == DivergenceKind::forward_kl) return gradient_both<DivergenceKind::forward_kl>(row, visit, beside, kept, out);
  if (kind == DivergenceKind::reverse_kl) return gradient_both<DivergenceKind::reverse_kl>(row, visit, beside, kept, out);
  gradient_both<DivergenceKind::jsd>(row, visit, beside, kept, out);
}

template <class T>
void mix_both(const BothRows<T>& row, const Visit& visit, const Kept<acc_t<T>>* kept, double& own, double& value) {
  for_each_block(row, false, [&](int64_t first, int64_t n, const auto& both, Buffers<acc_t<T>>*) {
    const Visit block = visit.at(kept, first / kBlock<T>);
    if (kept) {
      mix_block<true>(both, n, block, kept[0].values + first, kept[1].values + first, own, value);
    } else {
      acc_t<T>* const none = nullptr;
      mix_block<false>(both, n, block, none, none, own, value);
    }
  });
}

template <class T>
void comparison_rows(const ComparisonParams& p, int threads) {
  using A = acc_t<T>;
  static_assert(sizeof(RowComparison<A>) == 8 * sizeof(A));
  const Sums sums = p.kind == DivergenceKind::forward_kl ? Sums::of_teacher : Sums::of_student;
  for_each_row<T>(p.tiles.student.values, threads, 0, [&](int64_t r, const Kept<A>*) {
    auto& stats = static_cast<RowComparison<A>*>(p.stats)[r];
    const RowStatistics<A>& given = stats.student;
    RowComparison<double> s{{given.max, given.others, given.moment, given.target}, stats.teacher_max, stats.teacher_sum, stats.tilt,
                            stats.bent};
    fold_both<T>(sums, BothRows<T>(p.tiles, r), s, nullptr);
    const RowStatistics<double>& z = s.student;
    stats = {{A(z.max), A(z.others), A(z.moment), A(z.target)}, A(s.teacher_max), A(s.teacher_sum), A(s.tilt), A(s.bent)};
  });
}

// Of rows whose lse is known.
template <class A>
Visit visit_of(const Scored& scored, double gap, double own, double beta, int64_t r) {
  const double lse = value<A>(scored.lse, r);
  return {lse, lse - gap, 1, 1, gap, own, beta};
}

template <class T>
void jensen_shannon_rows(const JensenShannonParams& p, int threads) {
  using A = acc_t<T>;
  for_each_row<T>(p.tiles.student.values, threads, 0, [&](int64_t r, const Kept<A>*) {
    double own = 0, divergence = 0;
    mix_both(BothRows<T>(p.tiles, r), visit_of<A>(p.scored, value<A>(p.gap, r), 0, p.beta, r), nullptr, own, divergence);
    A* sums = static_cast<A*>(p.sums) + 2 * r;
    sums[0] = A(sums[0] + own);
    sums[1] = A(sums[1] + divergence);
  });
}

// The factor of u in the gradient of raw logits, but for the softcap's derivative.
template <class T>
double factor_of(DivergenceKind kind, double g, double beta, const VectorTransform<T>& to_z) {
  return g * double(to_z.slope) * (kind == DivergenceKind::jsd ? 1 - beta : 1);
}

template <class T>
void divergence_gradient_rows(const DivergenceGradientParams& p, int threads) {
  using A = acc_t<T>;
  for_each_row<T>(p.tiles.student.values, threads, 0, [&](int64_t r, const Kept<A>*) {
    const auto at = [r](const void* vector) { return double(value<A>(vector, r)); };
    const BothRows<T> row(p.tiles, r);
    T* out = Span<T>(p.out, p.tiles.student.ranges, r).data;
    const double lse = at(p.scored.lse), gap = at(p.compared.gap), own = at(p.compared.own), g = at(p.g_divergence);
    const RowGradient<double> d(row.to_z, at(p.g), at(p.g_entropy), lse, 0, at(p.scored.logps), at(p.scored.entropy));
    // of rows without a divergence gap and own may be anything
    if (g == 0) return gradient_row<T>(row.z, out, row.columns, row.target, row.to_z, d, nullptr);
    const bool here = !d.idle && row.target >= 0 && row.target < row.columns;
    double at_target = 0;
    if (here) {  // before the logits are overwritten
      A z[kLanes<T> * 2], y[kLanes<T> * 2], derivatives[kLanes<T> * 2];
      fill(row.z, row.target, 1, row.to_z, z, derivatives);
      fill(row.y, row.target, 1, row.to_y, y);
      // rounded as gap is: of equal rows z - y - gap is 0
      const A apart = z[0] - y[0] - A(gap), p_target = A(std::exp(at(p.scored.logps))), q_target = A(std::exp(y[0] - (lse - gap)));
      const double u = divergence_slope(p.kind, p_target, q_target, apart, A(own), A(p.beta));
      at_target = (d.at_target + g * double(row.to_z.slope) * u) * (d.capped ? double(derivatives[0]) : 1);
    }
    Visit visit = visit_of<A>(p.scored, gap, own, p.beta, r);
    visit.scale_z = visit.scale_y = factor_of(p.kind, g, p.beta, row.to_z);
    const Beside<A> beside{A(d.weight), A(d.g_entropy), A(d.entropy)};
    gradient_both(p.kind, row, visit, d.idle ? nullptr : &beside, nullptr, out);
    if (here) store_scalar(out + row.target, A(at_target));
  });
}

template <class T>
void divergence_rows(const DivergenceParams& p, int threads) {
  using A = acc_t<T>;
  const bool capped = p.tiles.student.transform.softcap != 0 || p.tiles.teacher.transform.softcap != 0;
  const Sums sums = p.kind == DivergenceKind::forward_kl   ? Sums::of_teacher
                    : p.kind == DivergenceKind::reverse_kl ? Sums::of_student
                                                           : Sums::difference;
  const int keep = capped ? 0 : p.kind == DivergenceKind::reverse_kl ? 1 : 2;
  for_each_row<T>(p.tiles.student.values, threads, keep, [&](int64_t r, const Kept<A>* kept) {
    const BothRows<T> row(p.tiles, r);
    RowComparison<double> s;
    fold_both(sums, row, s, kept);
    const RowResult<double> result = close(s.student);
    RowCompared<double> compared = compare(s, p.kind);
    const double teacher_log_sum = result.log_sum + (s.student.max - s.teacher_max - compared.gap);
    Visit visit{s.student.max, s.teacher_max, std::exp(-result.log_sum), std::exp(-teacher_log_sum), compared.gap, 0, p.beta};
    if (p.kind == DivergenceKind::jsd) {
      compared.own = compared.value = 0;
      mix_both(row, visit, kept, compared.own, compared.value);
    }
    write<A>(p.scored, r, result);
    static_cast<A*>(p.compared.gap)[r] = A(compared.gap);
    static_cast<A*>(p.compared.own)[r] = A(compared.own);
    static_cast<A*>(p.compared.value)[r] = A(compared.value);
    T* out = row_of<T>(p.out, r);
    const double g = value<A>(p.g_divergence, r), factor = factor_of(p.kind, g, p.beta, row.to_z);
    if (g == 0) {
      if (row.columns > 0) std::memset(static_cast<void*>(out), 0, row.columns * sizeof(T));  // an empty tile has no address
      return;
    }
    visit.own = compared.own;
    visit.scale_z *= factor;
    visit.scale_y *= factor;
    gradient_both<T>(p.kind, row, visit, nullptr, kept, out);
  });
}

}  // namespace
}  // namespace grpo_kernels
