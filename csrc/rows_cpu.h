// How the CPU kernels walk the rows of a tile: transforms, blocks of columns, the two visits of a row, threads.
//
// Rows are shared out among threads and never split, so the bits of a result do not depend on the number of threads. Sums run in
// float (double for float64 tiles) inside a block of columns and in double across blocks; what is known of a fixed tile of columns is
// rounded to that of the kernel's vectors; all of a row's scalars are double.
#pragma once

#include <cstdlib>
#include <memory>

#include "row_math.h"
#include "vector.h"

namespace grpo_kernels {
namespace {

constexpr int64_t kRowsPerTask = 8;

template <class T>
constexpr int64_t kBlock = 16384 / sizeof(acc_t<T>);  // columns; a block and its float copy stay in the first-level cache
static_assert(kTileColumns % kBlock<float> == 0 && kTileColumns % kBlock<double> == 0);
constexpr int64_t kFirstColumns = 512;  // whose maximum is mostly less than 4 below that of a block

// Fetches the cache line 4 KB ahead, past a row's end that of the next one. The hardware alone stops at every 4 KB page:
// 256 rows of 151,936 bf16 on one core of a Xeon with AMX took 33 ms (statistics), 38 (gradient), 35 (policy) without it; 11, 10 and
// 14 to 17 with it.
template <class T>
GK_INLINE void fetch_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096);
}

template <class T>
constexpr Digits kDigits = sizeof(T) == 2 ? Digits::bfloat16 : Digits::full;

template <class T>
struct VectorTransform : RowTransform<acc_t<T>, double> {
  using A = acc_t<T>;
  bool linear;

  VectorTransform(const Tile& tile, int64_t row) : RowTransform<A, double>(tile, row) {
    linear = !this->bias && this->cap == 0 && this->slope > 0 && this->slope < A(INFINITY);
  }

  // z of raw logits at `column` and following, `lanes` of which exist; and the softcap's derivative, where there is one.
  template <class V>
  GK_INLINE V operator()(V raw, int64_t column, int64_t lanes, V& derivative) const {
    if (this->bias) {
      if (lanes == kLanes<T>) {
        raw = raw + load(this->bias + column);
      } else {
        for (int64_t i = 0; i < lanes; i++) raw[i] += this->bias[column + i];
      }
    }
    return this->cap != 0 ? this->cap * vtanh<kDigits<T>>(raw * this->share_slope, derivative) : raw * this->slope;
  }
};

// out[c] = f(in[c], c, lanes) over whole vectors, the ragged end through a copy. `in_order`: f looks at the column.
template <class T, class F>
GK_INLINE void map_row(const T* in, T* out, int64_t columns, bool in_order, F f) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  if (!in_order) {
    for (; c + 2 * L <= columns; c += 2 * L) {
      vec_t<T> a, b;
      fetch_ahead(in + c);
      load_pair(in + c, a, b);
      store_pair(out + c, f(a, c, int64_t(L)), f(b, c, int64_t(L)));
    }
  }
  for (; c + L <= columns; c += L) {
    fetch_ahead(in + c);
    store(out + c, f(load(in + c), c, int64_t(L)));
  }
  if (c < columns) {
    T rest[L] = {};
    std::memcpy(rest, in + c, (columns - c) * sizeof(T));
    store(rest, f(load(rest), c, columns - c));
    std::memcpy(out + c, rest, (columns - c) * sizeof(T));
  }
}

// z of `columns` columns from `first` into a buffer, -inf behind them up to a whole pair of vectors; returns how many that makes.
// With a softcap its derivative into a buffer too, unless that is null.
template <class T>
int64_t fill(const T* row, int64_t first, int64_t columns, const VectorTransform<T>& transform, acc_t<T>* z,
             acc_t<T>* derivatives = nullptr) {
  constexpr int L = kLanes<T>;
  vec_t<T> derivative = {};
  int64_t c = 0;
  for (; c + L <= columns; c += L) {
    fetch_ahead(row + first + c);
    store(z + c, transform(load(row + first + c), first + c, int64_t(L), derivative));
    if (derivatives) store(derivatives + c, derivative);
  }
  if (c < columns) {
    T rest[L] = {};
    std::memcpy(rest, row + first + c, (columns - c) * sizeof(T));
    store(z + c, transform(load(rest), first + c, columns - c, derivative));
    if (derivatives) store(derivatives + c, derivative);
  }
  const int64_t padded = (columns + 2 * L - 1) / (2 * L) * (2 * L);
  for (c = columns; c < padded; c++) z[c] = -acc_t<T>(INFINITY);
  return padded;
}

