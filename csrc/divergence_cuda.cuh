// The row kernels over two tiles on CUDA, a student's logits and a teacher's. A thread block owns a row of both.
//
//   divergence_statistics  reads both tiles once
//   jensen_shannon         reads both once
//   divergence_gradient    reads both and writes the student's once
//
// The units of a row are dealt out to L lanes: lane l has the units l, l + L, l + 2L, ... and folds them from right to left; the
// lanes' sums are merged in one tree. L depends on the row's length alone. A thread has one lane after the other, so that a result
// has the same bits at every launch shape and alignment. What row_kernels_cuda.cuh says of units and results on the tile holds here.
// Per pair of elements: 2 exp; for the divergence of Jensen and Shannon an exp, a logarithm and a division more.
#pragma once

#include "divergence_math.h"
#include "row_kernels_cuda.cuh"

namespace grpo_kernels {

namespace {

// Of pairs of units: as many loads as over one tile.
template <class T, bool Plain>
constexpr int kPairsInFlight = kInFlight<T, Plain> > 1 ? kInFlight<T, Plain> / 2 : 1;

// At once on a multiprocessor: 64 registers for a thread, 128 for one with doubles.
template <class T>
constexpr int kFewestBlocks = sizeof(T) == 8 ? 1 : 2;

// Of the sums of Jensen and Shannon, whose formulas take the registers: one pair of units, and 128 for a thread with 8 pairs in it.
template <class T>
constexpr int kFewestBlocksOfSums = sizeof(T) == 4 ? 2 : 1;

template <class T>
struct TwoUnits {
  InputUnit<T> z, y;
};

// One block's work on one row of both.
template <class T, class O, Rows Mode>
struct TwoShares : Share<T, O, Mode> {
  using Student = Share<T, O, Mode>;
  const T* teacher;  // the row
  int lanes;         // of the row

  __device__ __forceinline__ TwoShares(const TwoTiles& tiles, const Matrix& result, int64_t row)
      : Student(tiles.student, result, row, 0, 1), teacher(row_of<const T>(tiles.teacher.values, row)) {
    if constexpr (Mode == Rows::ranges) teacher += tiles.teacher.ranges[2 * row];
    lanes = lanes_of(this->units, Mode == Rows::ranges ? kFewestLanesOfRange : kFewestLanes);
    if (!is_aligned<InputUnit<T>>(teacher)) {
      this->aligned = false;
      this->whole = 0;
    }
  }

  // First column of the lane's k-th unit.
  __device__ __forceinline__ int column_of(int lane, int k) const { return (lane + k * lanes) * kUnit<T>; }

