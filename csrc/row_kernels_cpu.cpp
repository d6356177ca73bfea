// The row kernels over one tile and the transpose on the CPU, compiled once per instruction set under another GK_ISA.
//
//   statistics  reads a tile once. Per element: 1 exp, 2 fused multiply-adds (3 with squares), 1 maximum.
//   gradient    reads and writes it once. Per element: 1 exp, 1 multiplication.
//   policy      both, the second visit of a row out of the second-level cache: a row of 151,936 bf16 logits is 304 KB.
#include "row_kernels_cpu.h"

#include "divergence_kernels_cpu.h"
#include "pair_kernels_cpu.h"
#include "rows_cpu.h"
#include "transpose_cpu.h"

namespace grpo_kernels {
namespace {

template <template <class> class Statistics, class T>
void statistics_rows(const StatisticsParams& p, int threads) {
  using A = acc_t<T>;
  const Matrix& tile = p.tile.values;
  for_each_row<T>(tile, threads, 0, [&](int64_t r, const Kept<A>*) {
    const Span<T> row(tile, p.tile.ranges, r);
    auto* stats = static_cast<Statistics<A>*>(p.stats) + r * p.parts;
    fold_row<Statistics, T>(row.data, row.columns, p.tile.target[r], {p.tile, r}, nullptr, stats, p.parts);
  });
}

template <template <class> class Statistics, class A>
void close_rows(const CloseParams& p, int threads) {
  (void)threads;
  const auto* stats = static_cast<const Statistics<A>*>(p.stats);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < p.rows; r++) {
    const auto sum = of_parts<A, Statistics>(stats + r * p.parts, p.parts);
    write<A>(p.scored, r, close(sum));
    if constexpr (has_squares<Statistics<double>>) static_cast<A*>(p.squared)[r] = A(squared_probs(sum));
  }
}

template <class T>
void gradient_rows(const GradientParams& p, int threads) {
  using A = acc_t<T>;
  const Matrix& tile = p.tile.values;
  for_each_row<T>(tile, threads, 0, [&](int64_t r, const Kept<A>*) {
    const VectorTransform<T> transform(p.tile, r);
    const auto at = [r](const void* vector) { return double(value<A>(vector, r)); };
    const RowGradient<double> d(transform, at(p.g), at(p.g_entropy), at(p.scored.lse), 0, at(p.scored.logps),
                                at(p.scored.entropy));
    const Span<T> row(tile, p.tile.ranges, r), out(p.out, p.tile.ranges, r);
    gradient_row<T>(row.data, out.data, row.columns, p.tile.target[r], transform, d, nullptr);
  });
}

template <class T>
void policy_rows(const PolicyParams& p, int threads) {
  using A = acc_t<T>;
  const Matrix& tile = p.tile.values;
  const int keep = p.tile.transform.softcap == 0 && !p.rows.w_entropy ? 1 : 0;
  for_each_row<T>(tile, threads, keep, [&](int64_t r, const Kept<A>* kept) {
    const T* in = row_of<T>(tile, r);
    const int64_t target = p.tile.target[r];
    const VectorTransform<T> transform(p.tile, r);
    RowStatistics<A> s;
    fold_row(in, tile.columns, target, transform, kept, &s, 1);
    const RowStatistics<double> sum = of_parts<A, RowStatistics>(&s, 1);
    const RowResult<double> result = close(sum);
    write<A>(p.scored, r, result);
    // Rounded first: a row whose old log-prob is this very number has ratio 1 exactly.
    const double g = policy_coefficient<A>(p, r, double(A(result.logps)));
    const RowGradient<double> d(transform, g, double(value<A>(p.rows.w_entropy, r)), sum.max, result.log_sum, result.logps,
                                result.entropy);
    gradient_row<T>(in, row_of<T>(p.out, r), tile.columns, target, transform, d, kept);
  });
}

// ---- transpose

template <class E>
void transpose_rows(const TransposeParams& p, int threads) {
  constexpr int N = GK_VECTOR_BYTES / sizeof(E);
  constexpr int64_t kStrip = 512;  // columns one thread takes at a time
  (void)threads;
  const E* in = static_cast<const E*>(p.matrix.data);
  E* out = static_cast<E*>(p.out);
  const int64_t R = p.matrix.rows, C = p.matrix.columns, stride = p.matrix.row_stride;
  const int64_t strips = (C + kStrip - 1) / kStrip;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t end = (strip + 1) * kStrip < C ? (strip + 1) * kStrip : C;
    for (int64_t r = 0; r < R; r += N) {
      for (int64_t c = strip * kStrip; c < end; c += N) {
        if (r + N <= R && c + N <= end) {
          // Neither side is walked along memory, so the hardware does not see the next lines coming: 44 ms without, 30 ms with.
          for (int64_t i = 0; i < N && r + 2 * N <= R; i++) {
            __builtin_prefetch(in + (r + N + i) * stride + c, 0, 2);
            __builtin_prefetch(out + (c + i) * R + r + N, 1, 3);
          }
          transpose_block(in + r * stride + c, stride, out + c * R + r, R);
          continue;
        }
        const int64_t rows = R - r < N ? R - r : N, columns = end - c < N ? end - c : N;
        E a[N * N], b[N * N];
        for (int64_t i = 0; i < rows; i++) std::memcpy(a + i * N, in + (r + i) * stride + c, columns * sizeof(E));
        transpose_block(a, N, b, N);
        for (int64_t j = 0; j < columns; j++) std::memcpy(out + (c + j) * R + r, b + j * N, rows * sizeof(E));
      }
    }
  }
}

