// NT-Xent on CPUs that multiply bfloat16 (AMX, AVX512-BF16); csrc/ops/info_nce.h has the formulas and
// info_nce_kernel.cpp the plan, which is the same: tiles on and above the diagonal, round-robin over pairs of row
// blocks.
//
//   bfloat16 input: the products take z itself, which is exact, and 1/‖z_i‖ multiplies the float32 results.
//   other input:    ẑ as two or three bfloat16 terms for the similarities (info_nce.h says when), ẑ and G as two for
//                   the gradient (see bf16_tile.h). Only with AMX, where that is faster than float32.
//
// Positives stay in float32, as there. Arithmetic as there, times the number of products that terms make: 1, 3
// (two terms) or 6 (three); one exp for each of (2B)²/2 similarities in each direction. Scratch: z in two forms, in the
// backward pass four, of 2 bytes a number and term.
//
// Both products of the backward pass take G from the float32 blocks that the tile left, without transposing it:
//   dẐ_I  += G·Ẑ_J       G as operand A
//   dẐ_Jᵀ += Ẑ_Iᵀ·G      G as operand B; this part of the gradient is kept transposed
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

#include "csrc/common/bf16_tile.h"
#include "csrc/common/block_pairs.h"
#include "csrc/common/panel_tile.h"
#include "csrc/common/vec.h"
#include "csrc/ops/info_nce.h"

namespace sslfast {
namespace CPU_CAPABILITY {

#if !defined(CPU_CAPABILITY_AVX512)

void launch_info_nce_forward_bf16_cpu(const InfoNceForwardParams&) {}
void launch_info_nce_backward_bf16_cpu(const InfoNceBackwardParams&) {}

#else

SSLFAST_BEGIN_BF16_CODE
namespace {

constexpr float kNormEps = 1e-12f;
constexpr int64_t kMaxBlock = 256;

/// ⟨a, b⟩ of two rows, the same bits wherever it is called: forward and backward must agree on positives.
__attribute__((noinline)) float dot(const float* a, const float* b, int64_t dim) {
  Vec<float> sum{};
  for (int64_t d = 0; d < dim; d += 16) sum += load(a + d) * load(b + d);
  return sum_lanes<float>(sum);
}

/// z as operands of the three products; every block is contiguous, see bf16_tile.h. One term holds z, several hold ẑ.
template <int kTerms>
struct Operands {
  static constexpr int kGradTerms = info_nce_gradient_terms(kTerms);
  int64_t batch, count, rows, width, dim, block, blocks;  // rows and dim are padded
  float* inv_norm;                                        // 1/max(‖z‖, eps); multiplies the products of one term
  uint16_t *z_a, *z_b, *pairs, *zt_a;                     // the last two for the backward pass only

  Operands(int64_t batch_size, int64_t z_width, void* scratch, void* inv_norms)
      : batch(batch_size),
        count(2 * batch),
        rows(round_up(count, kInfoNcePad)),
        width(z_width),
        dim(round_up(width, kInfoNcePad)),
        block(info_nce_bf16_block_rows(count)),
        blocks((rows + block - 1) / block),
        inv_norm(static_cast<float*>(inv_norms)),
        z_a(static_cast<uint16_t*>(scratch)),     // A of Z·Zᵀ:  [dim/32][rows][32]
        z_b(z_a + kTerms * rows * dim),           // B of Z·Zᵀ:  [rows/16][dim/2][16][2]
        pairs(z_b + kTerms * rows * dim),         // B of G·Z:   [dim/16][rows/2][16][2]
        zt_a(pairs + kGradTerms * rows * dim) {}  // A of Zᵀ·G:  [rows/32][dim][32]

  int64_t term() const { return rows * dim; }
  int64_t begin(int64_t b) const { return b * block; }
  int64_t end(int64_t b) const { return (b + 1) * block < rows ? (b + 1) * block : rows; }
  int64_t positive(int64_t row) const { return row < batch ? row + batch : row - batch; }