  __device__ __forceinline__ TwoUnits<T> load_whole(int c) const { return {this->whole_of(this->in, c), this->whole_of(teacher, c)}; }
  __device__ __forceinline__ TwoUnits<T> load_part(int c) const { return {this->part_of(this->in, c), this->part_of(teacher, c)}; }
};

// Calls f(units, k, ragged) for the units k, k + 1, .. of one lane, as many as are loaded at once, right to left; `ragged` units
// may reach past the row's end, or lie behind it.
template <int InFlight, class S, class F>
__device__ __forceinline__ void read_steps_backward(const S& share, int lane, F f) {
  using Input = decltype(share.load_whole(0));
  const auto of_lane = [&](int units) { return (units - lane + share.lanes - 1) >> (31 - __clz(share.lanes)); };
  const int steps = of_lane(share.whole) / InFlight;
  Input units[InFlight];
  for (int step = (of_lane(share.units) + InFlight - 1) / InFlight - 1; step >= steps; step--) {
#pragma unroll
    for (int i = 0; i < InFlight; i++) units[i] = share.load_part(share.column_of(lane, step * InFlight + i));
    f(units, step * InFlight, true);
  }
  for (int step = steps - 1; step >= 0; step--) {
#pragma unroll
    for (int i = 0; i < InFlight; i++) units[i] = share.load_whole(share.column_of(lane, step * InFlight + i));
    f(units, step * InFlight, false);
  }
}

// ---- reductions

// Of all lanes of a warp, in every one of them.
template <class A>
__device__ __forceinline__ A maximum_of_warp(A x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = std::fmax(x, __shfl_xor_sync(kWholeWarp, x, distance));
  return x;
}

template <class A>
__device__ __forceinline__ A sum_of_warp(A x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

// What the statistics of a row are summed in, and how the lanes' are merged. Without the target, which no lane has seen.
template <class A>
struct Comparisons {
  using Sums = RowComparison<A>;
  bool forward;

  template <int N>
  __device__ __forceinline__ Sums merged_over_warp(Sums (&parts)[N]) const {
    A max_z = parts[0].student.max, max_y = parts[0].teacher_max;
#pragma unroll
    for (int i = 1; i < N; i++) {
      max_z = std::fmax(max_z, parts[i].student.max);
      max_y = std::fmax(max_y, parts[i].teacher_max);
    }
    max_z = maximum_of_warp(max_z);
    max_y = maximum_of_warp(max_y);
    Sums sum;
#pragma unroll
    for (int i = 0; i < N; i++) {
      raise_max(parts[i], max_z, max_y, forward);
      sum.student.others += parts[i].student.others;
      sum.student.moment += parts[i].student.moment;
      sum.teacher_sum += parts[i].teacher_sum;
      sum.tilt += parts[i].tilt;
      sum.bent += parts[i].bent;
    }
    return {{max_z, sum_of_warp(sum.student.others), sum_of_warp(sum.student.moment), -infinity<A>()},
            max_y,
            sum_of_warp(sum.teacher_sum),
            sum_of_warp(sum.tilt),
            sum_of_warp(sum.bent)};
  }
};

template <class A>
struct Mixtures {
  struct Sums {
    A own = 0, value = 0;  // KL(p || m), the divergence
  };

  template <int N>
  __device__ __forceinline__ Sums merged_over_warp(Sums (&parts)[N]) const {
    Sums sum;
#pragma unroll
    for (int i = 0; i < N; i++) {
      sum.own += parts[i].own;
      sum.value += parts[i].value;
    }
    return {sum_of_warp(sum.own), sum_of_warp(sum.value)};
  }
};

// ---- a row

// Folds N neighbours of both; where both are -inf nothing counts.
template <class A, int N>
__device__ __forceinline__ void fold(RowComparison<A>& s, const A (&z)[N], const A (&y)[N], bool forward) {
  A top_z = z[0], top_y = y[0];
#pragma unroll
  for (int j = 1; j < N; j++) {
    top_z = std::fmax(top_z, z[j]);
    top_y = std::fmax(top_y, y[j]);
  }
  raise_max(s, top_z, top_y, forward);
  const A shift_z = finite(s.student.max), shift_y = finite(s.teacher_max);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const A a = z[j] - shift_z, b = y[j] - shift_y, of_z = exp_of_difference(a), of_y = exp_of_difference(b);
    s.student.others += of_z;
    s.student.moment += above_nothing(a) * of_z;
    s.teacher_sum += of_y;
    const A weight = forward ? of_y : of_z, other = forward ? of_z : of_y, x = forward ? b - a : a - b;
    s.tilt += weight == A(0) ? A(0) : weight * x;
    s.bent += bend(x, weight, other);
  }
}

// The statistics of one column, the target.
template <class A>
__device__ __forceinline__ RowComparison<A> of_target(A z, A y, bool forward) {
  const bool has_z = z != -infinity<A>(), has_y = y != -infinity<A>();
  const A bent = !(forward ? has_y : has_z) ? A(forward ? has_z : has_y) : (forward ? has_z : has_y) ? A(0) : infinity<A>();
  return {{z, A(0), A(0), z}, y, A(has_y), A(0), bent};
}

// What is written of one element of a row.
template <class A, bool Plain, DivergenceKind Kind>
struct TwoResult {
  ElementTransform<A, Plain> of_z, of_y;
  RowGradient<A> d;  // its shift is lse, its log_sum 0
  A g_divergence;    // with the factor logit_scale / temperature, as those of `d`
  A gap, own, beta;
  int target;