// Calls f with an element of the dtype.
template <class F>
void by_dtype(const Matrix& tile, F f) {
  if (tile.dtype == Dtype::float32) return f(float());
  if (tile.dtype == Dtype::bfloat16) return f(bfloat16());
  f(double());
}

void statistics(const StatisticsParams& p, int threads) {
  by_dtype(p.tile.values, [&](auto element) {
    using T = decltype(element);
    if (p.squares) return statistics_rows<RowSquares, T>(p, threads);
    statistics_rows<RowStatistics, T>(p, threads);
  });
}

void close_statistics(const CloseParams& p, int threads) {
  const bool wide = p.dtype == Dtype::float64;
  if (p.squared) return wide ? close_rows<RowSquares, double>(p, threads) : close_rows<RowSquares, float>(p, threads);
  return wide ? close_rows<RowStatistics, double>(p, threads) : close_rows<RowStatistics, float>(p, threads);
}

void gradient(const GradientParams& p, int threads) {
  by_dtype(p.tile.values, [&](auto element) { gradient_rows<decltype(element)>(p, threads); });
}

void policy(const PolicyParams& p, int threads) {
  by_dtype(p.tile.values, [&](auto element) { policy_rows<decltype(element)>(p, threads); });
}

void divergence_statistics(const ComparisonParams& p, int threads) {
  by_dtype(p.tiles.student.values, [&](auto element) { comparison_rows<decltype(element)>(p, threads); });
}

void jensen_shannon(const JensenShannonParams& p, int threads) {
  by_dtype(p.tiles.student.values, [&](auto element) { jensen_shannon_rows<decltype(element)>(p, threads); });
}

void divergence_gradient(const DivergenceGradientParams& p, int threads) {
  by_dtype(p.tiles.student.values, [&](auto element) { divergence_gradient_rows<decltype(element)>(p, threads); });
}

void divergence(const DivergenceParams& p, int threads) {
  by_dtype(p.tiles.student.values, [&](auto element) { divergence_rows<decltype(element)>(p, threads); });
}

void transpose(const TransposeParams& p, int threads) {
  if (p.matrix.dtype == Dtype::float32) return transpose_rows<uint32_t>(p, threads);
  if (p.matrix.dtype == Dtype::bfloat16) return transpose_rows<uint16_t>(p, threads);
  transpose_rows<uint64_t>(p, threads);
}

void pair_logits(const PairLogitsParams& p, int threads) {
  by_dtype(p.weight, [&](auto element) { logits_of_pairs<decltype(element)>(p, threads); });
}

void pair_sums(const PairSumsParams& p, int threads) {
  by_dtype(p.source, [&](auto element) {
    using T = decltype(element);
    if (p.out.dtype == p.source.dtype) return sums_over_pairs<T, T>(p, threads);
    sums_over_pairs<T, acc_t<T>>(p, threads);
  });
}

}  // namespace

extern const RowKernels GK_ISA;
const RowKernels GK_ISA = {statistics, close_statistics, gradient, policy, transpose, pair_logits, pair_sums, divergence_statistics, jensen_shannon,
                           divergence_gradient, divergence};

}  // namespace grpo_kernels
