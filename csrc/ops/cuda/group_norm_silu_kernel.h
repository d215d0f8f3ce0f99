// What the tensor side and the kernels of `group_norm_silu` agree on; csrc/ops/group_norm_silu.h has the formulas.
// Knows no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sslfast {

enum class GroupNormSiluCudaType { float32, bfloat16, float16 };

/// Pointers as in GroupNormSiluParams; statistics, parameters and their gradients are float.
struct GroupNormSiluCudaParams {
  GroupNormSiluCudaType type;
  int64_t samples, channels, places, groups;
  bool channels_last;
  float eps;
  const void* x;
  const float *weight, *bias;
  float *mean, *rstd;
  void* out;
  const void* grad_out;
  void* grad_x;
  float* grad_parameters;  // (2, samples, channels)
  float *grad_weight, *grad_bias;
};

/// Enqueue their kernels on the stream and return; throw std::runtime_error if CUDA refuses a launch.
void launch_group_norm_silu_forward_cuda(const GroupNormSiluCudaParams& params, cudaStream_t stream);
void launch_group_norm_silu_backward_cuda(const GroupNormSiluCudaParams& params, cudaStream_t stream);

}  // namespace sslfast