  /// ⟨ẑ, ẑ⟩ of a row and its positive, whose z are given.
  double similarity(int64_t row, const float* own, const float* other) const {
    return dot(own, other, dim) * (static_cast<double>(inv_norm[row]) * inv_norm[positive(row)]);
  }

  Bf16Operand row_operand(int64_t row) const { return {z_a + row * 32, kBlockElements, rows * 32, term()}; }
  Bf16Operand column_operand(int64_t row) const { return {z_b + row * dim, 16 * dim, kBlockElements, term()}; }
  Bf16Operand sum_over_rows(int64_t row, int64_t col) const {
    return {pairs + col * rows + row * 16, 16 * rows, kBlockElements, term()};
  }
  Bf16Operand transposed(int64_t col, int64_t row) const {
    return {zt_a + row * dim + col * 32, kBlockElements, dim * 32, term()};
  }
};

/// One row of z in float32, padded with zeros.
template <int kTerms, typename Z>
void load_row(const Operands<kTerms>& z, const void* z1, const void* z2, int64_t row, float* out) {
  const Z* from =
      row < z.batch ? static_cast<const Z*>(z1) + row * z.width : static_cast<const Z*>(z2) + (row - z.batch) * z.width;
  const int64_t filled = row < z.count ? z.width : 0;
  for (int64_t d = 0; d < filled; ++d) out[d] = static_cast<float>(from[d]);
  for (int64_t d = filled; d < z.dim; ++d) out[d] = 0;
}

/// Where the norm overflows, 1/‖z‖ is 0 and ẑ zero, as in torch. The products of z are, too, if z is zero from the
/// start; a value that is not finite becomes NaN.
inline void zero_if_overflown(float inv_norm, float* row, int64_t dim) {
  if (inv_norm != 0) return;
  for (int64_t d = 0; d < dim; ++d) row[d] *= 0;
}

/// The same for a row whose 1/‖z‖ is known.
template <int kTerms, typename Z>
void load_known_row(const Operands<kTerms>& z, const void* z1, const void* z2, int64_t row, float* out) {
  load_row<kTerms, Z>(z, z1, z2, row, out);
  zero_if_overflown(z.inv_norm[row], out, z.dim);
}

/// Fills the operands of 32 rows: z_a by rounding, z_b as its transposed blocks; for the backward pass also pairs, by
/// interleaving rows of z_a, and zt_a as its transposed blocks.
template <int kTerms, bool kBackward, typename Z>
void pack_rows(const Operands<kTerms>& z, const void* z1, const void* z2, int64_t first, float* values) {
  for (int64_t row = first; row < first + 32; ++row) {
    load_row<kTerms, Z>(z, z1, z2, row, values);
    const float norm = std::sqrt(dot(values, values, z.dim));
    const float inv_norm = 1 / (norm < kNormEps ? kNormEps : norm);
    z.inv_norm[row] = inv_norm;
    zero_if_overflown(inv_norm, values, z.dim);
    for (int64_t d = 0; d < z.dim; d += 32) {
      Vec<float> x = load(values + d), y = load(values + d + 16);
      if (kTerms > 1) x *= inv_norm, y *= inv_norm;
      store_terms<kTerms>(x, y, z.z_a + d * z.rows + row * 32, z.term());
    }
  }
  for (int64_t term = 0; term < kTerms; ++term)
    for (int64_t d = 0; d < z.dim; d += 32) {
      const uint16_t* a = z.z_a + term * z.term() + d * z.rows + first * 32;
      for (int64_t half = 0; half < 32; half += 16)
        transpose_block(a + half * 32, z.z_b + term * z.term() + (first + half) * z.dim + d * 16);
      if (!kBackward || term >= z.kGradTerms) continue;
      for (int64_t half = 0; half < 32; half += 16) {
        uint16_t* pairs = z.pairs + term * z.term() + (d + half) * z.rows + first * 16;
        interleave_rows(a + half, pairs);
        transpose_block(pairs, z.zt_a + term * z.term() + first * z.dim + (d + half) * 32);
      }
    }
}

/// Which columns of a row's 32 count: not the row itself, its positive, or padding. As bits, the first column lowest.
uint32_t counted_columns(int64_t row, int64_t col, int64_t batch) {
  uint32_t counted = row < 2 * batch ? ~0u : 0u;
  for (const int64_t k : {row - col, row + batch - col, row - batch - col})
    if (k >= 0 && k < 32) counted &= ~(1u << k);
  if (2 * batch - col < 32) counted &= 2 * batch > col ? (1u << (2 * batch - col)) - 1 : 0u;
  return counted;
}

/// Whether all elements of a block on or above the diagonal count.
bool all_count(int64_t row, int64_t col, int64_t batch) {
  return row != col && std::abs(col - row - batch) >= 32 && col + 32 <= 2 * batch;
}

/// Columns of a block in two vectors, c = ⟨ẑ_i, ẑ_j⟩ of a row from the block's products and exp(s·c − s), which is 0
/// where a column does not count.
struct RowOfBlock {
  Vec<float> c[2], e[2];

