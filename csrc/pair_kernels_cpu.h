// The pair kernels on the CPU: dot products of pairs of rows, and sums of rows.
//
//   pair_logits  reads K elements of the weight per pair, the row of hidden out of the first-level cache. Per element: 1 multiply-add.
//   pair_sums    reads K elements of the source per pair, and writes K elements per row. Per element of a pair: 1 multiply-add.
//
// A pair's dot product and a column's sum belong to one thread, and both run in an order of their own: the bits of a result depend
// neither on the number of threads nor on the other pairs. float arithmetic, double for float64.
#pragma once

#include <type_traits>

#include "row_math.h"
#include "vector.h"

namespace grpo_kernels {
namespace {

constexpr int64_t kPairsPerPiece = 64;

// Pieces of equal work for any lengths of ranges: `per_pair` units for each pair, in the order of the rows. Calls f(r, from, to) with
// the units [from, to) of row r.
template <class F>
void for_each_part(const Pairs& pairs, int64_t per_pair, int threads, F f) {
  const auto units = [&](int64_t r) {
    const int64_t length = pairs.ranges[2 * r + 1] - pairs.ranges[2 * r];
    return length > 0 ? length * per_pair : 0;
  };
  int64_t total = 0;
  for (int64_t r = 0; r < pairs.count; r++) total += units(r);
  if (total == 0) return;  // of matrices without columns too
  const int64_t size = kPairsPerPiece * per_pair, pieces = (total + size - 1) / size;
  (void)threads;
#pragma omp parallel num_threads(pieces > 1 ? threads : 1)
  {
    int64_t r = 0, before = 0;  // units of the rows before r: a thread's pieces are in ascending order
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t start = piece * size, end = start + size < total ? start + size : total;
      while (before + units(r) <= start) before += units(r++);
      for (int64_t at = start; at < end;) {
        const int64_t own = units(r), to = end - before < own ? end - before : own;
        if (own > 0) f(r, at - before, to);
        at = before + to;
        if (to == own) {
          before += own;
          r++;
        }
      }
    }
  }
}

// The row of a matrix, null outside of it.
template <class T>
GK_INLINE const T* row_within(const Matrix& matrix, int64_t row) {
  return row >= 0 && row < matrix.rows ? row_of<T>(matrix, row) : nullptr;
}

GK_INLINE int64_t place_of(const Pairs& pairs, int64_t r) { return pairs.rows ? pairs.rows[r] : r; }

// Rows of the matrix that ids name are anywhere in it: a row is asked for this many pairs before its turn, and only its first bytes,
// behind which the hardware reads on by itself. 7,700 pairs of 896 bf16 in a matrix of 152k rows, two threads of a Xeon with AMX: dot
// products take 1.3 ms without it, 1.1 with whole rows, 0.9 so.
constexpr int64_t kPairsAhead = 4, kBytesAhead = 512;

template <class T>
GK_INLINE void fetch(const Matrix& matrix, int64_t row, int64_t column, int64_t bytes) {
  const T* elements = row_within<T>(matrix, row);
  if (!elements) return;
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(elements + column) + byte, 0, 2);
}

// Of the first pairs of the row behind r.
template <class T>
GK_INLINE void fetch_next(const Pairs& pairs, const Matrix& matrix, int64_t r) {
  if (r + 1 >= pairs.count) return;
  const int64_t first = pairs.ranges[2 * r + 2], last = pairs.ranges[2 * r + 3];
  for (int64_t j = first; j < last && j < first + kPairsAhead; j++) fetch<T>(matrix, pairs.ids[j], 0, kBytesAhead);
}

