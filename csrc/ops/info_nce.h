// InfoNCE between the rows of one matrix: NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv 2002.05709).
//
// z1 and z2 (batch, dim) hold two views of the same samples; z = [z1; z2] has rows = 2·batch rows, and row i's positive
// is p(i), the other view of its sample. With ẑ_i = z_i / max(‖z_i‖, 1e-12) and s = 1/temperature:
//
//   c_ij = ⟨ẑ_i, ẑ_j⟩     lse_i = log Σ_{j≠i} exp(s·c_ij)     loss_i = lse_i − s·c_ip(i)
//
// For incoming gradients w_i of loss_i, with P_ij = exp(s·c_ij − lse_i):
//
//   G_ij = s·(w_i·P_ij + w_j·P_ji) − s·(w_i + w_j)·[j = p(i)],  G_ii = 0      (symmetric)
//   dẑ_i = Σ_j G_ij·ẑ_j
//   dz_i = (dẑ_i − ⟨ẑ_i, dẑ_i⟩·ẑ_i) / ‖z_i‖
//   dtemperature = −s/2·Σ_i ⟨ẑ_i, dẑ_i⟩        (the loss is a function of s·c only: Euler's theorem)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cmath>
#include <string>
#include <tuple>

#include "csrc/common/cpu_dispatch.h"

namespace sslfast {

/// Row blocks and columns are padded in scratch memory to multiples of this many elements.
inline constexpr int64_t kInfoNcePad = 32;

/// exp(s·c − s) cannot underflow in float32 while 2·s stays below 87; up to here the bound c ≤ 1 replaces a row's
/// maximum.
inline constexpr double kInfoNceBoundedScale = 40.0;

/// Pointers are to contiguous memory. "acc" is double when z is double, and float otherwise.
struct InfoNceForwardParams {
  c10::ScalarType dtype;  // of z1 and z2
  int64_t batch, dim;
  const void* z1;  // (batch, dim)
  const void* z2;  // (batch, dim)
  double scale;    // s = 1/temperature
  int64_t threads;
  void* rows;         // scratch, acc: 2·padded_rows·padded_dim (bfloat16 products: terms·)
  void* row_scratch;  // scratch, float: 3·threads·padded_dim
  void* inv_norm;     // scratch, acc: padded_rows
  void* max;          // scratch, acc: padded_rows
  double* sum;        // scratch: padded_rows
  void* loss;         // out, acc: (2·batch)
  double* lse;        // out: (2·batch)
};

struct InfoNceBackwardParams {
  c10::ScalarType dtype;
  int64_t batch, dim;
  const void* z1;
  const void* z2;
  double scale;
  const double* lse;         // (2·batch)
  const void* grad_loss;     // acc: (2·batch), or one value for all rows if grad_loss_stride is 0
  int64_t grad_loss_stride;  // 1 or 0
  double grad_loss_factor;   // multiplies grad_loss (1/(2·batch) for a mean)
  int64_t threads;
  void* rows;                // scratch, acc: 2·padded_rows·padded_dim (bfloat16 products: (terms + gradient terms)·)
  void* row_scratch;         // scratch, float: 3·threads·padded_dim
  void* inv_norm;            // scratch, acc: padded_rows
  void* shift;               // scratch, acc: padded_rows
  void* factor;              // scratch, acc: padded_rows
  void* grad_rows;           // scratch, acc: padded_rows·padded_dim (bfloat16 products: 2·)
  void* tiles;               // scratch, acc: threads·block² (bfloat16 products: gradient terms·4·block² bytes)
  double* row_dot;           // scratch: padded_rows
  void* grad_z1;             // out, dtype: (batch, dim)
  void* grad_z2;             // out, dtype: (batch, dim)
  double* grad_temperature;  // out: 1
};

/// Rows of a block: a function of the problem alone, never of the number of threads (determinism); small where a small
/// batch would leave threads without a block.
constexpr int64_t info_nce_block_rows(int64_t rows) { return rows <= 1024 ? 64 : 128; }
constexpr int64_t info_nce_bf16_block_rows(int64_t rows) { return rows <= 256 ? 64 : rows <= 1024 ? 128 : 256; }

SSLFAST_DECLARE_CPU_LAUNCHER(launch_info_nce_forward_cpu, InfoNceForwardParams)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_info_nce_backward_cpu, InfoNceBackwardParams)

/// The same by bfloat16 products, on CPUs that have them and for scale ≤ kInfoNceBoundedScale. A bfloat16 is one term;
/// other numbers are sums of several (see bf16_tile.h). Two terms leave c an error of about 2e-6/√dim, which costs the
/// loss and its gradient s times that; where that is too much, c takes three and is as good as in float32. The sums of
/// the gradient take two: too few for the few rows of very small batches.
inline constexpr int64_t kInfoNceSplitRows = 64;
constexpr int info_nce_terms(c10::ScalarType dtype, double scale, int64_t dim) {
  return dtype == c10::ScalarType::BFloat16 ? 1 : scale * scale <= 2.0 * static_cast<double>(dim) ? 2 : 3;
}
constexpr int info_nce_gradient_terms(int terms) { return terms < 2 ? terms : 2; }
SSLFAST_DECLARE_CPU_LAUNCHER(launch_info_nce_forward_bf16_cpu, InfoNceForwardParams)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_info_nce_backward_bf16_cpu, InfoNceBackwardParams)

/// s·w_i.
static inline double row_weight(const InfoNceBackwardParams& p, int64_t row) {
  const int64_t at = row * p.grad_loss_stride;
  const double grad = p.dtype == c10::ScalarType::Double ? static_cast<const double*>(p.grad_loss)[at]
                                                         : static_cast<const float*>(p.grad_loss)[at];
  return p.scale * p.grad_loss_factor * grad;
}

/// G_ip of a row and its positive, whose logit is that of the forward pass: 1 − P_ip = −expm1(logit − lse_i).
static inline double positive_gradient(const InfoNceBackwardParams& p, int64_t row, int64_t positive, double logit) {
  return row_weight(p, row) * std::expm1(logit - p.lse[row]) +
         row_weight(p, positive) * std::expm1(logit - p.lse[positive]);
}

/// → (loss, (2·batch) or reduced to (), float32, or float64 for float64 input; lse, (2·batch), float64 since backward
/// takes exp of differences of it). temperature: one element.
std::tuple<at::Tensor, at::Tensor> info_nce_forward(const at::Tensor& z1, const at::Tensor& z2,
                                                    const at::Tensor& temperature, const std::string& reduction);

/// → (grad_z1, grad_z2, grad_temperature); grad_loss has the shape of loss.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_backward(const at::Tensor& grad_loss, const at::Tensor& z1,
                                                                 const at::Tensor& z2, const at::Tensor& temperature,
                                                                 const at::Tensor& lse, const std::string& reduction);

/// The loss of info_nce_forward with info_nce_backward as its derivative, for eager mode.
at::Tensor nt_xent(const at::Tensor& z1, const at::Tensor& z2, const at::Tensor& temperature,
                   const std::string& reduction);

}  // namespace sslfast