  template <int kTerms>
  SSLFAST_INLINE RowOfBlock(const Operands<kTerms>& z, const float* products, float scale, int64_t row, int64_t col,
                            int64_t r, bool all) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      c[half] = load(products + half * kHalf + r * 16);
      if (kTerms == 1) c[half] *= z.inv_norm[row + r] * load(z.inv_norm + col + half * 16);
      e[half] = vec_exp(c[half] * scale - scale);
    }
    if (all) return;
    const uint32_t counted = counted_columns(row + r, col, z.batch);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto mask = static_cast<__mmask16>(counted >> (16 * half));
      c[half] = _mm512_maskz_mov_ps(mask, c[half]);
      e[half] = _mm512_maskz_mov_ps(mask, e[half]);
    }
  }
};

/// sum[row] += Σ exp(s·c − s) over the columns of tile (i, j), and the same for its columns.
template <typename Engine, int kTerms>
void add_tile_sums(const Operands<kTerms>& z, float scale, double* sum, int64_t i, int64_t j) {
  alignas(64) float row_sum[kMaxBlock * 16] = {};
  alignas(64) float c[2 * kHalf];
  for (int64_t col = z.begin(j); col < z.end(j); col += 32) {
    Vec<float> col_sum[2] = {};
    for (int64_t row = z.begin(i); row < z.end(i) && row <= col; row += 32) {
      Engine::template multiply<kTerms, false>(z.row_operand(row), z.column_operand(col), z.dim / 32, c, kHalf);
      const bool all = all_count(row, col, z.batch);
      Vec<float> block_sum[2] = {};
      for (int64_t r = 0; r < 32; ++r) {
        const RowOfBlock of(z, c, scale, row, col, r, all);
        float* partial = row_sum + (row - z.begin(i) + r) * 16;
        store(partial, load(partial) + (of.e[0] + of.e[1]));
        block_sum[0] += of.e[0];
        block_sum[1] += of.e[1];
      }
      if (row == col) continue;  // the block holds its pairs in both orders
      col_sum[0] += block_sum[0];
      col_sum[1] += block_sum[1];
    }
    for (int64_t k = 0; k < 32; ++k) sum[col + k] += col_sum[k / 16][k % 16];
  }
  for (int64_t row = z.begin(i); row < z.end(i); ++row)
    sum[row] += sum_lanes<float>(load(row_sum + (row - z.begin(i)) * 16));
}

