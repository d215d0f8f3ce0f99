#include "csrc/ops/diffusion.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <limits>

#include "csrc/common/check.h"
#include "csrc/common/normal.h"
#if defined(SSLFAST_WITH_CUDA)
#include "csrc/common/cuda_device.h"
#include "csrc/ops/cuda/diffusion_kernel.h"
#endif

namespace sslfast {
namespace {

DiffusionPrediction prediction_of(const std::string& name) {
  if (name == "epsilon") return DiffusionPrediction::Epsilon;
  if (name == "sample") return DiffusionPrediction::Sample;
  TORCH_CHECK_VALUE(name == "v_prediction",
                    "prediction_type: expected \"epsilon\", \"sample\" or \"v_prediction\", got \"", name, '"');
  return DiffusionPrediction::Velocity;
}

StepVariance variance_of(const std::string& name) {
  if (name == "fixed") return StepVariance::Fixed;
  if (name == "learned") return StepVariance::Learned;
  TORCH_CHECK_VALUE(name == "learned_range", "variance: expected \"fixed\", \"learned\" or \"learned_range\", got \"",
                    name, '"');
  return StepVariance::LearnedRange;
}

void check_batch(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() >= 1, name, ": expected at least one dimension, the samples, got a scalar");
}

/// A tensor of `dtype` and `sizes` on the device of `like`.
void check_side(const at::Tensor& t, c10::ScalarType dtype, at::IntArrayRef sizes, const at::Tensor& like,
                const char* name) {
  check_dense(t, name);
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, ": expected shape ", sizes, ", got ", t.sizes());
  check_device(t, name, like);
}

/// The timesteps of a batch are indices of `alphas_cumprod`; on the CPU, where nothing waits for it, checked.
void check_timesteps(const at::Tensor& timesteps, const at::Tensor& alphas_cumprod, const at::Tensor& like) {
  check_side(timesteps, at::kLong, like.sizes().slice(0, 1), like, "timesteps");
  TORCH_CHECK_VALUE(alphas_cumprod.dim() == 1, "alphas_cumprod: expected shape (steps,), got ", alphas_cumprod.sizes());
  check_side(alphas_cumprod, at::kFloat, alphas_cumprod.sizes(), like, "alphas_cumprod");
  if (!timesteps.is_cpu()) return;
  const int64_t steps = alphas_cumprod.size(0);
  const auto indices = timesteps.contiguous();
  for (int64_t i = 0; i < indices.numel(); ++i) {
    const int64_t t = indices.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(t >= 0 && t < steps, "timesteps: expected 0 to ", steps - 1, ", got ", t);
  }
}

int64_t elements_of(const at::Tensor& t) { return t.size(0) == 0 ? 0 : t.numel() / t.size(0); }

uint32_t check_step(int64_t step) {
  TORCH_CHECK_VALUE(step >= 0 && step <= std::numeric_limits<uint32_t>::max(), "step: expected 0 to 2^32 - 1, got ",
                    step);
  return static_cast<uint32_t>(step);
}

void check_normals(int64_t elements) {
  TORCH_CHECK_VALUE(elements <= kMaxNormals, "seeds: noise of at most ", kMaxNormals, " elements a sample, got ",
                    elements);
}

/// Checked tensors that noise comes from, and their pointers.
struct Noise {
  at::Tensor given, seeds;

  Noise(const std::optional<at::Tensor>& noise, const std::optional<at::Tensor>& sample_seeds, const at::Tensor& like) {
    TORCH_CHECK_VALUE(!noise || !sample_seeds, "seeds: expected noise or seeds, got both");
    if (noise) {
      check_same(like, *noise, "sample", "noise");
      given = noise->contiguous();
    }
    if (sample_seeds) {
      check_side(*sample_seeds, at::kLong, like.sizes().slice(0, 1), like, "seeds");
      check_normals(elements_of(like));
      seeds = sample_seeds->contiguous();
    }
  }
  NormalSource source() const {
    return {given.defined() ? given.const_data_ptr() : nullptr,
            seeds.defined() ? seeds.const_data_ptr<int64_t>() : nullptr};
  }
};