  __device__ __forceinline__ A operator()(A raw_z, A raw_y, int column) const {
    const bool here = column == target;
    const A z = of_z(raw_z, column), y = of_y(raw_y, column), log_p = z - d.shift;
    const A p = exp_of_difference(log_p), q = exp_of_difference(y - (d.shift - gap));
    A result = here ? d.at_target : d.weight * p;
    if (!Plain && d.g_entropy != A(0) && !here) result -= d.g_entropy * (p * (above_nothing(log_p) + d.entropy));
    // z - y without a product inside of it: with one of the two products rounded and the other not, equal logits would differ
    result += g_divergence * divergence_slope(Kind, p, q, minus(z, y) - gap, own, beta);
    if (Plain) return result;
    return d.capped ? result * tanh_slope(of_z.share(raw_z, column)) : result;
  }
};

template <class T, class O, bool Plain, Rows Mode>
struct TwoRows {
  using A = acc_of<T>;
  int64_t row;
  TwoShares<T, O, Mode> share;
  int target;  // column; -1: not in these tiles
  ElementTransform<A, Plain> of_z, of_y;

  __device__ __forceinline__ TwoRows(const TwoTiles& tiles, const Matrix& out)
      : row(int64_t(blockIdx.x)), share(tiles, out, row), of_z(tiles.student, row), of_y(tiles.teacher, row) {
    const int64_t c = tiles.student.target[row];
    target = c >= 0 && c < share.columns ? int(c) : -1;
  }

  // f(sums, z, y) of the columns of `at_once` units, merged; in the first thread. Once per kernel. Both are -inf behind the row's end
  // and at `skipped`.
  template <int at_once, class Merge, class F>
  __device__ __forceinline__ typename Merge::Sums summed(const Merge& merge, int skipped, F f) const {
    using Sums = typename Merge::Sums;
    static_assert(sizeof(Sums) * kMostLanes / 32 <= scratch_of_two_tiles(sizeof(T)));
    constexpr int of_unit = kUnit<T>;
    Sums* scratch = reinterpret_cast<Sums*>(shared_memory());
    for (int lane = int(threadIdx.x); lane < share.lanes; lane += int(blockDim.x)) {
      Sums sums[1];
      read_steps_backward<at_once>(share, lane, [&](const TwoUnits<T>(&units)[at_once], int k, bool ragged) {
        A z[at_once * of_unit], y[at_once * of_unit];
#pragma unroll
        for (int i = 0; i < at_once; i++) {
          const int c = share.column_of(lane, k + i);
#pragma unroll
          for (int j = 0; j < of_unit; j++) {
            // without `ragged` the compiler drops the comparison
            const bool inside = !ragged || c + j < share.columns;
            z[i * of_unit + j] = inside ? of_z(widened(units[i].z.at[j]), c + j) : -infinity<A>();
            y[i * of_unit + j] = inside ? of_y(widened(units[i].y.at[j]), c + j) : -infinity<A>();
          }
          if (unsigned(skipped - c) < unsigned(of_unit)) {
#pragma unroll
            for (int j = 0; j < of_unit; j++) {
              if (c + j == skipped) z[i * of_unit + j] = y[i * of_unit + j] = -infinity<A>();
            }
          }
        }
        f(sums[0], z, y);
      });
      sums[0] = merge.merged_over_warp(sums);
      if (lane % 32 == 0) scratch[lane / 32] = sums[0];
    }
    __syncthreads();
    Sums parts[kMostLanes / 32 / 32];
    if (threadIdx.x < 32) {
#pragma unroll
      for (int i = 0; i < kMostLanes / 32 / 32; i++) {
        const int of_lanes = int(threadIdx.x) + 32 * i;
        if (32 * of_lanes < share.lanes) parts[i] = scratch[of_lanes];
      }
      parts[0] = merge.merged_over_warp(parts);
    }
    return parts[0];
  }

  __device__ __forceinline__ RowComparison<A> comparison(bool forward) const {
    const auto fold_both = [&](RowComparison<A>& s, const auto& z, const auto& y) { fold(s, z, y, forward); };
    const RowComparison<A> s = summed<kPairsInFlight<T, Plain>>(Comparisons<A>{forward}, target, fold_both);
    if (target < 0) return s;
    const A z = of_z(widened(load(share.in + target)), target), y = of_y(widened(load(share.teacher + target)), target);
    return merged(s, of_target(z, y, forward), forward);
  }

