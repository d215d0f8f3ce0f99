// SiLU of a group normalisation, forward and backward, as one op.
//
//   x̂ = (x − mean) · rstd over the channels and places of a group of a sample; y = γ·x̂ + β; out = y·σ(y)
//   backward: z = grad · σ(y)·(1 + y·(1 − σ(y))); grad β = Σ z; grad γ = Σ z·x̂;
//             grad x = rstd·(γ·z − mean over the group of γ·z − x̂ · mean over the group of γ·z·x̂)
//
// Shapes: x (samples, channels, places), or (samples, places, channels) if channels_last; γ, β (channels).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>

#include "csrc/common/cpu_dispatch.h"

namespace sslfast {

// "acc" is float, or double if the dtype is double.
struct GroupNormSiluParams {
  c10::ScalarType dtype;
  int64_t samples, channels, places, groups;
  bool channels_last;
  double eps;
  const void* x;
  const void *weight, *bias;  // acc, or null for 1 and 0
  void *mean, *rstd;          // acc (samples, groups): written by forward, read by backward
  void* out;                  // forward

  const void* grad_out;  // backward
  void* grad_x;
  double* grad_parameters;        // (2, samples, channels): the parts of grad γ and grad β
  void *grad_weight, *grad_bias;  // acc (channels)
  int64_t threads;
  std::byte* scratch;     // a slice per thread, 64-byte aligned
  int64_t scratch_bytes;  // of a slice
};

/// Channels that a thread takes at once: those of one group, or with channels_last of so many that rows are long.
inline int64_t group_norm_silu_width(const GroupNormSiluParams& p) {
  const int64_t of_group = p.channels / p.groups;
  if (!p.channels_last) return of_group;
  const int64_t groups = (64 + of_group - 1) / of_group;
  return of_group * (groups < p.groups ? groups : p.groups);
}

SSLFAST_DECLARE_CPU_LAUNCHER(launch_group_norm_silu_forward_cpu, GroupNormSiluParams)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_group_norm_silu_backward_cpu, GroupNormSiluParams)

/// → output in x's memory format, mean and rstd (samples, groups).
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu_forward(const at::Tensor& x, int64_t num_groups,
                                                                       const std::optional<at::Tensor>& weight,
                                                                       const std::optional<at::Tensor>& bias,
                                                                       double eps);
/// → gradients of x, weight and bias; the last two (channels) in the type of the arithmetic.
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu_backward(const at::Tensor& grad_out, const at::Tensor& x,
                                                                        int64_t num_groups,
                                                                        const std::optional<at::Tensor>& weight,
                                                                        const std::optional<at::Tensor>& bias,
                                                                        const at::Tensor& mean, const at::Tensor& rstd);

}  // namespace sslfast
