// The innermost part of a product of bfloat16 with the tile registers of AMX: 32 x 32 numbers of the result, its operands packed.
//
// A panel has 32 rows of a or 32 columns of b. A step of it has 32 k and is two tiles of 1 KB, the first of 16 rows or columns. A
// tile of a is [16 rows, 32 k], of b [16 pairs of k, 16 columns, 2]. One instruction adds 32 k to 16 x 16 sums, in an order of its
// own that is the same for each of them. It takes 16 cycles, 5.2 ns here; of the loads beside it those from the second-level cache
// count: 2.7 of 3.2 TFLOP/s a core where one operand stays in the first-level cache, 1.7 where neither does.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "transpose_cpu.h"
#include "vector.h"

namespace grpo_kernels {
namespace {

struct TileKernel {
  using Element = bfloat16;
  using Packed = uint16_t;
  using Acc = float;
  static constexpr int kRows = 32, kColumns = 32;
  // 32 KB of the panel that stays in a first-level cache of 48 KB. With 640 k, 1024 rows of the other do not stay in the second
  // level.
  static constexpr int64_t kDepth = 512;
  static constexpr int64_t kStep = 32;
  static constexpr bool kTiles = true;
  static constexpr int64_t kTile = 512;  // numbers

  // Tile registers belong to a thread: they are set up for as long as it works here.
  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shape;
      _tile_loadconfig(&shape);
    }
    ~Session() { _tile_release(); }
  };

  static void pack_a(const bfloat16* in, int64_t along, int64_t along_k, int64_t count, int64_t depth, Packed* out) {
    alignas(64) Packed block[1024];
    for (int64_t k = 0; k < depth; k += 32, in += 32 * along_k, out += 1024) {
      const int64_t some = depth - k < 32 ? depth - k : 32;
      if (along_k == 1) {
        copy_rows(in, along, count, some, out);
      } else if (count >= 32 && some == 32) {
        transpose_block(reinterpret_cast<const Packed*>(in), along_k, out, 32);
      } else {
        copy_rows(in, along_k, some, count, block);
        transpose_block(block, 32, out, 32);
      }
    }
  }

  static void pack_b(const bfloat16* in, int64_t along, int64_t along_k, int64_t count, int64_t depth, Packed* out) {
    alignas(64) Packed block[1024];
    for (int64_t k = 0; k < depth; k += 32, in += 32 * along_k, out += 1024) {
      const int64_t some = depth - k < 32 ? depth - k : 32;
      const bool whole = count >= 32 && some == 32;
      if (along_k == 1) {
        if (!whole) copy_rows(in, along, count, some, block);
        const Packed* rows = whole ? reinterpret_cast<const Packed*>(in) : block;
        const int64_t stride = whole ? along : 32;
        for (int64_t half = 0; half < 2; half++) turn_pairs(rows + half * 16 * stride, stride, out + half * kTile);
      } else {
        if (!whole) copy_rows(in, along_k, some, count, block);
        interleave(whole ? reinterpret_cast<const Packed*>(in) : block, whole ? along_k : 32, out);
      }
    }
  }

  // out [32, 32] = in (zeros if null) + a b. The operand that is not the one in the first-level cache is `kStreamA`'s.
  template <bool kStreamA>
  static void multiply(const Packed* a, const Packed* b, int64_t depth, const Acc* in, Acc* out, int64_t rows, int64_t columns) {
    if (rows > 16) {
      if (columns > 16) return sums<kStreamA, 2, 2>(a, b, depth, in, out);
      return sums<kStreamA, 2, 1>(a, b, depth, in, out);
    }
    if (columns > 16) return sums<kStreamA, 1, 2>(a, b, depth, in, out);
    sums<kStreamA, 1, 1>(a, b, depth, in, out);
  }

