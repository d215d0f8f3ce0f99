// What the tensor side and the kernels of `diffusion` agree on; csrc/ops/diffusion.h says what the numbers mean. Knows
// no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/common/schedule.h"

namespace sslfast {

enum class DiffusionCudaType { float32, bfloat16, float16 };

struct DiffusionCudaProblem {
  DiffusionCudaType type;
  int64_t samples, elements;
};

/// Both null: no noise.
struct NormalCudaSource {
  const void* given;
  const int64_t* seeds;
};

struct DiffusionStepCudaParams {
  DiffusionCudaProblem problem;
  const void *model, *sample, *history0, *history1;
  const StepCoefficients* coefficients;
  int64_t coefficients_stride;
  float clip;
  const float* threshold;
  NormalCudaSource noise;
  bool learned, learned_range;  // the second half of the model's output is a variance, or lies between two
  void *previous, *x0;
};

struct DiffusionQSampleCudaParams {
  DiffusionCudaProblem problem;
  const void* x0;
  const int64_t* timesteps;
  const float* alphas_cumprod;
  int64_t steps;
  bool velocity;
  NormalCudaSource noise;
  uint32_t step;
  void *noisy, *target;
};

struct DiffusionLossCudaParams {
  DiffusionCudaProblem problem;
  const void *prediction, *target;
  const int64_t* timesteps;
  const float* alphas_cumprod;
  int64_t steps;
  DiffusionPrediction parametrization;
  bool weighted;
  float snr_gamma;
  const float* grad_loss;
  float* loss;
  void *grad_prediction, *grad_target;
};

struct DiffusionNoiseCudaParams {
  DiffusionCudaProblem problem;
  const int64_t* seeds;
  uint32_t step;
  void* out;
};

/// Enqueue their kernel on the stream and return; throw std::runtime_error if CUDA refuses the launch.
void launch_diffusion_step_cuda(const DiffusionStepCudaParams& params, cudaStream_t stream);
void launch_diffusion_q_sample_cuda(const DiffusionQSampleCudaParams& params, cudaStream_t stream);
void launch_diffusion_loss_forward_cuda(const DiffusionLossCudaParams& params, cudaStream_t stream);
void launch_diffusion_loss_backward_cuda(const DiffusionLossCudaParams& params, cudaStream_t stream);
void launch_diffusion_noise_cuda(const DiffusionNoiseCudaParams& params, cudaStream_t stream);

}  // namespace sslfast
