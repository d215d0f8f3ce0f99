// csrc/common/panel_matrix.h with products of bfloat16 terms (csrc/common/bf16_tile.h): one term for bfloat16 data,
// which is exact; for other data three terms for similarities, as good as float32, and two for gradients.
#pragma once

#if defined(CPU_CAPABILITY_AVX512)

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>

#include "csrc/common/bf16_tile.h"
#include "csrc/common/panel_matrix.h"

SSLFAST_BEGIN_BF16_CODE
namespace sslfast {
namespace CPU_CAPABILITY {

/// 16 elements in float32, those from `valid` on zero.
inline __m512 load_16(const float* p, __mmask16 valid) { return _mm512_maskz_loadu_ps(valid, p); }
inline __m512 load_16(const c10::BFloat16* p, __mmask16 valid) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, p)), 16);
}
inline __m512 load_16(const c10::Half* p, __mmask16 valid) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, p));
}
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }

/// Multiply is Amx or DotProducts.
template <typename Multiply, typename Z_>
struct Bf16Engine {
  using Z = Z_;
  using T = float;
  static constexpr int64_t kWidth = 16;
  static constexpr int kTerms = std::is_same_v<Z, c10::BFloat16> ? 1 : 3;
  static constexpr int kGradTerms = kTerms == 1 ? 1 : 2;

  struct Matrix {
    int64_t rows, dim;  // padded
    uint16_t* a;        // operand A of M·Xᵀ:  [term][dim/32][rows][32]
    uint16_t* b;        // operand B of X·Mᵀ:  [term][rows/16][dim/2][16][2]
    uint16_t* pairs;    // operand B of W·M:   [term][dim/16][rows/2][16][2]
    uint16_t* at;       // operand A of Mᵀ·W:  [term][rows/32][dim][32]
    int64_t term() const { return rows * dim; }
  };

  static Matrix matrix(void* scratch, int64_t rows, int64_t dim, int use) {
    Matrix m{rows, dim, nullptr, nullptr, nullptr, nullptr};
    uint16_t* next = static_cast<uint16_t*>(scratch);
    const auto take = [&](uint16_t*& form, int terms) {
      form = next;
      next += terms * m.term();
    };
    if (use & kAsRows) take(m.a, kTerms);
    if (use & kAsColumns) take(m.b, kTerms);
    if (use & kAsColumns && use & kForGradients) take(m.pairs, kGradTerms);
    if (use & kAsRows && use & kForGradients) take(m.at, kGradTerms);
    return m;
  }

  static void pack(const Matrix& m, int64_t row, const Z* source, int64_t count, int64_t dim) {
    alignas(64) uint16_t a[kTerms * 1024], pairs[512];
    for (int64_t d = 0; d < m.dim; d += 32) {
      const __mmask16 left = first_lanes(dim - d), right = first_lanes(dim - d - 16);
      for (int64_t r = 0; r < 32; ++r) {
        const Z* from = source + (r < count ? r : 0) * dim + d;
        const bool real = r < count;
        store_terms<kTerms>(load_16(from, real ? left : 0), load_16(from + 16, real ? right : 0), a + r * 32, 1024);
      }
      for (int64_t t = 0; t < kTerms; ++t) {
        const uint16_t* block = a + t * 1024;
        if (m.a) std::memcpy(m.a + t * m.term() + d * m.rows + row * 32, block, 2048);
        for (int64_t half = 0; half < 32; half += 16) {
          if (m.b) transpose_block(block + half * 32, m.b + t * m.term() + (row + half) * m.dim + d * 16);
          if (t >= kGradTerms || !(m.pairs || m.at)) continue;
          interleave_rows(block + half, pairs);
          if (m.pairs) std::memcpy(m.pairs + t * m.term() + (d + half) * m.rows + row * 16, pairs, 1024);
          if (m.at) transpose_block(pairs, m.at + t * m.term() + row * m.dim + (d + half) * 32);
        }
      }
    }
  }

  /// Long rows are taken in pieces, so that a strip of K stays in the L1 cache.
  static constexpr int64_t kPiece = kTerms == 1 ? 384 : 128;

  void similarities(const Matrix& q, int64_t row, int64_t rows, const Matrix& k, int64_t col, int64_t cols, float scale,
                    float* tile) const {
    for (int64_t d = 0; d < q.dim; d += kPiece) {
      const int64_t steps = (q.dim - d < kPiece ? q.dim - d : kPiece) / 32;
      const bool last = d + kPiece >= q.dim;
      for (int64_t c = 0; c < cols; c += 32) {
        const Bf16Operand b{k.b + (col + c) * k.dim + d * 16, 16 * k.dim, kBlockElements, k.term()};
        for (int64_t r = 0; r < rows; r += 32) {
          const Bf16Operand a{q.a + d * q.rows + (row + r) * 32, kBlockElements, q.rows * 32, q.term()};
          float* block = tile + c * rows + r * 16;
          if (d == 0)
            Multiply::template multiply<kTerms, false>(a, b, steps, block, rows * 16);
          else
            Multiply::template multiply<kTerms, true>(a, b, steps, block, rows * 16);
          if (!last) continue;
          for (int64_t half = 0; half < 2; ++half)
            for (int64_t at = 0; at < 512; at += 16) {
              float* x = block + half * rows * 16 + at;
              store(x, load(x) * scale);
            }
        }
      }
    }
  }