// Two halves of lanes are added until one lane is left.
template <class V>
GK_INLINE auto sum_of_lanes(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  std::decay_t<decltype(v[0])> lanes[n];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// z[i] = h . w[i]. Even and odd columns of bfloat16 have sums of their own, see load_pair.
template <int P, class T>
GK_INLINE void dot_products(const T* h, const T* const* w, int64_t columns, acc_t<T>* z) {
  using V = vec_t<T>;
  constexpr int L = kLanes<T>;
  V even[P] = {}, odd[P] = {}, a, b, x, y;
  int64_t c = 0;
  for (; c + 2 * L <= columns; c += 2 * L) {
    load_pair(h + c, a, b);
    for (int i = 0; i < P; i++) {
      load_pair(w[i] + c, x, y);
      even[i] = even[i] + a * x;
      odd[i] = odd[i] + b * y;
    }
  }
  if (c < columns) {
    T rest[2 * L] = {};
    std::memcpy(rest, h + c, (columns - c) * sizeof(T));
    load_pair(rest, a, b);
    for (int i = 0; i < P; i++) {
      std::memcpy(rest, w[i] + c, (columns - c) * sizeof(T));
      load_pair(rest, x, y);
      even[i] = even[i] + a * x;
      odd[i] = odd[i] + b * y;
    }
  }
  for (int i = 0; i < P; i++) z[i] = sum_of_lanes(even[i] + odd[i]);
}

template <class T>
void logits_of_pairs(const PairLogitsParams& p, int threads) {
  using A = acc_t<T>;
  constexpr int P = 4;
  const A scale = A(p.scale);
  A* out = static_cast<A*>(p.out);
  for_each_part(p.pairs, 1, threads, [&](int64_t r, int64_t from, int64_t to) {
    const T* h = row_within<T>(p.hidden, place_of(p.pairs, r));
    if (!h) return;
    const int64_t first = p.pairs.ranges[2 * r], last = p.pairs.ranges[2 * r + 1];
    fetch_next<T>(p.pairs, p.weight, r);
    for (int64_t j = first + from; j < first + to;) {
      const T* w[P];
      int64_t to_out[P];
      int n = 0;
      for (; n < P && j < first + to; j++) {
        if (j + kPairsAhead < last) fetch<T>(p.weight, p.pairs.ids[j + kPairsAhead], 0, kBytesAhead);
        w[n] = row_within<T>(p.weight, p.pairs.ids[j]);
        to_out[n] = j;
        if (w[n]) {
          n++;
        } else if (!p.add) {
          out[j] = -A(INFINITY);
        }
      }
      A z[P];
      if (n == P) {
        dot_products<P>(h, w, p.weight.columns, z);
      } else {
        for (int i = 0; i < n; i++) dot_products<1>(h, w + i, p.weight.columns, z + i);
      }
      for (int i = 0; i < n; i++) {
        const A total = scale * z[i] + value<A>(p.bias, p.pairs.ids[to_out[i]]);
        out[to_out[i]] = p.add ? out[to_out[i]] + total : total;
      }
    }
  });
}

constexpr int kVectors = 8;          // of columns that a part of a row is a multiple of
constexpr int64_t kColumnsAtOnce = 1024;  // of sums in the first-level cache, so that rows are read in long stretches

// Sums of g[i] times the row w[i], one row after the other, on top of `before` unless that is null; f(c, sum, lanes) takes them.
template <int P, class T, class F>
GK_INLINE void add_rows(const T* const* w, const acc_t<T>* g, int64_t columns, const acc_t<T>* before, F f) {
  using V = vec_t<T>;
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  for (; c + L <= columns; c += L) {
    V sum = {};
    if (before) sum = load(before + c);
    for (int i = 0; i < P; i++) sum = sum + load(w[i] + c) * g[i];
    f(c, sum, int64_t(L));
  }
  if (c < columns) {
    V sum = {};
    if (before) sum = load(before + c);
    for (int i = 0; i < P; i++) {
      T rest[L] = {};
      std::memcpy(rest, w[i] + c, (columns - c) * sizeof(T));
      sum = sum + load(rest) * g[i];
    }
    f(c, sum, columns - c);
  }
}

// The columns [begin, end) of a row's sum over the pairs [first, last).
template <class T, class O>
void sum_of_row(const PairSumsParams& p, int64_t first, int64_t last, int64_t begin, int64_t end, O* out) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int L = kLanes<T>, P = 4;
  alignas(64) A sums[kColumnsAtOnce];
  const A scale = A(p.scale);
  for (int64_t start = begin; start < end; start += kColumnsAtOnce) {
    const int64_t n = end - start < kColumnsAtOnce ? end - start : kColumnsAtOnce;
    const auto keep = [&](int64_t c, V sum, int64_t) { store(sums + c, sum); };
    const auto write = [&](int64_t c, V sum, int64_t lanes) {
      O* to = out + start + c;
      sum = sum * scale;
      if (lanes == L) return store(to, p.add ? load(to) + sum : sum);
      O rest[L] = {};
      std::memcpy(rest, to, lanes * sizeof(O));
      store(rest, p.add ? load(rest) + sum : sum);
      std::memcpy(to, rest, lanes * sizeof(O));
    };
    const T* w[P];
    A g[P];
    const A* before = nullptr;
    int rows = 0;
    for (int64_t j = first; j < last; j++) {
      if (j + kPairsAhead < last) fetch<T>(p.source, p.pairs.ids[j + kPairsAhead], start, kBytesAhead);
      const T* row = row_within<T>(p.source, p.pairs.ids[j]);
      if (!row) continue;
      if (rows == P) {
        add_rows<P>(w, g, n, before, keep);
        before = sums;
        rows = 0;
      }
      w[rows] = row + start;
      g[rows++] = static_cast<const A*>(p.g)[j];
    }
    if (rows == 4) {
      add_rows<4>(w, g, n, before, write);
    } else if (rows == 3) {
      add_rows<3>(w, g, n, before, write);
    } else if (rows == 2) {
      add_rows<2>(w, g, n, before, write);
    } else if (rows == 1) {
      add_rows<1>(w, g, n, before, write);
    } else {
      add_rows<0>(w, g, n, before, write);
    }
  }
}

template <class T, class O>
void sums_over_pairs(const PairSumsParams& p, int threads) {
  constexpr int64_t kColumns = kVectors * kLanes<T>;
  const int64_t K = p.source.columns, blocks = (K + kColumns - 1) / kColumns;
  for_each_part(p.pairs, blocks, threads, [&](int64_t r, int64_t from, int64_t to) {
    const int64_t place = place_of(p.pairs, r), first = p.pairs.ranges[2 * r], last = p.pairs.ranges[2 * r + 1];
    if (place < 0 || place >= p.out.rows) return;
    fetch_next<T>(p.pairs, p.source, r);
    // a block belongs to the part with its first unit
    const int64_t length = last - first, begin = (from + length - 1) / length * kColumns, end = (to + length - 1) / length * kColumns;
    sum_of_row<T>(p, first, last, begin, end < K ? end : K, row_of<O>(p.out, place));
  });
}

}  // namespace
}  // namespace grpo_kernels
