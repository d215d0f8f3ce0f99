// Diffusion on the CPU. Threads share out chunks of samples; a chunk is done block by block in the first-level cache:
// normal numbers into a buffer, then one pass over the inputs.
//
//   step:     x0 = clip(scale·(a·x + b·model)); previous = A·x0 + B·x + C·model (+ D·x0' + E·x0'') + σ·normal
//   q_sample: noisy = √ᾱ·x0 + √(1−ᾱ)·normal; target = normal, or √ᾱ·normal − √(1−ᾱ)·x0
//   loss:     w(ᾱ)·mean((prediction − target)²) of a sample; backward 2·w/elements·(prediction − target)·grad
//
// Least memory traffic a step, in elements: 2 read, 2 written, 3 more where noise and history are given. Arithmetic: 12
// operations, and about 40 for a normal number.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "csrc/common/normal_vec.h"
#include "csrc/common/vec.h"
#include "csrc/ops/diffusion.h"

namespace sslfast {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 1024;         // elements that go through the first-level cache together
constexpr int64_t kChunk = 16 * kBlock;  // of one sample, a task
static_assert(kBlock % kNormalGroup == 0);

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// Room for one operand of a block in the type of the arithmetic.
template <typename T>
struct Buffer {
  alignas(64) Acc<T> at[kBlock];

  /// `count` elements from `from` in the type of the arithmetic: where they are, or converted.
  const Acc<T>* load(const void* from, int64_t offset, int64_t count) {
    const T* source = static_cast<const T*>(from) + offset;
    if constexpr (std::is_same_v<T, Acc<T>>) {
      return source;
    } else {
      for (int64_t i = 0; i < count; ++i) at[i] = static_cast<float>(source[i]);
      return at;
    }
  }

  /// Where to write elements that store() then takes to `to`.
  Acc<T>* begin_store(void* to, int64_t offset) {
    if constexpr (std::is_same_v<T, Acc<T>>) return static_cast<T*>(to) + offset;
    return at;
  }
  void end_store(void* to, int64_t offset, int64_t count) {
    if constexpr (!std::is_same_v<T, Acc<T>>) {
      T* target = static_cast<T*>(to) + offset;
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<T>(at[i]);
    }
  }
};

/// The normal numbers of a block, `first` … `first + count − 1` of a sample.
template <typename T>
struct Normals {
  Buffer<T> given;
  alignas(64) float drawn[kBlock];
  alignas(64) std::conditional_t<std::is_same_v<T, double>, double, char> wide[kBlock];

  const Acc<T>* get(const NormalSource& source, int64_t sample, int64_t elements, uint32_t step, int64_t first,
                    int64_t count) {
    if (source.given != nullptr) return given.load(source.given, sample * elements + first, count);
    const int64_t groups = (count + kNormalGroup - 1) / kNormalGroup;
    normal_groups(static_cast<uint64_t>(source.seeds[sample]), 0, step, kPhiloxNoise, first / kNormalGroup, groups,
                  drawn);
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < count; ++i) wide[i] = drawn[i];
      return wide;
    } else {
      return drawn;
    }
  }
};