 private:
  template <bool kStreamA, int TA, int TB>
  static void sums(const Packed* a, const Packed* b, int64_t depth, const Acc* in, Acc* out) {
    constexpr int64_t low = 16 * 32;  // of the block's lower half
    if (in) {
      _tile_stream_loadd(0, in, 128);
      if (TB > 1) _tile_stream_loadd(1, in + 16, 128);
      if (TA > 1) _tile_stream_loadd(2, in + low, 128);
      if (TA > 1 && TB > 1) _tile_stream_loadd(3, in + low + 16, 128);
    } else {
      _tile_zero(0);
      if (TB > 1) _tile_zero(1);
      if (TA > 1) _tile_zero(2);
      if (TA > 1 && TB > 1) _tile_zero(3);
    }
    // the sums that the next call starts from: 2.6 TFLOP/s where the loads above wait for them, 2.4 without
    const char* ahead = reinterpret_cast<const char*>(in + 1024);
    for (int64_t k = 0; k < depth; k += 32, a += 1024, b += 1024) {
      // a hint of the second level: what streams by does not push the other operand out of the first
      if constexpr (kStreamA) {
        _tile_stream_loadd(4, a, 64);
        if (TA > 1) _tile_stream_loadd(5, a + kTile, 64);
        _tile_loadd(6, b, 64);
      } else {
        _tile_loadd(4, a, 64);
        if (TA > 1) _tile_loadd(5, a + kTile, 64);
        _tile_stream_loadd(6, b, 64);
      }
      _tile_dpbf16ps(0, 4, 6);
      if (TA > 1) _tile_dpbf16ps(2, 5, 6);
      if constexpr (TB > 1) {
        if constexpr (kStreamA) {
          _tile_loadd(7, b + kTile, 64);
        } else {
          _tile_stream_loadd(7, b + kTile, 64);
        }
        _tile_dpbf16ps(1, 4, 7);
        if (TA > 1) _tile_dpbf16ps(3, 5, 7);
      }
      if (in) {
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) __builtin_prefetch(ahead + 64 * i);
        ahead += 320;
      }
    }
    _tile_stored(0, out, 128);
    if (TB > 1) _tile_stored(1, out + 16, 128);
    if (TA > 1) _tile_stored(2, out + low, 128);
    if (TA > 1 && TB > 1) _tile_stored(3, out + low + 16, 128);
  }

  // [32, 32] of which `rows` of `columns` numbers are there; zeros are what there is not.
  static void copy_rows(const void* from, int64_t stride, int64_t rows, int64_t columns, Packed* out) {
    const Packed* in = static_cast<const Packed*>(from);
    if (rows >= 32 && columns >= 32) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 32; i++) std::memcpy(out + i * 32, in + i * stride, 64);
      return;
    }
    const __mmask32 some = columns >= 32 ? ~__mmask32(0) : (__mmask32(1) << columns) - 1;
    for (int64_t i = 0; i < 32; i++) {
      _mm512_store_si512(out + i * 32, i < rows ? _mm512_maskz_loadu_epi16(some, in + i * stride) : _mm512_setzero_si512());
    }
  }

  // 16 rows of 32 k -> 16 pairs of k, 16 columns
  static void turn_pairs(const Packed* in, int64_t stride, Packed* out) {
    typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;
    alignas(64) Packed rows[kTile];
    if (stride % 2) {
      for (int64_t i = 0; i < 16; i++) std::memcpy(rows + i * 32, in + i * stride, 64);
      in = rows;
      stride = 32;
    }
    transpose_block(reinterpret_cast<const Pair*>(in), stride / 2, reinterpret_cast<Pair*>(out), 16);
  }

  // 32 k of 32 columns -> two tiles of 16 pairs of k, 16 columns
  static void interleave(const Packed* in, int64_t stride, Packed* out) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < 16; k++, in += 2 * stride, out += 32) {
      const __m512i even = _mm512_loadu_si512(in), odd = _mm512_loadu_si512(in + stride);
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(odd));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(odd, 1));
      _mm512_store_si512(out, _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(even)), _mm512_slli_epi32(low, 16)));
      _mm512_store_si512(out + kTile, _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(even, 1)),
                                                      _mm512_slli_epi32(high, 16)));
    }
  }
};

}  // namespace
}  // namespace grpo_kernels
