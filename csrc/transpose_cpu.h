// A square block of a matrix, transposed in the registers of a processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "vector.h"

namespace grpo_kernels {
namespace {

typedef uint64_t vlong __attribute__((vector_size(GK_VECTOR_BYTES)));
constexpr int kWords = GK_VECTOR_BYTES / 8;

// Of every 2 H words, H of a from word `From` on, then as many of b.
template <int H, int From, int... I>
GK_INLINE vlong pick(vlong a, vlong b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I & H ? kWords + I - H + From : I + From)...);
#else
  return __builtin_shuffle(a, b, vlong{uint64_t(I & H ? kWords + I - H + From : I + From)...});
#endif
}

// Swaps the off-diagonal halves of every pair of 2 D byte groups: a = (a0 a1), b = (b0 b1) -> (a0 b0), (a1 b1).
template <int D>
GK_INLINE void exchange(vlong& a, vlong& b) {
  vlong first, second;
  if constexpr (D < 8) {
    constexpr int bits = 8 * D;
    constexpr uint64_t low = D == 2 ? 0x0000ffff0000ffffull : 0x00000000ffffffffull;
    first = (a & low) | ((b << bits) & ~low);
    second = ((a >> bits) & low) | (b & ~low);
  } else {
    first = pick<D / 8, 0>(a, b, std::make_integer_sequence<int, kWords>());
    second = pick<D / 8, D / 8>(a, b, std::make_integer_sequence<int, kWords>());
  }
  a = first;
  b = second;
}

template <int N, int D, int H>
GK_INLINE void exchange_rows(vlong (&v)[N]) {
#pragma GCC unroll 32
  for (int i = 0; i < N; i++) {
    if (!(i & H)) exchange<D>(v[i], v[i + H]);
  }
  if constexpr (H > 1) exchange_rows<N, D / 2, H / 2>(v);
}

// A square block of one register's width: out[j][i] = in[i][j].
template <class E>
GK_INLINE void transpose_block(const E* in, int64_t in_stride, E* out, int64_t out_stride) {
  constexpr int N = GK_VECTOR_BYTES / sizeof(E);
  vlong v[N];
#pragma GCC unroll 32
  for (int i = 0; i < N; i++) std::memcpy(&v[i], in + i * in_stride, sizeof(vlong));
  exchange_rows<N, GK_VECTOR_BYTES / 2, N / 2>(v);
#pragma GCC unroll 32
  for (int i = 0; i < N; i++) std::memcpy(out + i * out_stride, &v[i], sizeof(vlong));
}

}  // namespace
}  // namespace grpo_kernels