/// work(sample, first, count) for all blocks of all samples, chunks of a sample in parallel.
template <typename Work>
void for_each_block(int64_t samples, int64_t elements, const Work& work) {
  const int64_t chunks = (elements + kChunk - 1) / kChunk;
  const int64_t chunk = elements < kChunk ? elements : kChunk;
  const int64_t grain = chunk == 0 ? 1 : (kChunk + chunk - 1) / chunk;  // tasks that are worth a thread
  at::parallel_for(0, samples * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / chunks, from = task % chunks * kChunk;
      const int64_t to = from + kChunk < elements ? from + kChunk : elements;
      for (int64_t first = from; first < to; first += kBlock)
        work(sample, first, to - first < kBlock ? to - first : kBlock);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- step

/// NaN stays NaN.
template <typename A>
inline __attribute__((always_inline)) A clamp(A x, A limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

/// Multiplies normal numbers with the standard deviations that the model has learned, into `out`.
template <typename A>
void scale_by_learned(A* out, const A* normal, const A* learned, const StepCoefficients& c, StepVariance variance,
                      int64_t count) {
  if (variance == StepVariance::Learned) {
    for (int64_t i = 0; i < count; ++i) out[i] = std::sqrt(learned[i]) * normal[i];
    return;
  }
  const A low = c.log_variance_min / 2, high = c.log_variance_max / 2;
  for (int64_t i = 0; i < count; ++i) {
    const A share = (learned[i] + 1) / 2;
    out[i] = std::exp(share * high + (1 - share) * low) * normal[i];
  }
}

template <typename T>
void step(const DiffusionStepParams& p) {
  using A = Acc<T>;
  const bool has_learned = p.variance != StepVariance::Fixed;
  const bool has_noise = p.noise.given != nullptr || p.noise.seeds != nullptr;
  for_each_block(p.samples, p.elements, [&](int64_t sample, int64_t first, int64_t count) {
    Buffer<T> model_buffer, sample_buffer, learned_buffer, history_buffer[2], previous_buffer, x0_buffer;
    Normals<T> normals;
    const StepCoefficients& c = p.coefficients[sample * p.coefficients_stride];
    const int64_t at = sample * p.elements + first, model_at = has_learned ? 2 * at - first : at;
    const A* model = model_buffer.load(p.model, model_at, count);
    const A* x = sample_buffer.load(p.sample, at, count);
    A* previous = previous_buffer.begin_store(p.previous, at);
    A* x0 = x0_buffer.begin_store(p.x0, at);

    const A of_sample = c.predict_sample, of_model = c.predict_model, scale = c.predict_scale;
    const A limit = static_cast<A>(p.threshold != nullptr ? p.threshold[sample] : p.clip);
    const A inverse = p.threshold != nullptr ? 1 / limit : 1;
    const A w0 = c.x0, w1 = c.sample, w2 = c.model;
    const auto mean = [&](int64_t i) {
      x0[i] = clamp((of_sample * x[i] + of_model * model[i]) * scale, limit) * inverse;
      return w0 * x0[i] + w1 * x[i] + w2 * model[i];
    };
    if (has_noise && c.noise != 0) {
      const A* normal = normals.get(p.noise, sample, p.elements, philox_step(c), first, count);
      if (has_learned) {
        const A* learned = learned_buffer.load(p.model, model_at + p.elements, count);
        scale_by_learned(normals.given.at, normal, learned, c, p.variance, count);
        normal = normals.given.at;
      }
      const A deviation = c.noise;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) previous[i] = mean(i) + deviation * normal[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) previous[i] = mean(i);
    }
    const A weights[2] = {c.history0, c.history1};
    const void* sources[2] = {p.history0, p.history1};
    for (int k = 0; k < 2; ++k) {
      if (sources[k] == nullptr) continue;
      const A* old = history_buffer[k].load(sources[k], at, count);
      for (int64_t i = 0; i < count; ++i) previous[i] += weights[k] * old[i];
    }
    previous_buffer.end_store(p.previous, at, count);
    x0_buffer.end_store(p.x0, at, count);
  });
}

// ---------------------------------------------------------------------------------------------------- q_sample

/// ᾱ of a sample; NaN where the timestep is out of range, which the tensor side refuses on the CPU.
inline float alpha_bar(const float* alphas, const int64_t* timesteps, int64_t steps, int64_t sample) {
  const int64_t t = timesteps[sample];
  return t >= 0 && t < steps ? alphas[t] : std::numeric_limits<float>::quiet_NaN();
}

template <typename T>
void q_sample(const DiffusionQSampleParams& p) {
  using A = Acc<T>;
  for_each_block(p.samples, p.elements, [&](int64_t sample, int64_t first, int64_t count) {
    Buffer<T> x0_buffer, noisy_buffer, target_buffer;
    Normals<T> normals;
    const A alpha_cumprod = alpha_bar(p.alphas_cumprod, p.timesteps, p.steps, sample);
    const A alpha = std::sqrt(alpha_cumprod), sigma = std::sqrt(1 - alpha_cumprod);
    const int64_t at = sample * p.elements + first;
    const A* x0 = x0_buffer.load(p.x0, at, count);
    const A* normal = normals.get(p.noise, sample, p.elements, p.step, first, count);
    A* noisy = noisy_buffer.begin_store(p.noisy, at);
    if (p.target == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) noisy[i] = alpha * x0[i] + sigma * normal[i];
    } else {
      A* target = target_buffer.begin_store(p.target, at);
      if (p.prediction == DiffusionPrediction::Velocity) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          noisy[i] = alpha * x0[i] + sigma * normal[i];
          target[i] = alpha * normal[i] - sigma * x0[i];
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          noisy[i] = alpha * x0[i] + sigma * normal[i];
          target[i] = normal[i];
        }
      }
      target_buffer.end_store(p.target, at, count);
    }
    noisy_buffer.end_store(p.noisy, at, count);
  });
}

