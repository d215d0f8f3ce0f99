// NT-Xent on CPUs that multiply bfloat16 (AMX, AVX512-BF16); csrc/ops/info_nce.h has the formulas and
// info_nce_kernel.cpp the plan, which is the same: tiles on and above the diagonal, round-robin over pairs of row blocks.
//
//   bfloat16 input: the products take z itself, which is exact, and 1/‖z_i‖ multiplies the float32 results.
//   other input:    ẑ = hi + lo, two bfloat16 terms, three products (see bf16_tile.h). Only with AMX, where that is
//                   faster than float32.
//
// Arithmetic as there, times three for other input; exp counts here: (2B)²/2 in each direction. Scratch: z in four forms
// (two in forward) of 2 bytes a number and term.
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

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

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

/// z as operands of the three products; every block is contiguous, see bf16_tile.h. kTerms: 1 holds z, 2 holds ẑ = hi + lo.
template <int kTerms>
struct Operands {
  int64_t count, rows, dim, block, blocks;  // rows and dim are padded
  float* inv_norm;                          // 1/max(‖z‖, eps); what multiplies the products is 1 for two terms
  uint16_t *z_a, *z_b, *pairs, *zt_a;

  Operands(int64_t batch, int64_t width, void* scratch, void* inv_norms)
      : count(2 * batch),
        rows(round_up(count, kInfoNcePad)),
        dim(round_up(width, kInfoNcePad)),
        block(info_nce_bf16_block_rows(count)),
        blocks((rows + block - 1) / block),
        inv_norm(static_cast<float*>(inv_norms)),
        z_a(static_cast<uint16_t*>(scratch)),  // A of Z·Zᵀ:  [dim/32][rows][32]
        z_b(z_a + kTerms * rows * dim),        // B of Z·Zᵀ:  [rows/16][dim/2][16][2]
        pairs(z_b + kTerms * rows * dim),      // B of G·Z:   [dim/16][rows/2][16][2]
        zt_a(pairs + kTerms * rows * dim) {}   // A of Zᵀ·G:  [rows/32][dim][32]

  int64_t term() const { return rows * dim; }
  int64_t begin(int64_t b) const { return b * block; }
  int64_t end(int64_t b) const { return (b + 1) * block < rows ? (b + 1) * block : rows; }
  int64_t positive(int64_t row) const { return row < count / 2 ? row + count / 2 : row - count / 2; }

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
void pack_operands(const Operands<kTerms>& z, const Z* z1, const Z* z2, int64_t batch, int64_t dim, float* row_scratch) {
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
          if (kTerms == 2) x *= inv_norm, y *= inv_norm;
          const __m512i hi = to_bf16(x, y);
          _mm512_storeu_si512(out, hi);
          if (kTerms == 2) _mm512_storeu_si512(out + z.term(), to_bf16(x - first_of(hi), y - second_of(hi)));
        }
      }
      for (int64_t term = 0; term < kTerms; ++term)
        for (int64_t d = 0; d < z.dim; d += 32) {
          const uint16_t* a = z.z_a + term * z.term() + d * z.rows + first * 32;
          for (int64_t half = 0; half < 32; half += 16)
            transpose_block(a + half * 32, z.z_b + term * z.term() + (first + half) * z.dim + d * 16);
          if (!kBackward) continue;
          for (int64_t half = 0; half < 32; half += 16) {
            uint16_t* pairs = z.pairs + term * z.term() + (d + half) * z.rows + first * 16;
            for (int64_t pair = 0; pair < 16; ++pair) {
              const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + pair * 64 + half));
              const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + pair * 64 + 32 + half));
              _mm512_storeu_si512(pairs + pair * 32, interleave(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1)));
            }
            transpose_block(pairs, z.zt_a + term * z.term() + first * z.dim + (d + half) * 32);
          }
        }
    }
  });
}

/// Element (row, col) of a 32 × 32 result of two halves of 16 columns.
constexpr int64_t kHalf = 512;

/// Zeroes the diagonal and what belongs to padded rows or columns.
void exclude(float* c, int64_t row, int64_t col, int64_t count) {
  for (int64_t r = 0; r < 32; ++r)
    for (int64_t k = 0; k < 32; ++k)
      if (row + r == col + k || row + r >= count || col + k >= count) c[k / 16 * kHalf + r * 16 + k % 16] = 0;
}