template <typename Engine, int kTerms, typename Z>
void info_nce_forward_bf16_kernel(const InfoNceForwardParams& p) {
  const Operands<kTerms> z(p.batch, p.dim, p.rows, p.inv_norm);
  const float scale = static_cast<float>(p.scale);
  run_workers(z.blocks > 1 ? p.threads : 1, [&](const Worker& worker) {
    const Engine engine;
    float* values = static_cast<float*>(p.row_scratch) + worker.index * 3 * z.dim;
    worker.share(z.rows / 32, [&](int64_t group) {
      pack_rows<kTerms, false, Z>(z, p.z1, p.z2, group * 32, values);
      for (int64_t row = group * 32; row < group * 32 + 32; ++row) p.sum[row] = 0;
    });
    worker.barrier();
    for_each_block_pair(worker, z.blocks, [&](int64_t i, int64_t j) { add_tile_sums<Engine>(z, scale, p.sum, i, j); });
    worker.share(z.batch, [&](int64_t i) {
      load_known_row<kTerms, Z>(z, p.z1, p.z2, i, values);
      load_known_row<kTerms, Z>(z, p.z1, p.z2, i + z.batch, values + z.dim);
      const double similarity = z.similarity(i, values, values + z.dim);
      for (const int64_t row : {i, i + z.batch}) {
        const double loss = softplus(std::log(p.sum[row]) + scale - p.scale * similarity);
        static_cast<float*>(p.loss)[row] = static_cast<float>(loss);
        p.lse[row] = p.scale * similarity + loss;
      }
    });
  });
}

/// Gradients while a pass is running. grad: [dim/16][rows][16], grad_t: [rows/16][dim][16].
struct Gradient {
  float *grad, *grad_t;
  float* factor;  // s·w_i·exp(s − lse_i), 0 for padded rows
};

/// Writes G of a block as operand A (times 1/‖z_j‖ if z is not normalised) and as operand B (times 1/‖z_i‖), and
/// returns Σ G·c. products: of the block.
template <int kTerms>
float store_g_block(const Operands<kTerms>& z, const float* factor, const float* products, float scale, int64_t row,
                    int64_t col, uint16_t* g_a, uint16_t* g_b, int64_t g_b_half, int64_t g_term) {
  const bool all = all_count(row, col, z.batch);
  Vec<float> sum{};
  Vec<float> norm[2], col_factor[2];
  for (int half = 0; half < 2; ++half) {
    norm[half] = load(z.inv_norm + col + half * 16);
    col_factor[half] = load(factor + col + half * 16);
  }
  for (int64_t r = 0; r < 32; r += 2) {
    Vec<float> g[2][2];  // [row][half]
#pragma GCC unroll 2
    for (int64_t k = 0; k < 2; ++k) {
      const RowOfBlock of(z, products, scale, row, col, r + k, all);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        g[k][half] = of.e[half] * (col_factor[half] + factor[row + r + k]);
        sum += g[k][half] * of.c[half];
      }
      store_terms<Operands<kTerms>::kGradTerms>(kTerms == 1 ? g[k][0] * norm[0] : g[k][0],
                                                kTerms == 1 ? g[k][1] * norm[1] : g[k][1], g_a + (r + k) * 32, g_term);
      if (kTerms == 1) g[k][0] *= z.inv_norm[row + r + k], g[k][1] *= z.inv_norm[row + r + k];
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
      store_paired_terms<Operands<kTerms>::kGradTerms>(g[0][half], g[1][half], g_b + half * g_b_half + r * 16, g_term);
  }
  return sum_lanes<float>(sum);
}