// ---------------------------------------------------------------------------------------------------- loss

template <typename T>
double loss_factor(const DiffusionLossParams& p, int64_t sample) {
  const double mean = 1.0 / static_cast<double>(p.elements);
  if (!p.weighted) return mean;
  const float alpha = alpha_bar(p.alphas_cumprod, p.timesteps, p.steps, sample);
  return mean * min_snr_weight(p.parametrization, alpha, p.snr_gamma);
}

// A sample is one thread's, in blocks whose sums are added in double: the same bits for any number of threads.
template <typename T>
void loss_forward(const DiffusionLossParams& p) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A>;
  at::parallel_for(0, p.samples, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> prediction_buffer, target_buffer;
    for (int64_t sample = begin; sample < end; ++sample) {
      double sum = 0;
      for (int64_t first = 0; first < p.elements; first += kBlock) {
        const int64_t count = p.elements - first < kBlock ? p.elements - first : kBlock;
        const A* prediction = prediction_buffer.load(p.prediction, sample * p.elements + first, count);
        const A* target = target_buffer.load(p.target, sample * p.elements + first, count);
        Vec<A> sums[2] = {};
        int64_t i = 0;
        for (; i + 2 * kLane <= count; i += 2 * kLane)
          for (int k = 0; k < 2; ++k) {
            const Vec<A> difference = load(prediction + i + k * kLane) - load(target + i + k * kLane);
            sums[k] += difference * difference;
          }
        for (; i < count; ++i) sum += static_cast<double>(prediction[i] - target[i]) * (prediction[i] - target[i]);
        sum += sum_lanes<A>(sums[0] + sums[1]);
      }
      static_cast<A*>(p.loss)[sample] = static_cast<A>(sum * loss_factor<T>(p, sample));
    }
  });
}

template <typename T>
void loss_backward(const DiffusionLossParams& p) {
  using A = Acc<T>;
  for_each_block(p.samples, p.elements, [&](int64_t sample, int64_t first, int64_t count) {
    Buffer<T> prediction_buffer, target_buffer, gradient_buffer;
    const int64_t at = sample * p.elements + first;
    const A* prediction = prediction_buffer.load(p.prediction, at, count);
    const A* target = target_buffer.load(p.target, at, count);
    const A incoming = static_cast<const A*>(p.grad_loss)[sample];
    for (const bool to_target : {false, true}) {
      void* out = to_target ? p.grad_target : p.grad_prediction;
      if (out == nullptr) continue;
      const A factor = static_cast<A>((to_target ? -2 : 2) * loss_factor<T>(p, sample) * incoming);
      A* gradient = gradient_buffer.begin_store(out, at);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) gradient[i] = factor * (prediction[i] - target[i]);
      gradient_buffer.end_store(out, at, count);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- noise

template <typename T>
void noise(const DiffusionNoiseParams& p) {
  for_each_block(p.samples, p.elements, [&](int64_t sample, int64_t first, int64_t count) {
    Normals<T> normals;
    const Acc<T>* normal = normals.get({nullptr, p.seeds}, sample, p.elements, p.step, first, count);
    T* out = static_cast<T*>(p.out) + sample * p.elements + first;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(normal[i]);
  });
}

#define SSLFAST_DISPATCH_DTYPE(function, p) \
  switch (p.dtype) {                        \
    case c10::ScalarType::Double:           \
      return function<double>(p);           \
    case c10::ScalarType::BFloat16:         \
      return function<c10::BFloat16>(p);    \
    case c10::ScalarType::Half:             \
      return function<c10::Half>(p);        \
    default:                                \
      return function<float>(p);            \
  }

}  // namespace

void launch_diffusion_step_cpu(const DiffusionStepParams& params) { SSLFAST_DISPATCH_DTYPE(step, params) }
void launch_diffusion_q_sample_cpu(const DiffusionQSampleParams& params) { SSLFAST_DISPATCH_DTYPE(q_sample, params) }
void launch_diffusion_loss_forward_cpu(const DiffusionLossParams& params) {
  SSLFAST_DISPATCH_DTYPE(loss_forward, params)
}
void launch_diffusion_loss_backward_cpu(const DiffusionLossParams& params) {
  SSLFAST_DISPATCH_DTYPE(loss_backward, params)
}
void launch_diffusion_noise_cpu(const DiffusionNoiseParams& params) { SSLFAST_DISPATCH_DTYPE(noise, params) }

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
