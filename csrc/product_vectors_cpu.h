// The innermost part of a product with vector registers: a block of the result, its operands packed.
//
// An operand is packed in panels: `kRows` rows of a, or `kColumns` columns of b, the numbers of one k adjacent. The numbers that a
// ragged end lacks are zeros: a row or a column that is none meets no number of another.
#pragma once

#include <cstdint>
#include <cstring>

#include "transpose_cpu.h"
#include "vector.h"

namespace grpo_kernels {
namespace {

constexpr int64_t at_most(int64_t n, int64_t bound) { return n < bound ? n : bound; }

// T is a type of operands; they are packed as acc, the type of the sums.
template <class T>
struct VectorKernel {
  using Element = T;
  using Packed = acc_t<T>;
  using Acc = acc_t<T>;
  using V = vec_t<T>;
  static constexpr int L = kLanes<T>;
  // Sums, one k of b and one number of a fill the registers: 28 + 2 + 1 of 32, or 12 + 2 + 1 of 16.
  static constexpr int kRows = GK_VECTOR_BYTES == 64 ? 14 : 6;
  static constexpr int kColumns = 2 * L;
  static constexpr int64_t kDepth = 256;  // 32 KB of b with vectors of 64 bytes: two thirds of a first-level cache
  static constexpr int64_t kStep = 1;     // k that a panel is filled up to
  static constexpr bool kTiles = false;

  struct Session {};

  static void pack_a(const T* in, int64_t along, int64_t along_k, int64_t count, int64_t depth, Packed* out) {
    pack<kRows>(in, along, along_k, count, depth, out);
  }
  static void pack_b(const T* in, int64_t along, int64_t along_k, int64_t count, int64_t depth, Packed* out) {
    pack<kColumns>(in, along, along_k, count, depth, out);
  }

  // out [kRows, kColumns] = in (zeros if null) + a b, one chain over k; `rows` are asked for.
  template <bool>
  static void multiply(const Packed* a, const Packed* b, int64_t depth, const Acc* in, Acc* out, int64_t rows, int64_t) {
    if (rows > 8) return sums<kRows>(a, b, depth, in, out);
    if (rows > 4) return sums<at_most(8, kRows)>(a, b, depth, in, out);
    if (rows > 1) return sums<4>(a, b, depth, in, out);
    sums<1>(a, b, depth, in, out);
  }

 private:
  template <int R>
  static void sums(const Packed* a, const Packed* b, int64_t depth, const Acc* in, Acc* out) {
    V sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      sum[r][0] = in ? load(in + r * kColumns) : V{};
      sum[r][1] = in ? load(in + r * kColumns + L) : V{};
    }
    for (int64_t k = 0; k < depth; k++, a += kRows, b += kColumns) {
      const V first = load(b), second = load(b + L);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        sum[r][0] = sum[r][0] + first * a[r];
        sum[r][1] = sum[r][1] + second * a[r];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      store(out + r * kColumns, sum[r][0]);
      store(out + r * kColumns + L, sum[r][1]);
    }
  }

  template <int W>
  static void pack(const T* in, int64_t along, int64_t along_k, int64_t count, int64_t depth, Packed* out) {
    if (along == 1) {
      for (int64_t k = 0; k < depth; k++, in += along_k, out += W) copy<W>(in, count, out);
      return;
    }
    alignas(64) Packed rows[L * L], turned[L * L];
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t some = at_most(depth - k, L);
      for (int64_t i = 0; i < W; i += L) {
        for (int64_t j = 0; j < L; j++) {
          copy<L>(in + (i + j) * along + k, i + j < count ? some : 0, rows + j * L);
        }
        transpose_block(reinterpret_cast<const Word*>(rows), L, reinterpret_cast<Word*>(turned), L);
        constexpr int64_t whole = W < L ? W : L;
        if (i + L <= W || W < L) {
          for (int64_t j = 0; j < some; j++) std::memcpy(out + (k + j) * W + i, turned + j * L, whole * sizeof(Packed));
        } else {
          for (int64_t j = 0; j < some; j++) std::memcpy(out + (k + j) * W + i, turned + j * L, W % L * sizeof(Packed));
        }
      }
    }
  }

  using Word = std::conditional_t<sizeof(Packed) == 8, uint64_t, uint32_t>;

  // W numbers of which `count` are there.
  template <int W>
  GK_INLINE static void copy(const T* in, int64_t count, Packed* out) {
    if (count >= W) {
#pragma GCC unroll 2
      for (int i = 0; i + L <= W; i += L) store(out + i, load(in + i));
#pragma GCC unroll 16
      for (int i = W / L * L; i < W; i++) out[i] = load_scalar(in + i);
      return;
    }
    for (int64_t i = 0; i < W; i++) out[i] = i < count ? load_scalar(in + i) : Packed(0);
  }
};

}  // namespace
}  // namespace grpo_kernels
