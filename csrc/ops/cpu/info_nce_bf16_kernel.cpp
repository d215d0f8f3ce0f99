// NT-Xent on CPUs that multiply bfloat16 (AMX, AVX512-BF16); csrc/ops/info_nce.h has the formulas and
// info_nce_kernel.cpp the plan, which is the same: tiles on and above the diagonal, round-robin over pairs of row
// blocks.
//
//   bfloat16 input: the products take z itself, which is exact, and 1/‖z_i‖ multiplies the float32 results.
//   other input:    ẑ as three bfloat16 terms for the similarities, which are then as good as in float32, and two terms
//   of ẑ
//                   and G for the gradient (see bf16_tile.h). Only with AMX, where that is faster than float32.
//
// Arithmetic as there, times 1 for bfloat16 and times 6 (similarities) or 3 (gradients) for other input; one exp for
// each of (2B)²/2 similarities in each direction. Scratch: z in two forms, in the backward pass four, of 2 bytes a
// number and term.
//
// Both products of the backward pass take G from the float32 blocks that the tile left, without transposing it:
//   dẐ_I  += G·Ẑ_J       G as operand A
//   dẐ_Jᵀ += Ẑ_Iᵀ·G      G as operand B; this part of the gradient is kept transposed
#include <ATen/Parallel.h>
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

/// z as operands of the three products; every block is contiguous, see bf16_tile.h. One term holds z, three hold ẑ.
template <int kTerms>
struct Operands {
  static constexpr int kGradTerms = kTerms == 1 ? 1 : 2;
  int64_t count, rows, dim, block, blocks;  // rows and dim are padded
  float* inv_norm;                          // 1/max(‖z‖, eps); multiplies the products of one term
  uint16_t *z_a, *z_b, *pairs, *zt_a;

  Operands(int64_t batch, int64_t width, void* scratch, void* inv_norms)
      : count(2 * batch),
        rows(round_up(count, kInfoNcePad)),
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

  Bf16Operand row_operand(int64_t row) const { return {z_a + row * 32, kBlockElements, rows * 32, term()}; }
  Bf16Operand column_operand(int64_t row) const { return {z_b + row * dim, 16 * dim, kBlockElements, term()}; }
  Bf16Operand sum_over_rows(int64_t row, int64_t col) const {
    return {pairs + col * rows + row * 16, 16 * rows, kBlockElements, term()};
  }
  Bf16Operand transposed(int64_t col, int64_t row) const {
    return {zt_a + row * dim + col * 32, kBlockElements, dim * 32, term()};
  }
};

/// One row of z in float32.
template <typename Z>
void load_row(const Z* z1, const Z* z2, int64_t batch, int64_t dim, int64_t row, float* out) {
  const Z* z = row < batch ? z1 + row * dim : z2 + (row - batch) * dim;
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(z[d]);
}