  __device__ __forceinline__ typename Mixtures<A>::Sums mixture(A lse, A gap, A beta) const {
    const auto add = [&](typename Mixtures<A>::Sums& sums, const auto& z, const auto& y) {
#pragma unroll
      for (int j = 0; j < kUnit<T>; j++) {
        const A p = exp_of_difference(z[j] - lse), q = exp_of_difference(y[j] - (lse - gap));
        add_jensen_shannon(p, q, minus(z[j], y[j]) - gap, beta, sums.own, sums.value);
      }
    };
    return summed<1>(Mixtures<A>(), -1, add);
  }

  template <DivergenceKind Kind>
  __device__ __forceinline__ void write(const RowGradient<A>& d, A g_divergence, A gap, A own, A beta) const {
    const TwoResult<A, Plain, Kind> result = {of_z, of_y, d, g_divergence * A(of_z.slope), gap, own, beta, target};
    const auto load_units = [&](int i, bool ragged) {
      return ragged ? share.load_part(share.column(i)) : share.load_whole(share.column(i));
    };
    const auto f = [&](const TwoUnits<T>& units, int c) {
      Unit<O, kUnit<T>> written;
#pragma unroll
      for (int j = 0; j < kUnit<T>; j++) written.at[j] = rounded<O>(result(widened(units.z.at[j]), widened(units.y.at[j]), c + j));
      return written;
    };
    write_forward<kPairsInFlight<T, Plain>>(share, load_units, f);
  }
};

// ---- the kernels

template <class T, bool Plain, Rows Mode>
__global__ void __launch_bounds__(kMostThreadsOfTwoTiles, kFewestBlocks<T>) divergence_statistics_kernel(const ComparisonParams p) {
  using A = acc_of<T>;
  static_assert(sizeof(RowComparison<A>) == 8 * sizeof(A));
  const TwoRows<T, T, Plain, Mode> row(p.tiles, p.tiles.student.values);
  const bool forward = p.kind == DivergenceKind::forward_kl;
  const RowComparison<A> found = row.comparison(forward);
  if (threadIdx.x == 0) {
    auto& stats = static_cast<RowComparison<A>*>(p.stats)[row.row];
    stats = merged(stats, found, forward);
  }
}

template <class T, bool Plain, Rows Mode>
__global__ void __launch_bounds__(kMostThreadsOfTwoTiles, kFewestBlocksOfSums<T>) jensen_shannon_kernel(const JensenShannonParams p) {
  using A = acc_of<T>;
  const TwoRows<T, T, Plain, Mode> row(p.tiles, p.tiles.student.values);
  const auto found = row.mixture(value<A>(p.scored.lse, row.row), value<A>(p.gap, row.row), A(p.beta));
  if (threadIdx.x == 0) {
    A* sums = static_cast<A*>(p.sums) + 2 * row.row;
    sums[0] += found.own;
    sums[1] += found.value;
  }
}

template <class T, class O, bool Plain, Rows Mode>
__global__ void __launch_bounds__(kMostThreadsOfTwoTiles, kFewestBlocks<T>)
    divergence_gradient_kernel(const DivergenceGradientParams p) {
  using A = acc_of<T>;
  const TwoRows<T, O, Plain, Mode> row(p.tiles, p.out);
  const A lse = value<A>(p.scored.lse, row.row), logps = value<A>(p.scored.logps, row.row);
  const A entropy = value<A>(p.scored.entropy, row.row), gap = value<A>(p.compared.gap, row.row);
  const A g = value<A>(p.g, row.row), g_entropy = Plain ? A(0) : value<A>(p.g_entropy, row.row);
  const A g_divergence = value<A>(p.g_divergence, row.row), own = value<A>(p.compared.own, row.row);
  const RowGradient<A> d(row.of_z, g, g_entropy, lse, A(0), logps, entropy);
  // what is known of the teacher may be nan then
  if (g_divergence == A(0)) return Row<T, O, Plain, Mode>(p.tiles.student, p.out).write(d);
  switch (p.kind) {
    case DivergenceKind::forward_kl:
      return row.template write<DivergenceKind::forward_kl>(d, g_divergence, gap, own, A(p.beta));
    case DivergenceKind::reverse_kl:
      return row.template write<DivergenceKind::reverse_kl>(d, g_divergence, gap, own, A(p.beta));
    case DivergenceKind::jsd:
      return row.template write<DivergenceKind::jsd>(d, g_divergence, gap, own, A(p.beta));
  }
}

}  // namespace
}  // namespace grpo_kernels