template <class V>
GK_INLINE auto largest(V v) {
  auto m = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(m)); i++) m = v[i] > m ? v[i] : m;
  return m;
}

// Maximum of n elements, n a multiple of two vectors. Nan is ignored: the sums meet it.
template <class E>
acc_t<E> maximum(const E* p, int64_t n) {
  constexpr int L = kLanes<E>;
  using V = vec_t<E>;
  V m0 = splat<V>(-acc_t<E>(INFINITY)), m1 = m0;
  for (int64_t c = 0; c < n; c += 2 * L) {
    V a, b;
    load_pair(p + c, a, b);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
  }
  return largest(vmax(m0, m1));
}

// Sums of exp(x), x exp(x) and, with `Squares`, exp(2 x), x = slope * p[c] - shift, over n elements, n a multiple of two vectors;
// leaves exp(x) in `kept`, in the order of load_pair, unless that is null. Returns the maximum of x.
template <bool Squares, class E>
GK_INLINE acc_t<E> sums(const E* p, int64_t n, acc_t<E> slope, acc_t<E> shift, double& others, double& moment, double& squares,
                        acc_t<E>* kept) {
  constexpr int L = kLanes<E>;
  using V = vec_t<E>;
  V s0 = {}, s1 = {}, u0 = {}, u1 = {}, q0 = {}, q1 = {}, top = splat<V>(-acc_t<E>(INFINITY));
  for (int64_t c = 0; c < n; c += 2 * L) {
    V a, b;
    fetch_ahead(p + c);
    load_pair(p + c, a, b);
    a = a * slope - shift;
    b = b * slope - shift;
    top = vmax(b, vmax(a, top));
    const V ea = exp_clamping(a), eb = exp_clamping(b);
    s0 = s0 + ea;
    s1 = s1 + eb;
    u0 = u0 + a * ea;
    u1 = u1 + b * eb;
    if constexpr (Squares) {
      q0 = q0 + ea * ea;
      q1 = q1 + eb * eb;
    }
    if (kept) {
      store(kept + c, ea);
      store(kept + c + L, eb);
    }
  }
  add_lanes(s0 + s1, others);
  add_lanes(u0 + u1, moment);
  if constexpr (Squares) add_lanes(q0 + q1, squares);
  return largest(top);
}

// exp(z - shift of its block) of a whole row, so that a second visit needs no exponential: 4 bytes per column out of the second-level
// cache instead of some 12 instructions, 3.2 ms instead of 8. The target's entry is 0.
template <class A>
struct Kept {
  A* values;       // [columns], rounded up to two vectors
  double* shifts;  // [blocks]
};

template <class T>
bool is_plain(const VectorTransform<T>& transform, int64_t first, int64_t n, int64_t target) {
  return transform.linear && n == kBlock<T> && (target < first || target >= first + n);
}