/// Fills the operands: z_a by rounding, z_b as its transposed blocks; for the backward pass also pairs, by interleaving
/// rows of z_a, and zt_a as its transposed blocks.
template <int kTerms, bool kBackward, typename Z>
void pack_operands(const Operands<kTerms>& z, const Z* z1, const Z* z2, int64_t batch, int64_t dim,
                   float* row_scratch) {
  at::parallel_for(0, z.rows / 32, 2, [&](int64_t begin, int64_t end) {
    float* values = row_scratch + at::get_thread_num() * 2 * z.dim;
    std::memset(values, 0, z.dim * sizeof(float));
    for (int64_t first = begin * 32; first < end * 32; first += 32) {
      for (int64_t row = first; row < first + 32; ++row) {
        if (row < z.count)
          load_row(z1, z2, batch, dim, row, values);
        else
          std::memset(values, 0, z.dim * sizeof(float));
        Vec<float> squares{};
        for (int64_t d = 0; d < z.dim; d += 16) squares += load(values + d) * load(values + d);
        const float norm = std::sqrt(sum_lanes<float>(squares));
        const float inv_norm = 1 / (norm < kNormEps ? kNormEps : norm);
        z.inv_norm[row] = inv_norm;
        for (int64_t d = 0; d < z.dim; d += 32) {
          Vec<float> x = load(values + d), y = load(values + d + 16);
          uint16_t* out = z.z_a + d * z.rows + row * 32;
          if (kTerms > 1) x *= inv_norm, y *= inv_norm;
          store_terms<kTerms>(x, y, out, z.term());
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
  });
}

/// Zeroes the diagonal and what belongs to padded rows or columns.
void exclude(float* c, int64_t row, int64_t col, int64_t count) {
  for (int64_t r = 0; r < 32 && row == col; ++r) c[at(r, r)] = 0;
  if (row + 32 <= count && col + 32 <= count) return;
  for (int64_t r = 0; r < 32; ++r)
    for (int64_t k = 0; k < 32; ++k)
      if (row + r >= count || col + k >= count) c[at(r, k)] = 0;
}

/// Calls visit(r, k) for the elements of a block that pair a row with its positive.
template <typename Visit>
void for_each_positive(int64_t row, int64_t col, int64_t count, const Visit& visit) {
  const int64_t batch = count / 2;
  if (std::abs(std::abs(row - col) - batch) >= 32) return;
  for (int64_t r = 0; r < 32 && row + r < count; ++r) {
    const int64_t k = (row + r < batch ? row + r + batch : row + r - batch) - col;
    if (k >= 0 && k < 32) visit(r, k);
  }
}

/// c = ⟨ẑ_i, ẑ_j⟩ and e = exp(s·c − s), for rows row…row+31 and columns col…col+31.
template <typename Engine, int kTerms>
void exp_block(const Operands<kTerms>& z, float scale, int64_t row, int64_t col, float* c, float* e) {
  Engine::template multiply<kTerms, false>(z.row_operand(row), z.column_operand(col), z.dim / 32, c, kHalf);
  for (int64_t half = 0; half < 2; ++half) {
    const Vec<float> col_norm = load(z.inv_norm + col + half * 16);
    for (int64_t r = 0; r < 32; ++r) {
      Vec<float> similarity = load(c + half * kHalf + r * 16);
      if (kTerms == 1) {
        similarity *= z.inv_norm[row + r] * col_norm;
        store(c + half * kHalf + r * 16, similarity);
      }
      store(e + half * kHalf + r * 16, vec_exp(similarity * scale - scale));
    }
  }
  if (row == col || row + 32 > z.count || col + 32 > z.count) exclude(e, row, col, z.count);
}

template <typename Engine, int kTerms>
void add_tile_sums(const Operands<kTerms>& z, float scale, double* sum, float* positive, int64_t i, int64_t j) {
  const Engine engine;
  alignas(64) float row_sum[kMaxBlock * 16] = {};
  alignas(64) float c[2 * kHalf], e[2 * kHalf];
  for (int64_t col = z.begin(j); col < z.end(j); col += 32) {
    Vec<float> col_sum[2] = {};
    for (int64_t row = z.begin(i); row < z.end(i); row += 32) {
      exp_block<Engine>(z, scale, row, col, c, e);
      for_each_positive(row, col, z.count,
                        [&](int64_t r, int64_t k) { positive[row + r] = positive[col + k] = c[at(r, k)]; });
      for (int64_t r = 0; r < 32; ++r) {
        const Vec<float> left = load(e + r * 16), right = load(e + kHalf + r * 16);
        float* partial = row_sum + (row - z.begin(i) + r) * 16;
        store(partial, load(partial) + (left + right));
        col_sum[0] += left;
        col_sum[1] += right;
      }
    }
    if (i != j)
      for (int64_t k = 0; k < 32; ++k) sum[col + k] += col_sum[k / 16][k % 16];
  }
  for (int64_t row = z.begin(i); row < z.end(i); ++row)
    sum[row] += sum_lanes<float>(load(row_sum + (row - z.begin(i)) * 16));
}

template <typename Engine, int kTerms, typename Z>
void info_nce_forward_bf16_kernel(const InfoNceForwardParams& p) {
  const Operands<kTerms> z(p.batch, p.dim, p.rows, p.inv_norm);
  const float scale = static_cast<float>(p.scale);
  pack_operands<kTerms, false>(z, static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.batch, p.dim,
                               static_cast<float*>(p.row_scratch));
  for (int64_t row = 0; row < z.rows; ++row) p.sum[row] = 0;
  float* positive = static_cast<float*>(p.positive);
  for_each_block_pair(z.blocks, [&](int64_t i, int64_t j) { add_tile_sums<Engine>(z, scale, p.sum, positive, i, j); });
  at::parallel_for(0, z.count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      p.lse[row] = scale + std::log(p.sum[row]);
      static_cast<float*>(p.loss)[row] =
          static_cast<float>(negative_log_share(p.sum[row], positive[row], scale, scale));
    }
  });
}

/// Gradients and the tile's G while a pass is running. grad: [dim/16][rows][16], grad_t: [rows/16][dim][16].
struct Gradient {
  float *grad, *grad_t;
  const float* factor;  // s·w_i·exp(s − lse_i), 0 for padded rows
  const float* weight;  // s·w_i
};

/// e → G in place.
template <int kTerms>
void to_g(const Operands<kTerms>& z, const Gradient& gradient, float* e, int64_t row, int64_t col) {
  for (int64_t half = 0; half < 2; ++half) {
    const Vec<float> col_factor = load(gradient.factor + col + half * 16);
    for (int64_t r = 0; r < 32; ++r) {
      float* g = e + half * kHalf + r * 16;
      store(g, load(g) * (col_factor + gradient.factor[row + r]));
    }
  }
  for_each_positive(row, col, z.count,
                    [&](int64_t r, int64_t k) { e[at(r, k)] -= gradient.weight[row + r] + gradient.weight[col + k]; });
}

/// Writes a block of G as operand A (times 1/‖z_j‖ if z is not normalised) and as operand B
/// (times 1/‖z_i‖), and returns Σ G·c.
template <int kTerms>
float store_g_block(const Operands<kTerms>& z, const float* c, const float* g, int64_t row, int64_t col, uint16_t* g_a,
                    uint16_t* g_b, int64_t g_b_half, int64_t g_term) {
  Vec<float> sum{};
  const Vec<float> norm_left = load(z.inv_norm + col), norm_right = load(z.inv_norm + col + 16);
  for (int64_t r = 0; r < 32; r += 2) {
    Vec<float> left[2], right[2];
    for (int64_t k = 0; k < 2; ++k) {
      left[k] = load(g + (r + k) * 16);
      right[k] = load(g + kHalf + (r + k) * 16);
      sum += left[k] * load(c + (r + k) * 16) + right[k] * load(c + kHalf + (r + k) * 16);
      const Vec<float> a_left = kTerms == 1 ? left[k] * norm_left : left[k];
      const Vec<float> a_right = kTerms == 1 ? right[k] * norm_right : right[k];
      const __m512i hi = to_bf16(a_left, a_right);
      _mm512_storeu_si512(g_a + (r + k) * 32, hi);
      if (kTerms > 1)
        _mm512_storeu_si512(g_a + g_term + (r + k) * 32, to_bf16(a_left - first_of(hi), a_right - second_of(hi)));
      if (kTerms == 1) left[k] *= z.inv_norm[row + r + k], right[k] *= z.inv_norm[row + r + k];
    }
    for (int64_t half = 0; half < 2; ++half) {
      const Vec<float>* pair = half == 0 ? left : right;
      uint16_t* out = g_b + half * g_b_half + r * 16;
      const __m512i hi = to_bf16(pair[0], pair[1]);
      _mm512_storeu_si512(out, interleave(hi));
      if (kTerms > 1)
        _mm512_storeu_si512(out + g_term, interleave(to_bf16(pair[0] - first_of(hi), pair[1] - second_of(hi))));
    }
  }
  return sum_lanes<float>(sum);
}

template <typename Engine, int kTerms>
void add_tile_gradient(const Operands<kTerms>& z, float scale, const Gradient& gradient, uint16_t* g_a, double* row_dot,
                       int64_t i, int64_t j) {
  const Engine engine;
  const int64_t row0 = z.begin(i), col0 = z.begin(j), rows = z.end(i) - row0, cols = z.end(j) - col0;
  constexpr int kGradTerms = Operands<kTerms>::kGradTerms;
  const int64_t g_term = rows * cols;
  uint16_t* g_b = g_a + kGradTerms * g_term;  // g_a: [cols/32][rows][32], g_b: [cols/16][rows/2][16][2]
  alignas(64) float c[2 * kHalf], e[2 * kHalf];
  double dot = 0;
  for (int64_t col = 0; col < cols; col += 32)
    for (int64_t row = 0; row < rows; row += 32) {
      exp_block<Engine>(z, scale, row0 + row, col0 + col, c, e);
      to_g(z, gradient, e, row0 + row, col0 + col);
      dot += store_g_block(z, c, e, row0 + row, col0 + col, g_a + col * rows + row * 32, g_b + col * rows + row * 16,
                           16 * rows, g_term);
    }
  // For the temperature's gradient, in which much cancels: Σ⟨ẑ, dẑ⟩ = Σ G·c, in float32. G stands on both sides of the
  // diagonal.
  row_dot[row0] += i == j ? dot : 2 * dot;
  for (int64_t d = 0; d < z.dim; d += 32) {
    for (int64_t row = 0; row < rows; row += 32)
      Engine::template multiply<kGradTerms, true>({g_a + row * 32, kBlockElements, rows * 32, g_term},
                                                  z.sum_over_rows(col0, d), cols / 32,
                                                  gradient.grad + d * z.rows + (row0 + row) * 16, 16 * z.rows);
    if (i == j) continue;
    for (int64_t col = 0; col < cols; col += 32)
      Engine::template multiply<kGradTerms, true>(z.transposed(d, row0),
                                                  {g_b + col * rows, 16 * rows, kBlockElements, g_term}, rows / 32,
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

/// dẑ of a row through the normalisation; see info_nce_kernel.cpp. scratch: 2·z.dim, of which the padding is zero.
template <typename Z, int kTerms>
void finish_row(const InfoNceBackwardParams& p, const Operands<kTerms>& z, const Gradient& gradient, int64_t row,
                float* scratch) {
  float *own = scratch, *grad = scratch + z.dim;
  load_row(static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.batch, p.dim, row, own);
  const float inv_norm = z.inv_norm[row];
  Vec<float> sum{};
  for (int64_t d = 0; d < z.dim; d += 16) {
    const Vec<float> value = load(gradient.grad + d * z.rows + row * 16);
    store(grad + d, value);
    sum += value * load(own + d);
  }
  const float dot = sum_lanes<float>(sum) * inv_norm;
  const bool tiny = inv_norm >= 1 / kNormEps;
  const float along = tiny ? 0 : dot * inv_norm;
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
  const float* grad_loss = static_cast<const float*>(p.grad_loss);
  const float scale = static_cast<float>(p.scale);
  float *factor = static_cast<float*>(p.factor), *weight = static_cast<float*>(p.weight);
  float* row_scratch = static_cast<float*>(p.row_scratch);
  const Gradient gradient{static_cast<float*>(p.grad_rows), static_cast<float*>(p.grad_rows) + z.rows * z.dim, factor,
                          weight};
  pack_operands<kTerms, true>(z, static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.batch, p.dim, row_scratch);
  for (int64_t row = 0; row < z.rows; ++row) {
    const double w = row < z.count ? p.scale * p.grad_loss_factor * grad_loss[row * p.grad_loss_stride] : 0.0;
    weight[row] = static_cast<float>(w);
    factor[row] = row < z.count ? static_cast<float>(w * std::exp(scale - p.lse[row])) : 0.0f;
    p.row_dot[row] = 0;
  }
  at::parallel_for(0, 2 * z.rows, 512, [&](int64_t begin, int64_t end) {
    std::memset(gradient.grad + begin * z.dim, 0, (end - begin) * z.dim * sizeof(float));
  });
  for_each_block_pair(z.blocks, [&](int64_t i, int64_t j) {
    uint16_t* tile = static_cast<uint16_t*>(p.tiles) + at::get_thread_num() * 4 * z.block * z.block;
    add_tile_gradient<Engine>(z, scale, gradient, tile, p.row_dot, i, j);
  });
  at::parallel_for(0, z.rows / 32, 2, [&](int64_t begin, int64_t end) {
    float* scratch = row_scratch + at::get_thread_num() * 2 * z.dim;
    std::memset(scratch, 0, 2 * z.dim * sizeof(float));
    for (int64_t row = begin * 32; row < end * 32; row += 16) add_transposed(z, gradient, row);
    for (int64_t row = begin * 32; row < end * 32 && row < z.count; ++row) finish_row<Z>(p, z, gradient, row, scratch);
  });
  double sum = 0;
  for (int64_t row = 0; row < z.count; ++row) sum += p.row_dot[row];
  *p.grad_temperature = -0.5 * p.scale * sum;
}

template <typename Run>
void switch_engine(c10::ScalarType dtype, const Run& run) {
  const bool amx = cpu_capability() == CpuCapability::Amx;
  if (dtype == c10::ScalarType::BFloat16) {
    if (amx)
      run(Amx{}, std::integral_constant<int, 1>{}, c10::BFloat16{});
    else
      run(DotProducts{}, std::integral_constant<int, 1>{}, c10::BFloat16{});
  } else if (dtype == c10::ScalarType::Half) {
    run(Amx{}, std::integral_constant<int, 3>{}, c10::Half{});
  } else {
    run(Amx{}, std::integral_constant<int, 3>{}, float{});
  }
}

}  // namespace

void launch_info_nce_forward_bf16_cpu(const InfoNceForwardParams& p) {
  switch_engine(p.dtype, [&]<typename Engine, typename Terms, typename Z>(const Engine&, Terms, Z) {
    info_nce_forward_bf16_kernel<Engine, Terms::value, Z>(p);
  });
}

void launch_info_nce_backward_bf16_cpu(const InfoNceBackwardParams& p) {
  switch_engine(p.dtype, [&]<typename Engine, typename Terms, typename Z>(const Engine&, Terms, Z) {
    info_nce_backward_bf16_kernel<Engine, Terms::value, Z>(p);
  });
}

SSLFAST_END_BF16_CODE
#endif

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