at::Tensor empty_contiguous(const at::Tensor& like) { return at::empty(like.sizes(), like.options()); }

c10::ScalarType acc_type(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

#if defined(SSLFAST_WITH_CUDA)
DiffusionCudaProblem cuda_problem(c10::ScalarType dtype, int64_t samples, int64_t elements) {
  TORCH_CHECK_TYPE(dtype != at::kDouble, "dtype: expected float32, bfloat16 or float16 on CUDA, got Double");
  const auto type = dtype == at::kFloat      ? DiffusionCudaType::float32
                    : dtype == at::kBFloat16 ? DiffusionCudaType::bfloat16
                                             : DiffusionCudaType::float16;
  return {type, samples, elements};
}

DiffusionStepCudaParams cuda_params(const DiffusionStepParams& p) {
  return {cuda_problem(p.dtype, p.samples, p.elements),
          p.model,
          p.sample,
          p.history0,
          p.history1,
          p.coefficients,
          p.coefficients_stride,
          static_cast<float>(p.clip),
          p.threshold,
          {p.noise.given, p.noise.seeds},
          p.variance == StepVariance::Learned,
          p.variance == StepVariance::LearnedRange,
          p.previous,
          p.x0};
}

DiffusionQSampleCudaParams cuda_params(const DiffusionQSampleParams& p) {
  return {cuda_problem(p.dtype, p.samples, p.elements),
          p.x0,
          p.timesteps,
          p.alphas_cumprod,
          p.steps,
          p.prediction == DiffusionPrediction::Velocity,
          {p.noise.given, p.noise.seeds},
          p.step,
          p.noisy,
          p.target};
}

DiffusionLossCudaParams cuda_params(const DiffusionLossParams& p) {
  return {cuda_problem(p.dtype, p.samples, p.elements),
          p.prediction,
          p.target,
          p.timesteps,
          p.alphas_cumprod,
          p.steps,
          p.parametrization,
          p.weighted,
          p.snr_gamma,
          static_cast<const float*>(p.grad_loss),
          static_cast<float*>(p.loss),
          p.grad_prediction,
          p.grad_target};
}

DiffusionNoiseCudaParams cuda_params(const DiffusionNoiseParams& p) {
  return {cuda_problem(p.dtype, p.samples, p.elements), p.seeds, p.step, p.out};
}

/// Runs launch_…_cuda and leaves the function with `result` if `like` is a tensor for it.
#define SSLFAST_TRY_CUDA(launcher, params, like, result) \
  if (is_cuda_tensor(like)) {                            \
    const CudaScope scope(like);                         \
    launcher(cuda_params(params), scope.stream());       \
    return result;                                       \
  }
#else
#define SSLFAST_TRY_CUDA(launcher, params, like, result)
#endif

void require_cpu(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_cpu(), name, ": expected a CPU tensor, got one on ", t.device());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> diffusion_step(const at::Tensor& model_output, const at::Tensor& sample,
                                                  const at::Tensor& coefficients, std::optional<double> clip,
                                                  const std::optional<at::Tensor>& threshold,
                                                  const std::vector<at::Tensor>& history,
                                                  const std::optional<at::Tensor>& noise,
                                                  const std::optional<at::Tensor>& seeds, const std::string& variance) {
  check_floating(sample, "sample");
  check_batch(sample, "sample");
  const auto kind = variance_of(variance);
  auto model_sizes = sample.sizes().vec();
  if (kind != StepVariance::Fixed) {
    TORCH_CHECK_VALUE(sample.dim() >= 2, "sample: expected (samples, channels, ...) for a learned variance, got ",
                      sample.sizes());
    model_sizes[1] *= 2;
  }
  check_side(model_output, sample.scalar_type(), model_sizes, sample, "model_output");
  const bool for_each = coefficients.dim() == 2;
  check_side(coefficients, at::kFloat,
             for_each ? at::IntArrayRef({sample.size(0), kStepFields}) : at::IntArrayRef({kStepFields}), sample,
             "coefficients");
  TORCH_CHECK_VALUE(!clip || *clip > 0, "clip: expected a positive number, got ", *clip);
  TORCH_CHECK_VALUE(!clip || !threshold, "threshold: expected clip or threshold, got both");
  if (threshold) check_side(*threshold, at::kFloat, sample.sizes().slice(0, 1), sample, "threshold");
  TORCH_CHECK_VALUE(history.size() <= 2, "history: expected at most two tensors, got ", history.size());
  std::vector<at::Tensor> old;
  for (const auto& t : history) {
    check_same(sample, t, "sample", "history");
    old.push_back(t.contiguous());
  }
  const Noise source(noise, seeds, sample);

  const auto model = model_output.contiguous(), x = sample.contiguous(), rows = coefficients.contiguous();
  const auto limits = threshold ? threshold->contiguous() : at::Tensor();
  const auto previous = empty_contiguous(sample), x0 = empty_contiguous(sample);
  DiffusionStepParams params{};
  params.dtype = sample.scalar_type();
  params.samples = sample.size(0);
  params.elements = elements_of(sample);
  params.model = model.const_data_ptr();
  params.sample = x.const_data_ptr();
  params.history0 = old.empty() ? nullptr : old[0].const_data_ptr();
  params.history1 = old.size() < 2 ? nullptr : old[1].const_data_ptr();
  params.coefficients = reinterpret_cast<const StepCoefficients*>(rows.const_data_ptr<float>());
  params.coefficients_stride = for_each ? 1 : 0;
  params.clip = clip.value_or(std::numeric_limits<double>::infinity());
  params.threshold = limits.defined() ? limits.const_data_ptr<float>() : nullptr;
  params.noise = source.source();
  params.variance = kind;
  params.previous = previous.data_ptr();
  params.x0 = x0.data_ptr();
  SSLFAST_TRY_CUDA(launch_diffusion_step_cuda, params, sample, std::make_tuple(previous, x0))
  require_cpu(sample, "sample");
  SSLFAST_CPU_DISPATCH(launch_diffusion_step_cpu, params);
  return {previous, x0};
}

std::tuple<at::Tensor, at::Tensor> diffusion_q_sample(const at::Tensor& x0, const at::Tensor& timesteps,
                                                      const at::Tensor& alphas_cumprod,
                                                      const std::string& prediction_type,
                                                      const std::optional<at::Tensor>& noise,
                                                      const std::optional<at::Tensor>& seeds, int64_t step) {
  check_floating(x0, "x0");
  check_batch(x0, "x0");
  check_timesteps(timesteps, alphas_cumprod, x0);
  TORCH_CHECK_VALUE(noise || seeds, "seeds: expected noise or seeds, got neither");
  const Noise source(noise, seeds, x0);
  const auto x = x0.contiguous(), t = timesteps.contiguous(), alphas = alphas_cumprod.contiguous();
  DiffusionQSampleParams params{};
  params.dtype = x0.scalar_type();
  params.samples = x0.size(0);
  params.elements = elements_of(x0);
  params.x0 = x.const_data_ptr();
  params.timesteps = t.const_data_ptr<int64_t>();
  params.alphas_cumprod = alphas.const_data_ptr<float>();
  params.steps = alphas.size(0);
  params.prediction = prediction_of(prediction_type);
  params.noise = source.source();
  params.step = check_step(step);
  const bool has_target = params.prediction != DiffusionPrediction::Sample;
  const auto noisy = empty_contiguous(x0), target = has_target ? empty_contiguous(x0) : at::empty({0}, x0.options());
  params.noisy = noisy.data_ptr();
  params.target = has_target ? target.data_ptr() : nullptr;
  SSLFAST_TRY_CUDA(launch_diffusion_q_sample_cuda, params, x0, std::make_tuple(noisy, target))
  require_cpu(x0, "x0");
  SSLFAST_CPU_DISPATCH(launch_diffusion_q_sample_cpu, params);
  return {noisy, target};
}

namespace {

/// What the two directions of the loss have in common.
struct LossInputs {
  at::Tensor prediction, target, timesteps, alphas;
  DiffusionLossParams params{};

  LossInputs(const at::Tensor& predicted, const at::Tensor& wanted, const at::Tensor& steps,
             const at::Tensor& alphas_cumprod, const std::string& prediction_type, std::optional<double> snr_gamma) {
    check_floating(predicted, "prediction");
    check_batch(predicted, "prediction");
    check_same(predicted, wanted, "prediction", "target");
    check_timesteps(steps, alphas_cumprod, predicted);
    TORCH_CHECK_VALUE(!snr_gamma || (*snr_gamma > 0 && std::isfinite(*snr_gamma)),
                      "snr_gamma: expected a positive number, got ", *snr_gamma);
    prediction = predicted.contiguous();
    target = wanted.contiguous();
    timesteps = steps.contiguous();
    alphas = alphas_cumprod.contiguous();
    params.dtype = prediction.scalar_type();
    params.samples = prediction.size(0);
    params.elements = elements_of(prediction);
    params.prediction = prediction.const_data_ptr();
    params.target = target.const_data_ptr();
    params.timesteps = timesteps.const_data_ptr<int64_t>();
    params.alphas_cumprod = alphas.const_data_ptr<float>();
    params.steps = alphas.size(0);
    params.parametrization = prediction_of(prediction_type);
    params.weighted = snr_gamma.has_value();
    params.snr_gamma = snr_gamma ? static_cast<float>(*snr_gamma) : 0.0f;
  }
};

}  // namespace

at::Tensor diffusion_loss_forward(const at::Tensor& prediction, const at::Tensor& target, const at::Tensor& timesteps,
                                  const at::Tensor& alphas_cumprod, const std::string& prediction_type,
                                  std::optional<double> snr_gamma) {
  LossInputs inputs(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma);
  const auto loss = at::empty({inputs.params.samples}, prediction.options().dtype(acc_type(prediction)));
  inputs.params.loss = loss.data_ptr();
  SSLFAST_TRY_CUDA(launch_diffusion_loss_forward_cuda, inputs.params, prediction, loss)
  require_cpu(prediction, "prediction");
  SSLFAST_CPU_DISPATCH(launch_diffusion_loss_forward_cpu, inputs.params);
  return loss;
}

std::tuple<at::Tensor, at::Tensor> diffusion_loss_backward(const at::Tensor& grad_loss, const at::Tensor& prediction,
                                                           const at::Tensor& target, const at::Tensor& timesteps,
                                                           const at::Tensor& alphas_cumprod,
                                                           const std::string& prediction_type,
                                                           std::optional<double> snr_gamma) {
  LossInputs inputs(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma);
  check_side(grad_loss, acc_type(prediction), prediction.sizes().slice(0, 1), prediction, "grad_loss");
  const auto grad = grad_loss.contiguous();
  const auto grad_prediction = empty_contiguous(prediction), grad_target = empty_contiguous(prediction);
  inputs.params.grad_loss = grad.const_data_ptr();
  inputs.params.grad_prediction = grad_prediction.data_ptr();
  inputs.params.grad_target = grad_target.data_ptr();
  SSLFAST_TRY_CUDA(launch_diffusion_loss_backward_cuda, inputs.params, prediction,
                   std::make_tuple(grad_prediction, grad_target))
  require_cpu(prediction, "prediction");
  SSLFAST_CPU_DISPATCH(launch_diffusion_loss_backward_cpu, inputs.params);
  return {grad_prediction, grad_target};
}

at::Tensor diffusion_noise(const at::Tensor& seeds, const std::vector<int64_t>& shape, int64_t step,
                           c10::ScalarType dtype) {
  check_dim(seeds, 1, "seeds");
  for (const int64_t n : shape)
    TORCH_CHECK_VALUE(n >= 0, "shape: expected no negative size, got ", at::IntArrayRef(shape));
  TORCH_CHECK_TYPE(seeds.scalar_type() == at::kLong, "seeds: expected Long, got ", seeds.scalar_type());
  std::vector<int64_t> sizes{seeds.size(0)};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  const auto out = at::empty(sizes, seeds.options().dtype(dtype)), keys = seeds.contiguous();
  check_floating(out, "dtype");
  DiffusionNoiseParams params{};
  params.dtype = dtype;
  params.samples = seeds.size(0);
  params.elements = elements_of(out);
  check_normals(params.elements);
  params.seeds = keys.const_data_ptr<int64_t>();
  params.step = check_step(step);
  params.out = out.data_ptr();
  SSLFAST_TRY_CUDA(launch_diffusion_noise_cuda, params, seeds, out)
  require_cpu(seeds, "seeds");
  SSLFAST_CPU_DISPATCH(launch_diffusion_noise_cpu, params);
  return out;
}

// ---------------------------------------------------------------------------------------------------- coefficients

namespace {

/// A row of coefficients for each row of `of`, a contiguous CPU tensor.
template <typename Row>
at::Tensor coefficient_rows(const at::Tensor& of, int64_t columns, c10::ScalarType dtype, const at::Tensor& steps,
                            const Row& row) {
  check_dense(of, "rows");
  TORCH_CHECK_VALUE(of.dim() == 2 && of.size(1) == columns && of.is_cpu() && of.scalar_type() == dtype,
                    "expected (rows, ", columns, ") of ", dtype, " on the CPU, got ", of.sizes(), " of ",
                    of.scalar_type());
  check_side(steps, at::kLong, of.sizes().slice(0, 1), of, "steps");
  const auto out = at::empty({of.size(0), kStepFields}, at::kFloat);
  auto* to = reinterpret_cast<StepCoefficients*>(out.data_ptr<float>());
  const auto indices = steps.contiguous();
  for (int64_t i = 0; i < of.size(0); ++i) {
    const int64_t step = indices.const_data_ptr<int64_t>()[i];
    to[i] = row(i, step);
    to[i].noise_step = static_cast<float>(step);
  }
  return out;
}

}  // namespace

at::Tensor ddpm_coefficients(const at::Tensor& alphas, const at::Tensor& steps, const std::string& prediction_type,
                             const std::string& variance_type) {
  const auto prediction = prediction_of(prediction_type);
  auto variance = DdpmVariance::Learned;
  if (variance_type == "fixed_small" || variance_type == "fixed_small_log") {
    variance = DdpmVariance::Small;
  } else if (variance_type == "fixed_large" || variance_type == "fixed_large_log") {
    variance = DdpmVariance::Large;
  } else {
    TORCH_CHECK_VALUE(variance_type == "learned" || variance_type == "learned_range",
                      "variance_type: expected \"fixed_small\", \"fixed_small_log\", \"fixed_large\", "
                      "\"fixed_large_log\", \"learned\" or \"learned_range\", got \"",
                      variance_type, '"');
  }
  const auto rows = alphas.contiguous();
  return coefficient_rows(rows, 2, at::kFloat, steps, [&](int64_t i, int64_t step) {
    const float* alpha = rows.const_data_ptr<float>() + 2 * i;
    return ddpm_step(prediction, variance, alpha[0], alpha[1], step == 0);
  });
}

at::Tensor ddim_coefficients(const at::Tensor& alphas, const at::Tensor& steps, const std::string& prediction_type,
                             double eta, bool use_clipped_model_output) {
  TORCH_CHECK_VALUE(eta >= 0 && std::isfinite(eta), "eta: expected a number from 0 on, got ", eta);
  const auto prediction = prediction_of(prediction_type);
  const auto rows = alphas.contiguous();
  return coefficient_rows(rows, 2, at::kFloat, steps, [&](int64_t i, int64_t) {
    const float* alpha = rows.const_data_ptr<float>() + 2 * i;
    return ddim_step(prediction, static_cast<float>(eta), use_clipped_model_output, alpha[0], alpha[1]);
  });
}

at::Tensor dpm_coefficients(const at::Tensor& ratios, const at::Tensor& steps, const std::string& prediction_type,
                            int64_t order, const std::string& solver_type, const std::string& algorithm_type) {
  TORCH_CHECK_VALUE(order >= 1 && order <= 3, "order: expected 1, 2 or 3, got ", order);
  const auto prediction = prediction_of(prediction_type);
  const bool heun = solver_type == "heun", sde = algorithm_type == "sde-dpmsolver++";
  const auto rows = ratios.contiguous();
  return coefficient_rows(rows, 4, at::kDouble, steps, [&](int64_t i, int64_t) {
    return dpm_step(prediction, static_cast<int>(order), heun, sde, rows.const_data_ptr<double>() + 4 * i);
  });
}

}  // namespace sslfast
