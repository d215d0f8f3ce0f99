// Products of bfloat16 blocks with float32 accumulation, on AMX tiles or with AVX512-BF16 dot products, and the layouts
// that both read. A number can be given as a sum of bfloat16 terms, each of which carries 8 bits of the mantissa: two
// make 16 bits and three make the 24 of float32. Products of terms t of A and u of B are summed for t + u < kTerms; the
// rest is as small as what the terms leave out. So one product becomes 3 with two terms (error about 2⁻¹⁷), 6 with
// three (2⁻²⁴).
//
// A block is 1 KiB, 16 rows of 64 bytes, as a tile register holds it:
//   operand A, 16 rows × 32 k:      [row][k]
//   operand B, 32 k × 16 columns:   [k / 2][column][k % 2]
//   result C,  16 rows × 16 columns [row][column], float32
// The 32-bit transpose of an A block of M is a B block of Mᵀ.
#pragma once

#if defined(CPU_CAPABILITY_AVX512)

#include <immintrin.h>

#include <cstdint>

#include "csrc/common/cpu_dispatch.h"
#include "csrc/common/vec.h"

// Code between these two may use the instructions; it runs only where cpu_capability() says that they exist.
#if defined(__clang__)
#define SSLFAST_BEGIN_BF16_CODE \
  _Pragma("clang attribute push(__attribute__((target(\"avx512bf16,amx-tile,amx-bf16\"))), apply_to = function)")
#define SSLFAST_END_BF16_CODE _Pragma("clang attribute pop")
#else
#define SSLFAST_BEGIN_BF16_CODE _Pragma("GCC push_options") _Pragma("GCC target(\"avx512bf16,amx-tile,amx-bf16\")")
#define SSLFAST_END_BF16_CODE _Pragma("GCC pop_options")
#endif

SSLFAST_BEGIN_BF16_CODE
namespace sslfast {
namespace CPU_CAPABILITY {

inline constexpr int64_t kBlockElements = 512;  // bfloat16 of a block

/// Where the four blocks of a 32-row (or 32-column) operand and its further k lie; strides in elements.
struct Bf16Operand {
  const uint16_t* data;
  int64_t half;  // from the first 16 rows (columns) to the next 16
  int64_t step;  // from 32 k to the next 32 k
  int64_t term;  // from one term to the next
};

/// Eight tile registers of 16 rows × 64 bytes for this thread; release_tiles() gives them back.
inline void configure_tiles() {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;                                                             // palette
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;  // bytes a row, rows
  __asm__ volatile("" ::"r"(config) : "memory");  // GCC's intrinsic names 8 of the 64 bytes as read
  _tile_loadconfig(config);
}
inline void release_tiles() { _tile_release(); }

inline constexpr int kTileStride = 64;

// Registers: 0–3 hold C, 4 and 5 A, 6 and 7 B.
inline void load_a_tiles(const uint16_t* from, int64_t half) {
  _tile_loadd(4, from, kTileStride);
  _tile_loadd(5, from + half, kTileStride);
}
inline void load_b_tiles(const uint16_t* from, int64_t half) {
  _tile_loadd(6, from, kTileStride);
  _tile_loadd(7, from + half, kTileStride);
}
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

/// c (32 × 32: blocks at c, c + 256 below it, c + c_half to its right) = or += A·B over 32·steps terms k.
template <int kTerms, bool kAccumulate>
inline void multiply_amx(const Bf16Operand& a, const Bf16Operand& b, int64_t steps, float* c, int64_t c_half) {
  __asm__ volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  if constexpr (kAccumulate) {
    _tile_loadd(0, c, kTileStride);
    _tile_loadd(1, c + c_half, kTileStride);
    _tile_loadd(2, c + 256, kTileStride);
    _tile_loadd(3, c + c_half + 256, kTileStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const uint16_t *a_k = a.data + k * a.step, *b_k = b.data + k * b.step;
#pragma GCC unroll 3
    for (int t = 0; t < kTerms; ++t) {  // u runs down and up again, so that B stays for two products where it can
      load_a_tiles(a_k + t * a.term, a.half);
#pragma GCC unroll 3
      for (int i = 0; i < kTerms - t; ++i) {
        const int u = t % 2 == 0 ? kTerms - t - 1 - i : i;
        if (t % 2 == 0 || i > 0) load_b_tiles(b_k + u * b.term, b.half);
        multiply_tiles();
      }
    }
  }
  _tile_stored(0, c, kTileStride);
  _tile_stored(1, c + c_half, kTileStride);
  _tile_stored(2, c + 256, kTileStride);
  _tile_stored(3, c + c_half + 256, kTileStride);
}

/// The same with dot-product instructions: 8 rows × 32 columns at a time in registers.
template <int kTerms, bool kAccumulate>
inline void multiply_avx512_bf16(const Bf16Operand& a, const Bf16Operand& b, int64_t steps, float* c, int64_t c_half) {
  for (int64_t row = 0; row < 32; row += 8) {
    __m512 acc[8][2];
    float* c_row = c + row * 16;
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        acc[r][v] = kAccumulate ? _mm512_loadu_ps(c_row + r * 16 + v * c_half) : _mm512_setzero_ps();
    const uint16_t* a_row = a.data + (row / 16) * a.half + (row % 16) * 32;
    for (int64_t k = 0; k < steps; ++k)
      for (int t = 0, u = 0; t < kTerms; u + 1 < kTerms - t ? ++u : (++t, u = 0)) {
        const uint16_t *a_k = a_row + k * a.step + t * a.term, *b_k = b.data + k * b.step + u * b.term;
        for (int pair = 0; pair < 16; ++pair) {
          const auto b0 = (__m512bh)_mm512_loadu_si512(b_k + pair * 32);
          const auto b1 = (__m512bh)_mm512_loadu_si512(b_k + b.half + pair * 32);
#pragma GCC unroll 8
          for (int r = 0; r < 8; ++r) {
            int32_t two;
            __builtin_memcpy(&two, a_k + r * 32 + pair * 2, 4);
            const auto av = (__m512bh)_mm512_set1_epi32(two);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], av, b0);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], av, b1);
          }
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c_row + r * 16 + v * c_half, acc[r][v]);
  }
}