  /// Writes the tile as operand A, [cols/32][rows][32], and if wanted behind it as operand B,
  /// [cols/16][rows/2][16][2]; 8 bytes an element with both of two terms.
  void prepare(const float* tile, int64_t rows, int64_t cols, void* weights, bool as_b) const {
    uint16_t* out = static_cast<uint16_t*>(weights);
    const int64_t term = rows * cols;
    for (int64_t c = 0; c < cols; c += 32)
      for (int64_t r = 0; r < rows; r += 2) {
        const float *left = tile + c * rows + r * 16, *right = left + rows * 16;
        uint16_t* a = out + c * rows + r * 32;
        store_terms<kGradTerms>(load(left), load(right), a, term);
        store_terms<kGradTerms>(load(left + 16), load(right + 16), a + 32, term);
        if (!as_b) continue;
        uint16_t* b = out + kGradTerms * term + c * rows + r * 16;
        store_interleaved(load(left), load(left + 16), b, term);
        store_interleaved(load(right), load(right + 16), b + 16 * rows, term);
      }
  }

  void add_row_sums(const float*, const void* weights, int64_t rows, const Matrix& k, int64_t col, int64_t cols,
                    float* sums, int64_t sums_rows, int64_t row) const {
    const uint16_t* w = static_cast<const uint16_t*>(weights);
    for (int64_t d = 0; d < k.dim; d += 32)
      for (int64_t r = 0; r < rows; r += 32)
        Multiply::template multiply<kGradTerms, true>(
            {w + r * 32, kBlockElements, rows * 32, rows * cols},
            {k.pairs + d * k.rows + col * 16, 16 * k.rows, kBlockElements, k.term()}, cols / 32,
            sums + d * sums_rows + (row + r) * 16, 16 * sums_rows);
  }

  /// These sums are kept transposed, [rows/16][dim][16]: sums[col…] += Wᵀ·Q[row…] is sumsᵀ += Qᵀ·W.
  void add_column_sums(const float*, const void* weights, int64_t cols, const Matrix& q, int64_t row, int64_t rows,
                       float* sums, int64_t, int64_t col) const {
    const int64_t term = rows * cols;
    const uint16_t* w = static_cast<const uint16_t*>(weights) + kGradTerms * term;
    for (int64_t d = 0; d < q.dim; d += 32)
      for (int64_t c = 0; c < cols; c += 32)
        Multiply::template multiply<kGradTerms, true>(
            {q.at + row * q.dim + d * 32, kBlockElements, q.dim * 32, q.term()},
            {w + c * rows, 16 * rows, kBlockElements, term}, rows / 32, sums + (col + c) * q.dim + d * 16, 16 * q.dim);
  }

  static void read_row_sum(const float* sums, int64_t sums_rows, int64_t dim, int64_t row, float* out) {
    for (int64_t d = 0; d < dim; d += 16) store(out + d, load(sums + d * sums_rows + row * 16));
  }
  static void read_column_sum(const float* sums, int64_t, int64_t dim, int64_t row, float* out) {
    const float* column = sums + row / 16 * 16 * dim + row % 16;
    for (int64_t d = 0; d < dim; ++d) out[d] = column[d * 16];
  }
  static void clear_row_sum(float* sums, int64_t sums_rows, int64_t dim, int64_t row) {
    for (int64_t d = 0; d < dim; d += 16) store(sums + d * sums_rows + row * 16, Vec<float>{});
  }
  static void scale_row_sum(float* sums, int64_t sums_rows, int64_t dim, int64_t row, float factor) {
    for (int64_t d = 0; d < dim; d += 16) {
      float* at = sums + d * sums_rows + row * 16;
      store(at, load(at) * factor);
    }
  }

 private:
  /// Two rows of 16 as a row pair of operand B.
  static void store_interleaved(Vec<float> first, Vec<float> second, uint16_t* out, int64_t term) {
#pragma GCC unroll 2
    for (int t = 0; t < kGradTerms; ++t) {
      const __m512i rounded = to_bf16(first, second);
      _mm512_storeu_si512(out + t * term, interleave(rounded));
      first -= first_of(rounded);
      second -= second_of(rounded);
    }
  }

  Multiply multiply_;  // holds the tile registers while the engine lives
};

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
SSLFAST_END_BF16_CODE

#endif
