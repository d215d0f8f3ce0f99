// What diffusion models do beside their network: the step of a sampler, noising, the weighted loss, and normal numbers
// that depend on a sample's seed alone. The formulas and coefficients: csrc/common/schedule.h, csrc/common/normal.h.
//
// Tensors are (samples, elements), contiguous; `elements` are those of one sample.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/common/cpu_dispatch.h"
#include "csrc/common/schedule.h"

namespace sslfast {

enum class StepVariance { Fixed, Learned, LearnedRange };

/// Where normal numbers come from: memory, or the seed of each sample; or nowhere, if both are null.
struct NormalSource {
  const void* given;     // (samples, elements)
  const int64_t* seeds;  // (samples)
};

struct DiffusionStepParams {
  c10::ScalarType dtype;
  int64_t samples, elements;
  const void *model, *sample;       // model: 2·elements a sample where the variance is learned
  const void *history0, *history1;  // or null
  const StepCoefficients* coefficients;
  int64_t coefficients_stride;  // 1, or 0 for one step for all
  double clip;                  // infinity for none
  const float* threshold;       // (samples), or null
  NormalSource noise;
  StepVariance variance;
  void *previous, *x0;
};

struct DiffusionQSampleParams {
  c10::ScalarType dtype;
  int64_t samples, elements;
  const void* x0;
  const int64_t* timesteps;     // (samples)
  const float* alphas_cumprod;  // (steps)
  int64_t steps;
  DiffusionPrediction prediction;
  NormalSource noise;
  uint32_t step;
  void *noisy, *target;  // target: null where it is x0 itself
};

struct DiffusionLossParams {
  c10::ScalarType dtype;
  int64_t samples, elements;
  const void *prediction, *target;
  const int64_t* timesteps;
  const float* alphas_cumprod;
  int64_t steps;
  DiffusionPrediction parametrization;
  bool weighted;
  float snr_gamma;
  const void* grad_loss;                // backward: (samples), float (double for double)
  void* loss;                           // forward: (samples), float (double for double)
  void *grad_prediction, *grad_target;  // backward, or null
};

struct DiffusionNoiseParams {
  c10::ScalarType dtype;
  int64_t samples, elements;
  const int64_t* seeds;
  uint32_t step;
  void* out;
};

SSLFAST_DECLARE_CPU_LAUNCHER(launch_diffusion_step_cpu, DiffusionStepParams)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_diffusion_q_sample_cpu, DiffusionQSampleParams)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_diffusion_loss_forward_cpu, DiffusionLossParams)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_diffusion_loss_backward_cpu, DiffusionLossParams)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_diffusion_noise_cpu, DiffusionNoiseParams)

// The tensor side. A threshold is float32, coefficients are (kStepFields) or (samples, kStepFields) float32.

std::tuple<at::Tensor, at::Tensor> diffusion_step(const at::Tensor& model_output, const at::Tensor& sample,
                                                  const at::Tensor& coefficients, std::optional<double> clip,
                                                  const std::optional<at::Tensor>& threshold,
                                                  const std::vector<at::Tensor>& history,
                                                  const std::optional<at::Tensor>& noise,
                                                  const std::optional<at::Tensor>& seeds, const std::string& variance);

/// → x_t and the target, which is empty for prediction_type "sample".
std::tuple<at::Tensor, at::Tensor> diffusion_q_sample(const at::Tensor& x0, const at::Tensor& timesteps,
                                                      const at::Tensor& alphas_cumprod,
                                                      const std::string& prediction_type,
                                                      const std::optional<at::Tensor>& noise,
                                                      const std::optional<at::Tensor>& seeds, int64_t step);

/// → (samples)
at::Tensor diffusion_loss_forward(const at::Tensor& prediction, const at::Tensor& target, const at::Tensor& timesteps,
                                  const at::Tensor& alphas_cumprod, const std::string& prediction_type,
                                  std::optional<double> snr_gamma);
/// → gradients of prediction and target
std::tuple<at::Tensor, at::Tensor> diffusion_loss_backward(const at::Tensor& grad_loss, const at::Tensor& prediction,
                                                           const at::Tensor& target, const at::Tensor& timesteps,
                                                           const at::Tensor& alphas_cumprod,
                                                           const std::string& prediction_type,
                                                           std::optional<double> snr_gamma);

/// → (samples, shape)
at::Tensor diffusion_noise(const at::Tensor& seeds, const std::vector<int64_t>& shape, int64_t step,
                           c10::ScalarType dtype);

// Coefficients of many steps at once: (rows, kStepFields) float32, from float32 or float64 rows on the CPU.

/// alphas: (rows, 2), ᾱ of the step and of the one that it leads to; steps: (rows), 0 is the last one.
at::Tensor ddpm_coefficients(const at::Tensor& alphas, const at::Tensor& steps, const std::string& prediction_type,
                             const std::string& variance_type);
at::Tensor ddim_coefficients(const at::Tensor& alphas, const at::Tensor& steps, const std::string& prediction_type,
                             double eta, bool use_clipped_model_output);
/// ratios: (rows, 4) float64: σ/α of the target, of the sample, and of the samples of the last two steps.
at::Tensor dpm_coefficients(const at::Tensor& ratios, const at::Tensor& steps, const std::string& prediction_type,
                            int64_t order, const std::string& solver_type, const std::string& algorithm_type);

}  // namespace sslfast