/// The two ways as engines, a template argument of a kernel; one lives as long as its thread multiplies.
struct Amx {
  Amx() { configure_tiles(); }
  ~Amx() { release_tiles(); }
  template <int kTerms, bool kAccumulate>
  static void multiply(const Bf16Operand& a, const Bf16Operand& b, int64_t steps, float* c, int64_t c_half) {
    multiply_amx<kTerms, kAccumulate>(a, b, steps, c, c_half);
  }
};

struct DotProducts {
  DotProducts() {}
  template <int kTerms, bool kAccumulate>
  static void multiply(const Bf16Operand& a, const Bf16Operand& b, int64_t steps, float* c, int64_t c_half) {
    multiply_avx512_bf16<kTerms, kAccumulate>(a, b, steps, c, c_half);
  }
};

/// Element (row, col) of a 32 × 32 result of two halves of 16 columns.
inline constexpr int64_t kHalf = 512;

/// Where element (r, k) of a block is.
constexpr int64_t at(int64_t r, int64_t k) { return k / 16 * kHalf + r * 16 + k % 16; }

/// 16 × 16 transpose of 32-bit elements: four rounds, each of which exchanges squares of half the size.
inline void transpose_block(const void* from, void* to) {
  __m512i v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * 64);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int step = 8; step > 0; step /= 2) {
    const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
    const __m512i first = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - step));
    const __m512i second =
        _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(step)), upper, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & step) continue;
      const __m512i a = v[i], b = v[i + step];
      v[i] = _mm512_permutex2var_epi32(a, first, b);
      v[i + step] = _mm512_permutex2var_epi32(a, second, b);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<char*>(to) + i * 64, v[i]);
}

/// Two rows of 16 → 32 bfloat16, nearest even: first[0], first[1], … second[15].
inline __m512i to_bf16(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

/// first[0], second[0], first[1], second[1], …: what operand B wants of two rows k.
inline __m512i interleave(__m512i first_then_second) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_epi16(
      _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16)), first_then_second);
}

/// The two rows back in float32.
inline __m512 first_of(__m512i v) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16);
}
inline __m512 second_of(__m512i v) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16);
}

/// A row of operand A, k = 0…15 in x and 16…31 in y, as kTerms terms that lie `term` elements apart.
template <int kTerms>
inline void store_terms(__m512 x, __m512 y, uint16_t* out, int64_t term) {
#pragma GCC unroll 3
  for (int t = 0; t < kTerms; ++t) {
    const __m512i rounded = to_bf16(x, y);
    _mm512_storeu_si512(out + t * term, rounded);
    x -= first_of(rounded);
    y -= second_of(rounded);
  }
}

/// Two rows k of operand B, of 16 columns, in the same way.
template <int kTerms>
inline void store_paired_terms(__m512 x, __m512 y, uint16_t* out, int64_t term) {
#pragma GCC unroll 3
  for (int t = 0; t < kTerms; ++t) {
    const __m512i rounded = to_bf16(x, y);
    _mm512_storeu_si512(out + t * term, interleave(rounded));
    x -= first_of(rounded);
    y -= second_of(rounded);
  }
}

/// 16 columns of 32 rows of A blocks → the B block whose k are these rows.
inline void interleave_rows(const uint16_t* a, uint16_t* b) {
  for (int64_t pair = 0; pair < 16; ++pair) {
    const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + pair * 64));
    const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + pair * 64 + 32));
    _mm512_storeu_si512(b + pair * 32, interleave(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1)));
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast

SSLFAST_END_BF16_CODE

#endif
