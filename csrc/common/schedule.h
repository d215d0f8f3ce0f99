// The coefficients of diffusion models, for CPU and CUDA: what a step of DDPM, DDIM or DPM-Solver++ multiplies with,
// and the noise levels and loss weights of training. ᾱ is alphas_cumprod: x_t = √ᾱ·x0 + √(1 − ᾱ)·ε.
//
// DDPM and DDIM are computed in float32 and in the order of operations of diffusers' schedulers: 1 − ᾱ_t/ᾱ_s loses up
// to four digits at small t, and results agree with theirs only if they lose the same ones.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/macros.h"

namespace sslfast {

enum class DiffusionPrediction { Epsilon, Sample, Velocity };

/// x0 = predict_scale · (predict_sample · x_t + predict_model · model), then clipped or thresholded;
/// x_s = x0 · x0 + sample · x_t + model · model + history0, 1 · x0 of the last two steps + noise · deviation · normal.
/// The deviation is 1, or learned: √v, or exp of half of what lies at (v + 1)/2 between the two logarithms of
/// variances.
struct StepCoefficients {
  float predict_sample, predict_model, predict_scale;
  float x0, sample, model, history0, history1;
  float noise;
  float log_variance_min, log_variance_max;
  float noise_step;  // of Philox: below 2²⁴
};
constexpr int kStepFields = sizeof(StepCoefficients) / sizeof(float);

/// noise_step as an integer; 0 for what is none, such as the NaN of a row that must not be used.
SSLFAST_HOST_DEVICE uint32_t philox_step(const StepCoefficients& c) {
  return c.noise_step >= 0.0f && c.noise_step <= 16777216.0f ? static_cast<uint32_t>(c.noise_step) : 0u;
}

/// How x0 follows from the model's output, at signal level `alpha` = √ᾱ and noise level `sigma` = √(1 − ᾱ).
SSLFAST_HOST_DEVICE StepCoefficients predict_x0(DiffusionPrediction prediction, float alpha, float sigma) {
  StepCoefficients c{};
  switch (prediction) {
    case DiffusionPrediction::Epsilon:  // (x_t − σ·ε) / α
      c.predict_sample = 1.0f, c.predict_model = -sigma, c.predict_scale = 1.0f / alpha;
      break;
    case DiffusionPrediction::Sample:
      c.predict_model = 1.0f, c.predict_scale = 1.0f;
      break;
    case DiffusionPrediction::Velocity:  // α·x_t − σ·v
      c.predict_sample = alpha, c.predict_model = -sigma, c.predict_scale = 1.0f;
      break;
  }
  return c;
}

enum class DdpmVariance { Small, Large, Learned };

/// DDPM's ancestral step from t to s, equation 7 of Ho et al.; `last`: no noise.
SSLFAST_HOST_DEVICE StepCoefficients ddpm_step(DiffusionPrediction prediction, DdpmVariance variance, float alpha_bar_t,
                                               float alpha_bar_s, bool last) {
  const float beta_bar_t = 1.0f - alpha_bar_t, beta_bar_s = 1.0f - alpha_bar_s;
  const float alpha = alpha_bar_t / alpha_bar_s, beta = 1.0f - alpha;
  StepCoefficients c = predict_x0(prediction, sqrtf(alpha_bar_t), sqrtf(beta_bar_t));
  c.x0 = sqrtf(alpha_bar_s) * beta / beta_bar_t;
  c.sample = sqrtf(alpha) * beta_bar_s / beta_bar_t;
  const float posterior = fmaxf(beta_bar_s / beta_bar_t * beta, 1e-20f);
  c.log_variance_min = logf(posterior);
  c.log_variance_max = logf(beta);
  if (!last)
    c.noise = variance == DdpmVariance::Learned ? 1.0f : sqrtf(variance == DdpmVariance::Large ? beta : posterior);
  return c;
}

/// DDIM's step from t to s, equation 12 of Song et al.; `from_clipped`: ε follows from x0 after clipping.
SSLFAST_HOST_DEVICE StepCoefficients ddim_step(DiffusionPrediction prediction, float eta, bool from_clipped,
                                               float alpha_bar_t, float alpha_bar_s) {
  const float beta_bar_t = 1.0f - alpha_bar_t, beta_bar_s = 1.0f - alpha_bar_s;
  const float alpha = sqrtf(alpha_bar_t), sigma = sqrtf(beta_bar_t);
  const float variance = beta_bar_s / beta_bar_t * (1.0f - alpha_bar_t / alpha_bar_s);
  StepCoefficients c = predict_x0(prediction, alpha, sigma);
  c.noise = eta == 0.0f ? 0.0f : eta * sqrtf(variance);
  const float direction = sqrtf(1.0f - alpha_bar_s - c.noise * c.noise);
  c.x0 = sqrtf(alpha_bar_s);
  if (from_clipped) {  // ε = (x_t − α·x0) / σ
    c.sample = direction / sigma;
    c.x0 -= direction * alpha / sigma;
  } else if (prediction == DiffusionPrediction::Epsilon) {
    c.model = direction;
  } else if (prediction == DiffusionPrediction::Sample) {  // ε = (x_t − α·model) / σ
    c.sample = direction / sigma;
    c.model = -direction * alpha / sigma;
  } else {  // ε = α·v + σ·x_t
    c.sample = direction * sigma;
    c.model = direction * alpha;
  }
  return c;
}

/// A noise level of DPM-Solver, given as σ/α: α² + σ² = 1, and λ = ln(α/σ).
struct NoiseLevel {
  double alpha, sigma, lambda;
};
SSLFAST_HOST_DEVICE NoiseLevel noise_level(double ratio) {
  const double alpha = 1.0 / sqrt(ratio * ratio + 1.0);
  return {alpha, ratio * alpha, -log(ratio)};
}

/// DPM-Solver++ in its multistep form, of order 1 to 3 (Lu et al., arXiv 2211.01095, and its appendix for the SDE).
/// ratio[0] is σ/α of the target, ratio[1] of the sample, ratio[2] and ratio[3] of the samples of the last two steps.
SSLFAST_HOST_DEVICE StepCoefficients dpm_step(DiffusionPrediction prediction, int order, bool heun, bool sde,
                                              const double* ratio) {
  const NoiseLevel t = noise_level(ratio[0]), s = noise_level(ratio[1]);
  StepCoefficients c = predict_x0(prediction, static_cast<float>(s.alpha), static_cast<float>(s.sigma));
  // The SDE takes steps of twice the length in λ, and noise for what they decay too much.
  const double h = t.lambda - s.lambda, decay = exp(-(sde ? 2 : 1) * h), length = (sde ? 2 : 1) * h;
  const double of_x0 = t.alpha * (1 - decay);
  c.sample = static_cast<float>(t.sigma / s.sigma * (sde ? exp(-h) : 1.0));
  if (sde) c.noise = static_cast<float>(t.sigma * sqrt(1 - exp(-2 * h)));
  double first = 0, second = 0;  // weights of the first two derivatives of x0 by λ, times h and h²
  if (order == 2 && !heun) first = 0.5 * of_x0;
  if ((order == 2 && heun) || order == 3) first = t.alpha * (1 - (1 - decay) / length);
  if (order == 3) second = t.alpha * (0.5 - (decay - 1 + length) / (length * length));
  double weight[3] = {of_x0, 0, 0};
  if (order >= 2) {
    const double r0 = (s.lambda - noise_level(ratio[2]).lambda) / h;
    weight[0] += first / r0;
    weight[1] -= first / r0;
    if (order == 3) {  // divided differences over the last three levels
      const double r1 = (noise_level(ratio[2]).lambda - noise_level(ratio[3]).lambda) / h;
      const double curvature = first * r0 / (r0 + r1) + second / (r0 + r1);
      weight[0] += curvature / r0;
      weight[1] -= curvature * (1 / r0 + 1 / r1);
      weight[2] += curvature / r1;
    }
  }
  c.x0 = static_cast<float>(weight[0]);
  c.history0 = static_cast<float>(weight[1]);
  c.history1 = static_cast<float>(weight[2]);
  return c;
}

/// min-SNR-γ of Hang et al., arXiv 2303.09556; γ = infinity: no weighting (the caller does not ask then).
SSLFAST_HOST_DEVICE float min_snr_weight(DiffusionPrediction prediction, float alpha_bar, float gamma) {
  const float snr = alpha_bar / (1.0f - alpha_bar);
  const float kept = snr > gamma ? gamma : snr;  // NaN stays NaN
  if (prediction == DiffusionPrediction::Epsilon) return snr == 0.0f ? 1.0f : kept / snr;
  return prediction == DiffusionPrediction::Velocity ? kept / (snr + 1.0f) : kept;
}

}  // namespace sslfast