// The statistics of the columns of one fixed tile, from nothing; their `max` is the maximum up to rounding.
template <template <class> class Statistics, class T>
Statistics<double> of_tile(const T* row, int64_t begin, int64_t end, int64_t target, const VectorTransform<T>& transform,
                           const Kept<acc_t<T>>* kept) {
  using A = acc_t<T>;
  constexpr bool squared = has_squares<Statistics<double>>;
  alignas(64) A z[kBlock<T> + 2 * kLanes<T>];
  Statistics<double> stats;
  for (int64_t first = begin; first < end; first += kBlock<T>) {
    const int64_t n = end - first < kBlock<T> ? end - first : kBlock<T>;
    A* values = kept ? kept->values + first : nullptr;
    double others = 0, moment = 0, squares = 0, shift = stats.max;
    if (is_plain(transform, first, n, target)) {
      // Sums relative to the maximum of the first columns. Where others exceed it by much, x exp(x) would lose digits.
      if (first == begin) shift = double(maximum(row + first, kFirstColumns) * transform.slope);
      A top = INFINITY;
      if (shift > -INFINITY) {
        raise_max(stats, shift);
        top = sums<squared>(row + first, n, transform.slope, A(shift), others, moment, squares, values);
      }
      if (top > 4) {
        others = moment = squares = 0;
        raise_max(stats, double(maximum(row + first, n) * transform.slope));
        shift = stats.max;
        const A finite_shift = shift > -INFINITY ? A(shift) : A(0);
        sums<squared>(row + first, n, transform.slope, finite_shift, others, moment, squares, values);
      }
      stats.others += others;
      stats.moment += moment;
      if constexpr (squared) stats.squares += squares;
      if (top <= 4) raise_max(stats, shift + double(top));
    } else {
      const int64_t padded = fill(row, first, n, transform, z);
      raise_max(stats, double(maximum(z, padded)));
      shift = stats.max;
      const A finite_shift = shift > -INFINITY ? A(shift) : A(0);
      if (target >= first && target < first + n) {
        const double zt = z[target - first], x = zt - double(finite_shift);
        stats.target = zt;
        if (zt != -INFINITY) moment = x * std::exp(x);
        z[target - first] = -A(INFINITY);
      }
      sums<squared>(z, padded, A(1), finite_shift, others, moment, squares, values);
      stats.others += others;
      stats.moment += moment;
      if constexpr (squared) stats.squares += squares;
    }
    if (kept) kept->shifts[first / kBlock<T>] = shift;
  }
  return stats;
}

// Merges the row's tiles into `parts` of them, of which there are one or as many as tiles.
template <template <class> class Statistics, class T>
void fold_row(const T* row, int64_t columns, int64_t target, const VectorTransform<T>& transform, const Kept<acc_t<T>>* kept,
              Statistics<acc_t<T>>* stats, int64_t parts) {
  using A = acc_t<T>;
  for (int64_t begin = 0; begin < columns; begin += kTileColumns) {
    const int64_t end = columns - begin < kTileColumns ? columns : begin + kTileColumns;
    auto& into = stats[parts == 1 ? 0 : begin / kTileColumns];
    const auto tile = as<A>(of_tile<Statistics>(row, begin, end, target, transform, kept));
    into = as<A>(merged(as<double>(into), as<double>(tile)));
  }
}

// The parts of a row merged.
template <class A, template <class> class Statistics>
Statistics<double> of_parts(const Statistics<A>* stats, int64_t parts) {
  Statistics<double> sum;
  for (int64_t i = 0; i < parts; i++) sum = as<double>(as<A>(merged(sum, as<double>(stats[i]))));
  return sum;
}

// out[c] = weight * exp(z - max), from what fold_row kept of a row
template <class T>
void scale_row(const T* in, T* out, int64_t columns, int64_t target, const VectorTransform<T>& transform,
               const Kept<acc_t<T>>& kept, double max, double weight) {
  using V = vec_t<T>;
  constexpr int L = kLanes<T>;
  for (int64_t first = 0; first < columns; first += kBlock<T>) {
    const int64_t n = columns - first < kBlock<T> ? columns - first : kBlock<T>;
    const acc_t<T>* values = kept.values + first;
    const acc_t<T> w = acc_t<T>(weight * std::exp(kept.shifts[first / kBlock<T>] - max));
    if (is_plain(transform, first, n, target)) {
      for (int64_t c = 0; c < n; c += 2 * L) {
        store_pair(out + first + c, load(values + c) * w, load(values + c + L) * w);
      }
    } else {
      map_row(in + first, out + first, n, true, [&](V, int64_t c, int64_t) { return load(values + c) * w; });
    }
  }
}

// out[c] = weight * exp(z - shift)
template <class T>
void exp_row(const T* in, T* out, int64_t columns, const VectorTransform<T>& transform, acc_t<T> shift, acc_t<T> weight) {
  using V = vec_t<T>;
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  if (transform.linear) {
    const acc_t<T> slope = transform.slope;
    for (; c + 2 * L <= columns; c += 2 * L) {
      V a, b;
      fetch_ahead(in + c);
      load_pair(in + c, a, b);
      a = a * slope - shift;
      b = b * slope - shift;
      store_pair(out + c, exp_clamping<kDigits<T>>(a) * weight, exp_clamping<kDigits<T>>(b) * weight);
    }
  }
  map_row(in + c, out + c, columns - c, true, [&](V raw, int64_t column, int64_t lanes) {
    V derivative, x = transform(raw, c + column, lanes, derivative) - shift;
    return exp_clamping<kDigits<T>>(x) * weight;
  });
}