/// c = ⟨ẑ_i, ẑ_j⟩ and e = exp(s·c − s), for rows row…row+31 and columns col…col+31. e may be c.
template <typename Engine, int kTerms>
void exp_block(const Operands<kTerms>& z, float scale, int64_t row, int64_t col, float* c, float* e) {
  Engine::template multiply<kTerms, false>(z.row_operand(row), z.column_operand(col), z.dim / 32, c, kHalf);
  for (int64_t half = 0; half < 2; ++half) {
    const Vec<float> col_norm = load(z.inv_norm + col + half * 16);
    for (int64_t r = 0; r < 32; ++r) {
      const int64_t at = half * kHalf + r * 16;
      Vec<float> similarity = load(c + at);
      if (kTerms == 1) {
        similarity *= z.inv_norm[row + r] * col_norm;
        store(c + at, similarity);
      }
      store(e + at, vec_exp(similarity * scale - scale));
    }
  }
  if (row == col || row + 32 > z.count || col + 32 > z.count) exclude(e, row, col, z.count);
}

template <typename Engine, int kTerms>
void add_tile_sums(const Operands<kTerms>& z, float scale, double* sum, int64_t i, int64_t j) {
  const Engine engine;
  alignas(64) float row_sum[kMaxBlock * 16] = {};
  alignas(64) float e[2 * kHalf];
  for (int64_t col = z.begin(j); col < z.end(j); col += 32) {
    Vec<float> col_sum[2] = {};
    for (int64_t row = z.begin(i); row < z.end(i); row += 32) {
      exp_block<Engine>(z, scale, row, col, e, e);
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

/// c of a sample's two views, straight from the input: the one similarity that the loss holds on its own. scratch: 2·z.dim,
/// of which the padding is zero.
template <typename Z, int kTerms>
float positive_similarity(const InfoNceForwardParams& p, const Operands<kTerms>& z, int64_t sample, float* scratch) {
  const Z *z1 = static_cast<const Z*>(p.z1), *z2 = static_cast<const Z*>(p.z2);
  load_row(z1, z2, p.batch, p.dim, sample, scratch);
  load_row(z1, z2, p.batch, p.dim, p.batch + sample, scratch + z.dim);
  Vec<float> sum{};
  for (int64_t d = 0; d < z.dim; d += 16) sum += load(scratch + d) * load(scratch + z.dim + d);
  return sum_lanes<float>(sum) * z.inv_norm[sample] * z.inv_norm[p.batch + sample];
}

template <typename Engine, int kTerms, typename Z>
void info_nce_forward_bf16_kernel(const InfoNceForwardParams& p) {
  const Operands<kTerms> z(p.batch, p.dim, p.rows, p.inv_norm);
  const float scale = static_cast<float>(p.scale);
  pack_operands<kTerms, false>(z, static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.batch, p.dim,
                               static_cast<float*>(p.row_scratch));
  for (int64_t row = 0; row < z.rows; ++row) p.sum[row] = 0;
  for_each_block_pair(z.blocks, [&](int64_t i, int64_t j) { add_tile_sums<Engine>(z, scale, p.sum, i, j); });
  at::parallel_for(0, p.batch, 128, [&](int64_t begin, int64_t end) {
    float* scratch = static_cast<float*>(p.row_scratch) + at::get_thread_num() * 2 * z.dim;
    std::memset(scratch, 0, 2 * z.dim * sizeof(float));
    for (int64_t sample = begin; sample < end; ++sample) {
      const double positive = p.scale * positive_similarity<Z>(p, z, sample, scratch);
      for (const int64_t row : {sample, p.batch + sample}) {
        const double lse = p.scale + std::log(p.sum[row]);
        static_cast<float*>(p.lse)[row] = static_cast<float>(lse);
        static_cast<float*>(p.loss)[row] = static_cast<float>(lse - positive);
      }
    }
  });
}

/// Gradients and the tile's G while a pass is running. grad: [dim/16][rows][16], grad_t: [rows/16][dim][16].
struct Gradient {
  float *grad, *grad_t;
  const float* factor;  // s·w_i·exp(s − lse_i), 0 for padded rows
};

/// Writes a block of G = e·(factor_i + factor_j) as operand A (times 1/‖z_j‖ if z is not normalised) and as operand B
/// (times 1/‖z_i‖), and returns Σ G·c.
template <int kTerms>
float store_g_block(const Operands<kTerms>& z, const float* factor, const float* c, const float* e, int64_t row,
                    int64_t col, uint16_t* g_a, uint16_t* g_b, int64_t g_b_half, int64_t g_term) {
  Vec<float> sum{};
  const Vec<float> factor_left = load(factor + col), factor_right = load(factor + col + 16);
  const Vec<float> norm_left = load(z.inv_norm + col), norm_right = load(z.inv_norm + col + 16);
  for (int64_t r = 0; r < 32; r += 2) {
    Vec<float> left[2], right[2];
    for (int64_t k = 0; k < 2; ++k) {
      left[k] = load(e + (r + k) * 16) * (factor_left + factor[row + r + k]);
      right[k] = load(e + kHalf + (r + k) * 16) * (factor_right + factor[row + r + k]);
      sum += left[k] * load(c + (r + k) * 16) + right[k] * load(c + kHalf + (r + k) * 16);
      const Vec<float> a_left = kTerms == 1 ? left[k] * norm_left : left[k];
      const Vec<float> a_right = kTerms == 1 ? right[k] * norm_right : right[k];
      const __m512i hi = to_bf16(a_left, a_right);
      _mm512_storeu_si512(g_a + (r + k) * 32, hi);
      if (kTerms == 2)
        _mm512_storeu_si512(g_a + g_term + (r + k) * 32, to_bf16(a_left - first_of(hi), a_right - second_of(hi)));
      if (kTerms == 1) left[k] *= z.inv_norm[row + r + k], right[k] *= z.inv_norm[row + r + k];
    }
    for (int64_t half = 0; half < 2; ++half) {
      const Vec<float>* pair = half == 0 ? left : right;
      uint16_t* out = g_b + half * g_b_half + r * 16;
      const __m512i hi = to_bf16(pair[0], pair[1]);
      _mm512_storeu_si512(out, interleave(hi));
      if (kTerms == 2)
        _mm512_storeu_si512(out + g_term, interleave(to_bf16(pair[0] - first_of(hi), pair[1] - second_of(hi))));
    }
  }
  return sum_lanes<float>(sum);
}

template <typename Engine, int kTerms>
void add_tile_gradient(const Operands<kTerms>& z, float scale, const Gradient& gradient, uint16_t* g_a,
                       double* row_dot, int64_t i, int64_t j) {
  const Engine engine;
  const int64_t row0 = z.begin(i), col0 = z.begin(j), rows = z.end(i) - row0, cols = z.end(j) - col0;
  const int64_t g_term = rows * cols;
  uint16_t* g_b = g_a + kTerms * g_term;  // g_a: [cols/32][rows][32], g_b: [cols/16][rows/2][16][2]
  alignas(64) float c[2 * kHalf], e[2 * kHalf];
  double dot = 0;
  for (int64_t col = 0; col < cols; col += 32)
    for (int64_t row = 0; row < rows; row += 32) {
      exp_block<Engine>(z, scale, row0 + row, col0 + col, c, e);
      dot += store_g_block(z, gradient.factor, c, e, row0 + row, col0 + col, g_a + col * rows + row * 32,
                           g_b + col * rows + row * 16, 16 * rows, g_term);
    }
  row_dot[row0] += i == j ? dot : 2 * dot;  // G stands on both sides of the diagonal
  for (int64_t d = 0; d < z.dim; d += 32) {
    for (int64_t row = 0; row < rows; row += 32)
      Engine::template multiply<kTerms, true>({g_a + row * 32, kBlockElements, rows * 32, g_term},
                                              z.sum_over_rows(col0, d), cols / 32,
                                              gradient.grad + d * z.rows + (row0 + row) * 16, 16 * z.rows);
    if (i == j) continue;
    for (int64_t col = 0; col < cols; col += 32)
      Engine::template multiply<kTerms, true>(z.transposed(d, row0),
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

/// Adds the positive's part to dẑ of a row, then goes through the normalisation; see info_nce_kernel.cpp. scratch: 2·z.dim,
/// of which the padding is zero.
template <typename Z, int kTerms>
void finish_row(const InfoNceBackwardParams& p, const Operands<kTerms>& z, const Gradient& gradient, float positive_weight,
                int64_t row, float* scratch) {
  float *own = scratch, *other = scratch + z.dim;
  const Z *z1 = static_cast<const Z*>(p.z1), *z2 = static_cast<const Z*>(p.z2);
  load_row(z1, z2, p.batch, p.dim, row, own);
  load_row(z1, z2, p.batch, p.dim, z.positive(row), other);
  const float inv_norm = z.inv_norm[row], weight = positive_weight * z.inv_norm[z.positive(row)];
  Vec<float> sum{}, similarity{};
  for (int64_t d = 0; d < z.dim; d += 16) {
    const Vec<float> value = load(gradient.grad + d * z.rows + row * 16) - load(other + d) * weight;
    similarity += load(other + d) * load(own + d);
    store(other + d, value);
    sum += value * load(own + d);
  }
  const float dot = sum_lanes<float>(sum) * inv_norm;
  // The temperature's gradient needs Σ⟨ẑ, dẑ⟩, in which much cancels: from float32 G and c, not from the rounded products.
  p.row_dot[row] -= weight * inv_norm * sum_lanes<float>(similarity);
  const bool tiny = inv_norm >= 1 / kNormEps;
  const float along = tiny ? 0 : dot * inv_norm;
  Z* out = row < p.batch ? static_cast<Z*>(p.grad_z1) + row * p.dim : static_cast<Z*>(p.grad_z2) + (row - p.batch) * p.dim;
  for (int64_t d = 0; d < p.dim; ++d) {
    float value = (other[d] - own[d] * along) * inv_norm;
    if (tiny && std::is_same_v<Z, c10::Half>) value = value > 65504 ? 65504 : value < -65504 ? -65504 : value;
    out[d] = static_cast<Z>(value);
  }
}

template <typename Engine, int kTerms, typename Z>
void info_nce_backward_bf16_kernel(const InfoNceBackwardParams& p) {
  const Operands<kTerms> z(p.batch, p.dim, p.rows, p.inv_norm);
  const float* lse = static_cast<const float*>(p.lse);
  const float* grad_loss = static_cast<const float*>(p.grad_loss);
  float* factor = static_cast<float*>(p.factor);
  float* row_scratch = static_cast<float*>(p.row_scratch);
  const Gradient gradient{static_cast<float*>(p.grad_rows), static_cast<float*>(p.grad_rows) + z.rows * z.dim, factor};
  pack_operands<kTerms, true>(z, static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.batch, p.dim, row_scratch);

  const auto row_weight = [&](int64_t row) {  // s·w_row
    return p.scale * p.grad_loss_factor * grad_loss[row * p.grad_loss_stride];
  };
  for (int64_t row = 0; row < z.rows; ++row) p.row_dot[row] = 0;
  for (int64_t row = 0; row < z.rows; ++row)
    factor[row] = row < z.count ? static_cast<float>(row_weight(row) * std::exp(p.scale - lse[row])) : 0.0f;
  at::parallel_for(0, 2 * z.rows, 512, [&](int64_t begin, int64_t end) {
    std::memset(gradient.grad + begin * z.dim, 0, (end - begin) * z.dim * sizeof(float));
  });
  for_each_block_pair(z.blocks, [&](int64_t i, int64_t j) {
    uint16_t* tile = static_cast<uint16_t*>(p.tiles) + at::get_thread_num() * 4 * z.block * z.block;
    add_tile_gradient<Engine>(z, static_cast<float>(p.scale), gradient, tile, p.row_dot, i, j);
  });
  at::parallel_for(0, z.rows / 32, 2, [&](int64_t begin, int64_t end) {
    float* scratch = row_scratch + at::get_thread_num() * 2 * z.dim;
    std::memset(scratch, 0, 2 * z.dim * sizeof(float));
    for (int64_t row = begin * 32; row < end * 32; row += 16) add_transposed(z, gradient, row);
    for (int64_t row = begin * 32; row < end * 32 && row < z.count; ++row)
      finish_row<Z>(p, z, gradient, static_cast<float>(row_weight(row) + row_weight(z.positive(row))), row, scratch);
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
    run(Amx{}, std::integral_constant<int, 2>{}, c10::Half{});
  } else {
    run(Amx{}, std::integral_constant<int, 2>{}, float{});
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