/// The gradient that tile (i, j) gives to its two row blocks, added to gradient.grad and grad_t, or on the diagonal
/// written there. Of a tile on the diagonal only the blocks on and above it are made, and a block off it serves
/// twice, as in other tiles.
template <bool kDiagonal, typename Engine, int kTerms>
void add_tile_gradient(const Operands<kTerms>& z, float scale, const Gradient& gradient, uint16_t* g_a, double* row_dot,
                       int64_t i, int64_t j) {
  const int64_t row0 = z.begin(i), col0 = z.begin(j), rows = z.end(i) - row0, cols = z.end(j) - col0;
  const int64_t g_term = rows * cols;
  constexpr int kGradTerms = Operands<kTerms>::kGradTerms;
  uint16_t* g_b = g_a + kGradTerms * g_term;  // g_a: [cols/32][rows][32], g_b: [cols/16][rows/2][16][2]
  alignas(64) float c[2 * kHalf];
  double dot = 0;
  for (int64_t col = 0; col < cols; col += 32)
    for (int64_t row = 0; row < (kDiagonal ? col + 32 : rows); row += 32) {
      Engine::template multiply<kTerms, false>(z.row_operand(row0 + row), z.column_operand(col0 + col), z.dim / 32, c,
                                               kHalf);
      const float block_dot =
          store_g_block(z, gradient.factor, c, scale, row0 + row, col0 + col, g_a + col * rows + row * 32,
                        g_b + col * rows + row * 16, 16 * rows, g_term);
      dot += kDiagonal && row == col ? block_dot : 2 * block_dot;
    }
  // For the temperature's gradient, in which much cancels: Σ⟨ẑ, dẑ⟩ = Σ G·c, in float32.
  row_dot[row0] += dot;
  for (int64_t d = 0; d < z.dim; d += 32) {
    for (int64_t row = 0; row < rows; row += 32) {
      const int64_t from = kDiagonal ? row : 0;
      Engine::template multiply<kGradTerms, !kDiagonal>(
          {g_a + from * rows + row * 32, kBlockElements, rows * 32, g_term}, z.sum_over_rows(col0 + from, d),
          (cols - from) / 32, gradient.grad + d * z.rows + (row0 + row) * 16, 16 * z.rows);
    }
    for (int64_t col = 0; col < cols; col += 32)
      Engine::template multiply<kGradTerms, !kDiagonal>(
          z.transposed(d, row0), {g_b + col * rows, 16 * rows, kBlockElements, g_term}, (kDiagonal ? col : rows) / 32,
          gradient.grad_t + (col0 + col) * z.dim + d * 16, 16 * z.dim);
  }
}

/// Adds the transposed part of the gradient of 16 rows to the other.
template <int kTerms>
void add_transposed(const Operands<kTerms>& z, const Gradient& gradient, int64_t row) {
  alignas(64) float block[256];
  for (int64_t d = 0; d < z.dim; d += 16) {
    transpose_block(gradient.grad_t + row * z.dim + d * 16, block);
    float* grad = gradient.grad + d * z.rows + row * 16;
    for (int64_t k = 0; k < 256; k += 16) store(grad + k, load(grad + k) + load(block + k));
  }
}

/// The positive's share of dẑ of a row, and dẑ through the normalisation; see info_nce_kernel.cpp. values: 3·z.dim.
template <typename Z, int kTerms>
void finish_row(const InfoNceBackwardParams& p, const Operands<kTerms>& z, const Gradient& gradient, int64_t row,
                float* values) {
  float *own = values, *other = values + z.dim, *grad = values + 2 * z.dim;
  const int64_t positive = z.positive(row);
  load_known_row<kTerms, Z>(z, p.z1, p.z2, row, own);
  load_known_row<kTerms, Z>(z, p.z1, p.z2, positive, other);
  const float inv_norm = z.inv_norm[row], to_other_norm = z.inv_norm[positive];
  const double similarity = z.similarity(row, own, other);
  const double g = positive_gradient(p, row, positive, p.scale * similarity);
  p.row_dot[row] += g * similarity;
  const float to_other = static_cast<float>(g) * to_other_norm;
  Vec<float> sum{};
  for (int64_t d = 0; d < z.dim; d += 16) {
    const Vec<float> value = load(gradient.grad + d * z.rows + row * 16) + load(other + d) * to_other;
    store(grad + d, value);
    sum += value * load(own + d);
  }
  const bool tiny = inv_norm >= 1 / kNormEps;
  const float along = tiny ? 0 : sum_lanes<float>(sum) * inv_norm * inv_norm;
  Z* out =
      row < p.batch ? static_cast<Z*>(p.grad_z1) + row * p.dim : static_cast<Z*>(p.grad_z2) + (row - p.batch) * p.dim;
  for (int64_t d = 0; d < p.dim; ++d) {
    float value = (grad[d] - own[d] * along) * inv_norm;
    if (tiny && std::is_same_v<Z, c10::Half>) value = value > 65504 ? 65504 : value < -65504 ? -65504 : value;
    out[d] = static_cast<Z>(value);
  }
}