template <class T>
void gradient_row(const T* in, T* out, int64_t columns, int64_t target, const VectorTransform<T>& transform,
                  const RowGradient<double>& d, const Kept<acc_t<T>>* kept) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  if (d.idle) {
    if (columns > 0) std::memset(static_cast<void*>(out), 0, columns * sizeof(T));  // an empty tile has no address
    return;
  }
  const bool has_target = target >= 0 && target < columns, capped = d.capped, entropy = d.g_entropy != 0;
  double at_target = d.at_target;
  if (has_target && capped) {
    const double raw = double(load_scalar(in + target)) + (transform.bias ? transform.bias[target] : 0);
    at_target *= tanh_slope(raw * transform.share_slope);
  }
  const A weight = A(d.weight), shift = A(d.shift), log_sum = A(d.log_sum), inv_sum = A(std::exp(-d.log_sum));
  const A g_entropy = A(d.g_entropy), h = A(d.entropy);
  if (kept && !capped && !entropy) {
    scale_row(in, out, columns, target, transform, *kept, d.shift, d.weight);
  } else if (!capped && !entropy) {
    exp_row(in, out, columns, transform, shift, weight);
  } else {
    map_row(in, out, columns, transform.bias, [&](V raw, int64_t column, int64_t lanes) {
      V derivative, x = transform(raw, column, lanes, derivative) - shift;
      const V e = exp_clamping<kDigits<T>>(x);
      V dz = weight * e;
      if (entropy) dz = dz - g_entropy * (e * inv_sum * (x - log_sum + h));
      return capped ? dz * derivative : dz;
    });
  }
  if (has_target) store_scalar(out + target, A(at_target));
}

// Where the elements of a row are.
template <class T>
struct Span {
  T* data;
  int64_t columns;

  Span(const Matrix& matrix, const int64_t* ranges, int64_t r)
      : data(ranges ? static_cast<T*>(matrix.data) + ranges[2 * r] : row_of<T>(matrix, r)),
        columns(ranges ? ranges[2 * r + 1] - ranges[2 * r] : matrix.columns) {}
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Room for n elements on a cache line's border, or null: a vector that lies across two lines takes two accesses.
template <class E>
std::unique_ptr<E[], Free> room_for(int64_t n) {
  const size_t bytes = (n * sizeof(E) + 63) / 64 * 64;
  return std::unique_ptr<E[], Free>(n ? static_cast<E*>(std::aligned_alloc(64, bytes)) : nullptr);
}

// Calls f(r, kept) for every row; kept are two, of which the first `keep` have room, or null.
template <class T, class F>
void for_each_row(const Matrix& tile, int threads, int keep, F f) {
  using A = acc_t<T>;
  (void)threads;
  const int64_t per_task = tile.rows >= 4 * kRowsPerTask * threads ? kRowsPerTask : 1;
  const int64_t tasks = (tile.rows + per_task - 1) / per_task;
  const int64_t blocks = keep ? (tile.columns + kBlock<T> - 1) / kBlock<T> : 0;
#pragma omp parallel num_threads(threads)
  {
    // No memory for it: exponentials are taken twice.
    const auto values = room_for<A>(keep * blocks * kBlock<T>);
    const auto shifts = room_for<double>(keep * blocks);
    const bool has_room = values && shifts, two = has_room && keep > 1;
    const Kept<A> kept[2] = {{values.get(), shifts.get()},
                             {two ? values.get() + blocks * kBlock<T> : nullptr, two ? shifts.get() + blocks : nullptr}};
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t end = (task + 1) * per_task < tile.rows ? (task + 1) * per_task : tile.rows;
      for (int64_t r = task * per_task; r < end; r++) {
        f(r, has_room ? kept : nullptr);
      }
    }
  }
}

}  // namespace
}  // namespace grpo_kernels
