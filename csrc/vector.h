// Vectors of one register's width on GCC and Clang vector extensions: loads, stores and elementary functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "row_math.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#ifndef GK_VECTOR_BYTES
#define GK_VECTOR_BYTES 16
#endif

namespace grpo_kernels {
// Unnamed: variants built for different instruction sets must not share a function through the linker.
namespace {

#define GK_INLINE inline __attribute__((always_inline))

struct bfloat16 {
  uint16_t bits;
};

typedef float vfloat __attribute__((vector_size(GK_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(GK_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(GK_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(GK_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(GK_VECTOR_BYTES / 2)));

template <class T>
struct Arithmetic {
  using scalar = float;
  using vector = vfloat;
};
template <>
struct Arithmetic<double> {
  using scalar = double;
  using vector = vdouble;
};
template <class T>
using acc_t = typename Arithmetic<T>::scalar;
template <class T>
using vec_t = typename Arithmetic<T>::vector;
template <class T>
constexpr int kLanes = GK_VECTOR_BYTES / sizeof(acc_t<T>);

template <class V, class S>
GK_INLINE V splat(S s) {
  return s - V{};  // s - 0 keeps -0
}

// Both return the second argument where either is nan, as x86's instructions do. GCC 12 makes a compare and a blend of the plain
// expression, hence the intrinsics.
template <class V>
GK_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
GK_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
#if GK_VECTOR_BYTES == 64 && defined(__AVX512F__)
GK_INLINE vfloat vmax(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
GK_INLINE vfloat vmin(vfloat a, vfloat b) { return _mm512_min_ps(a, b); }
#elif GK_VECTOR_BYTES == 32 && defined(__AVX__)
GK_INLINE vfloat vmax(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
GK_INLINE vfloat vmin(vfloat a, vfloat b) { return _mm256_min_ps(a, b); }
#elif GK_VECTOR_BYTES == 16 && defined(__SSE2__)
GK_INLINE vfloat vmax(vfloat a, vfloat b) { return _mm_max_ps(a, b); }
GK_INLINE vfloat vmin(vfloat a, vfloat b) { return _mm_min_ps(a, b); }
#endif

// Round to nearest even. Nan stays nan: the carry could otherwise run through a mantissa of ones into the sign.
GK_INLINE vuint round_to_bfloat16(vfloat x) {  // result in the upper halves, lower halves undefined
  vuint u;
  std::memcpy(&u, &x, sizeof u);
  const vuint rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return x == x ? rounded : (u | 0x400000u);
}

GK_INLINE float load_scalar(const float* p) { return *p; }
GK_INLINE double load_scalar(const double* p) { return *p; }
GK_INLINE float load_scalar(const bfloat16* p) {
  const uint32_t u = uint32_t(p->bits) << 16;
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
GK_INLINE void store_scalar(float* p, float x) { *p = x; }
GK_INLINE void store_scalar(double* p, double x) { *p = x; }
GK_INLINE void store_scalar(bfloat16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  p->bits = uint16_t((x == x ? u + 0x7fffu + ((u >> 16) & 1u) : (u | 0x400000u)) >> 16);
}

GK_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GK_INLINE vdouble load(const double* p) {
  vdouble v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GK_INLINE vfloat load(const bfloat16* p) {
  vhalf h;
  std::memcpy(&h, p, sizeof h);
  const vuint u = __builtin_convertvector(h, vuint) << 16;
  vfloat v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}
GK_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
GK_INLINE void store(double* p, vdouble v) { std::memcpy(p, &v, sizeof v); }
GK_INLINE void store(bfloat16* p, vfloat v) {
  const vhalf h = __builtin_convertvector(round_to_bfloat16(v) >> 16, vhalf);
  std::memcpy(p, &h, sizeof h);
}

// Two vectors at once, in any order of columns that store_pair restores: even and odd columns of bfloat16 come apart with one
// shift and one mask, where widening in order takes a cross-lane shuffle each.
template <class T>
GK_INLINE void load_pair(const T* p, vec_t<T>& a, vec_t<T>& b) {
  a = load(p);
  b = load(p + kLanes<T>);
}
GK_INLINE void load_pair(const bfloat16* p, vfloat& a, vfloat& b) {
  vuint u;
  std::memcpy(&u, p, sizeof u);
  const vuint even = u << 16, odd = u & 0xffff0000u;
  std::memcpy(&a, &even, sizeof a);
  std::memcpy(&b, &odd, sizeof b);
}
template <class T>
GK_INLINE void store_pair(T* p, vec_t<T> a, vec_t<T> b) {
  store(p, a);
  store(p + kLanes<T>, b);
}
GK_INLINE void store_pair(bfloat16* p, vfloat a, vfloat b) {
  const vuint u = (round_to_bfloat16(a) >> 16) | (round_to_bfloat16(b) & 0xffff0000u);
  std::memcpy(p, &u, sizeof u);
}

template <class V, class S>
GK_INLINE void add_lanes(V v, S& sum) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  for (int i = 0; i < n; i++) sum += v[i];
}

// Enough for a result that is rounded to bfloat16 next: degree 4, relative error 1e-5. Otherwise degree 6, 1 ulp.
enum class Digits { full, bfloat16 };

// p, r and scale of e^x = (1 + p r) scale, scale a power of 2, for x in [-88, 88].
template <Digits kDigits>
GK_INLINE vfloat exp_parts(vfloat x, vfloat& r, vfloat& scale) {
  // Adding 1.5 * 2^23 rounds to an integer; + 127 leaves the biased exponent in the low bits, 0 (so a factor of 0) at -127.
  const float magic = 12582912.0f + 127.0f;
  const vfloat t = x * 1.44269504f + magic;
  const vfloat n = t - magic;
  vfloat p;
  if (kDigits == Digits::full) {
    r = x - n * 0.693359375f;  // ln 2 in two parts, the first of 9 bits, so that n times it is exact
    r = r + n * 2.12194440e-4f;
    p = r * 1.38435595e-3f + 8.37423559e-3f;
    p = p * r + 4.16680090e-2f;
    p = p * r + 0.166664302f;
    p = p * r + 0.49999994f;
    p = p * r + 1.0f;
  } else {
    r = x - n * 0.693147181f;
    p = r * 4.15135175e-2f + 0.167877108f;
    p = p * r + 0.500030279f;
    p = p * r + 0.999966681f;
  }
  vuint u;
  std::memcpy(&u, &t, sizeof u);
  u = u << 23;
  std::memcpy(&scale, &u, sizeof scale);
  return p;
}

// e^x for x below 88; 0 below -87.7 (denormal results are flushed), nan for nan. x itself is raised to at least -88, so that
// x e^x is 0 and not nan where e^x is 0.
template <Digits kDigits = Digits::full>
GK_INLINE vfloat exp_clamping(vfloat& x) {
  x = vmax(splat<vfloat>(-88.0f), x);
  vfloat r, scale;
  const vfloat p = exp_parts<kDigits>(x, r, scale);
  return (p * r + 1.0f) * scale;
}

template <Digits = Digits::full>
GK_INLINE vdouble exp_clamping(vdouble& x) {
  x = vmax(splat<vdouble>(-746.0), x);
  vdouble e = {};
  for (int i = 0; i < int(sizeof(vdouble) / sizeof(double)); i++) e[i] = std::exp(x[i]);
  return e;
}

// tanh and its derivative 1 - tanh^2, that without its cancellation. Full digits: relative error about 2 ulp on the whole line;
// otherwise absolute error 1e-7 of tanh, below a bfloat16 logit's own.
template <Digits kDigits = Digits::full>
GK_INLINE vfloat vtanh(vfloat x, vfloat& derivative) {
  vfloat twice = vmin(splat<vfloat>(87.0f), x + x);
  const vfloat e = exp_clamping(twice), inverse = 1.0f / (e + 1.0f);
  const vfloat large = 1.0f - 2.0f * inverse;
  derivative = 4.0f * (e * inverse) * inverse;
  if (kDigits == Digits::bfloat16) return large;
  const vfloat u = x * x;
  vfloat p = u * -5.70498699e-3f + 2.06390861e-2f;
  p = p * u - 5.37397154e-2f;
  p = p * u + 0.133314416f;
  p = p * u - 0.333332807f;
  return u < 0.625f * 0.625f ? x + x * (u * p) : large;
}
template <Digits = Digits::full>
GK_INLINE vdouble vtanh(vdouble x, vdouble& derivative) {
  for (int i = 0; i < int(sizeof(vdouble) / sizeof(double)); i++) {
    derivative[i] = tanh_slope(x[i]);
    x[i] = std::tanh(x[i]);
  }
  return x;
}

// e^x - 1 of x <= 0, relative error about 2 ulp; -1 of -inf.
GK_INLINE vfloat expm1_of_negative(vfloat x) {
  vfloat r, scale;
  const vfloat p = exp_parts<Digits::full>(vmax(splat<vfloat>(-88.0f), x), r, scale);
  return p * r * scale + (scale - 1.0f);
}

// log(1 + t) of t in (-1, 0], relative error about 2 ulp. 1 + t = 2^k (1 + f), f in [-1/3, 1/3); f is taken from t, which has the
// digits that 1 + t has lost.
GK_INLINE vfloat log1p_of_negative(vfloat t) {
  const vfloat u = 1.0f + t;
  vuint bits;
  std::memcpy(&bits, &u, sizeof bits);
  bits = (bits - 0x3f2aaaabu) & 0xff800000u;  // k in the exponent's place
  vint k;
  std::memcpy(&k, &bits, sizeof k);
  bits = 0x3f800000u - bits;
  vfloat scale;  // 2^-k
  std::memcpy(&scale, &bits, sizeof scale);
  const vfloat f = t * scale + (scale - 1.0f);
  vfloat p = f * 0.138202295f - 0.151221797f;
  p = p * f + 0.140423104f;
  p = p * f - 0.164723262f;
  p = p * f + 0.200079188f;
  p = p * f - 0.250042379f;
  p = p * f + 0.333332658f;
  p = p * f - 0.5f;
  return __builtin_convertvector(k >> 23, vfloat) * 0.693147181f + (f * f * p + f);
}

}  // namespace
}  // namespace grpo_kernels