template <typename Engine, int kTerms, typename Z>
void info_nce_backward_bf16_kernel(const InfoNceBackwardParams& p) {
  const Operands<kTerms> z(p.batch, p.dim, p.rows, p.inv_norm);
  const float scale = static_cast<float>(p.scale);
  const Gradient gradient{static_cast<float*>(p.grad_rows), static_cast<float*>(p.grad_rows) + z.rows * z.dim,
                          static_cast<float*>(p.factor)};
  run_workers(z.blocks > 1 ? p.threads : 1, [&](const Worker& worker) {
    const Engine engine;
    float* values = static_cast<float*>(p.row_scratch) + worker.index * 3 * z.dim;
    worker.share(z.rows / 32, [&](int64_t group) {
      pack_rows<kTerms, true, Z>(z, p.z1, p.z2, group * 32, values);
      for (int64_t row = group * 32; row < group * 32 + 32; ++row) {
        const double factor = row < z.count ? row_weight(p, row) * std::exp(p.scale - p.lse[row]) : 0.0;
        gradient.factor[row] = static_cast<float>(factor);
        p.row_dot[row] = 0;
      }
    });
    worker.barrier();
    uint16_t* tile = static_cast<uint16_t*>(p.tiles) + worker.index * 2 * z.kGradTerms * z.block * z.block;
    for_each_block_pair(worker, z.blocks, [&](int64_t i, int64_t j) {
      if (i == j)
        add_tile_gradient<true, Engine>(z, scale, gradient, tile, p.row_dot, i, j);
      else
        add_tile_gradient<false, Engine>(z, scale, gradient, tile, p.row_dot, i, j);
    });
    worker.share(z.rows / 32, [&](int64_t group) {
      for (int64_t row = group * 32; row < group * 32 + 32; row += 16) add_transposed(z, gradient, row);
      for (int64_t row = group * 32; row < group * 32 + 32 && row < z.count; ++row)
        finish_row<Z>(p, z, gradient, row, values);
    });
  });
  double sum = 0;
  for (int64_t row = 0; row < z.count; ++row) sum += p.row_dot[row];
  *p.grad_temperature = -0.5 * p.scale * sum;
}

/// run<Engine, terms, Z>() for the best engine that is there and the input of `p`.
template <typename Params, typename Run>
void switch_engine(const Params& p, const Run& run) {
  const auto split = [&]<typename Z>(Z) {
    if (info_nce_terms(p.dtype, p.scale, p.dim) == 2)
      run.template operator()<Amx, 2, Z>();
    else
      run.template operator()<Amx, 3, Z>();
  };
  if (p.dtype == c10::ScalarType::Half) return split(c10::Half{});
  if (p.dtype == c10::ScalarType::Float) return split(float{});
  if (cpu_capability() == CpuCapability::Amx)
    run.template operator()<Amx, 1, c10::BFloat16>();
  else
    run.template operator()<DotProducts, 1, c10::BFloat16>();
}

}  // namespace

void launch_info_nce_forward_bf16_cpu(const InfoNceForwardParams& p) {
  switch_engine(p,
                [&]<typename Engine, int kTerms, typename Z>() { info_nce_forward_bf16_kernel<Engine, kTerms, Z>(p); });
}

void launch_info_nce_backward_bf16_cpu(const InfoNceBackwardParams& p) {
  switch_engine(
      p, [&]<typename Engine, int kTerms, typename Z>() { info_nce_backward_bf16_kernel<Engine, kTerms, Z>(p); });
}

SSLFAST_END_BF16_CODE
#endif

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
