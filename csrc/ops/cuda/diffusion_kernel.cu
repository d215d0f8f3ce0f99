// Diffusion on CUDA. The formulas: csrc/ops/diffusion.h, csrc/common/schedule.h, csrc/common/normal.h.
//
// A thread has 16 elements of one sample, four times four neighbours: those that four blocks of Philox make normal
// numbers for (csrc/common/normal.h). Four neighbours are one access of 16 bytes (8 in half precision); the four
// threads beside each other read and write 64 bytes in a row. Traffic is the least possible: every element of every
// tensor is moved once. Arithmetic: 12 operations an element, and about 60 for a normal number.
//
// The loss is one block a sample; its sums are added in a fixed order.
#include <initializer_list>

#include "csrc/common/convert.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/memory.cuh"
#include "csrc/common/normal.h"
#include "csrc/common/warp.cuh"
#include "csrc/ops/cuda/diffusion_kernel.h"

namespace sslfast {
namespace {

constexpr int kThreads = 256;
constexpr int kQuads = 4;  // of a thread
constexpr int kParts = 4;  // threads that share a group of 64 elements

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};

/// The elements of one thread: quad j is 16·j further on.
struct Place {
  int64_t sample, group;
  int part;

  __device__ explicit Place(const DiffusionCudaProblem& p) {
    const int64_t groups = (p.elements + kNormalGroup - 1) / kNormalGroup;
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    part = static_cast<int>(thread % kParts);
    group = thread / kParts % groups;
    sample = thread / kParts / groups;
  }
  __device__ int64_t first(int j) const { return group * kNormalGroup + j * kNormalBlocks + part * 4; }
};

/// Four elements from `first` of `elements` on; kAligned: `elements` is a multiple of four.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_quad(const void* from, int64_t row, int64_t first, int64_t elements, float* out) {
  const T* source = static_cast<const T*>(from) + row + first;
  if constexpr (kAligned) {
    const Quad<T> quad = load_global(reinterpret_cast<const Quad<T>*>(source));
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(quad.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = first + i < elements ? to_float(load_global(source + i)) : 0.0f;
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_quad(void* to, int64_t row, int64_t first, int64_t elements, const float* in) {
  T* target = static_cast<T*>(to) + row + first;
  if constexpr (kAligned) {
    Quad<T> quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.at[i] = from_float<T>(in[i]);
    store_global(reinterpret_cast<Quad<T>*>(target), quad);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < elements) store_global(target + i, from_float<T>(in[i]));
  }
}

/// The normal numbers of a thread's elements, [quad][i].
__device__ __forceinline__ void draw_normals(const int64_t* seeds, uint32_t step, const Place& at,
                                             float (*numbers)[4]) {
  const uint64_t seed = static_cast<uint64_t>(load_global(seeds + at.sample));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float block[4];
    normal_block(seed, 0, step, kPhiloxNoise, static_cast<uint32_t>(at.group * kNormalBlocks + at.part * 4 + i), block);
#pragma unroll
    for (int j = 0; j < kQuads; ++j) numbers[j][i] = block[j];
  }
}

/// NaN stays NaN.
__device__ __forceinline__ float clamp(float x, float limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

__device__ __forceinline__ StepCoefficients load_coefficients(const StepCoefficients* from) {
  float fields[kStepFields];
#pragma unroll
  for (int i = 0; i < kStepFields; ++i) fields[i] = load_global(reinterpret_cast<const float*>(from) + i);
  StepCoefficients c;
  memcpy(&c, fields, sizeof c);
  return c;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) diffusion_step_kernel(DiffusionStepCudaParams p) {
  const Place at(p.problem);
  if (at.sample >= p.problem.samples) return;
  const int64_t elements = p.problem.elements, row = at.sample * elements;
  const int64_t model_row = p.learned || p.learned_range ? 2 * row : row;
  const StepCoefficients c = load_coefficients(p.coefficients + at.sample * p.coefficients_stride);
  const float limit = p.threshold != nullptr ? load_global(p.threshold + at.sample) : p.clip;
  const float inverse = p.threshold != nullptr ? 1.0f / limit : 1.0f;
  const bool has_noise = c.noise != 0.0f && (p.noise.given != nullptr || p.noise.seeds != nullptr);
  float normals[kQuads][4];
  if (has_noise && p.noise.seeds != nullptr) draw_normals(p.noise.seeds, philox_step(c), at, normals);
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const int64_t first = at.first(j);
    if (first >= elements) break;
    float model[4], sample[4], old[4], x0[4], previous[4];
    load_quad<T, kAligned>(p.model, model_row, first, elements, model);
    load_quad<T, kAligned>(p.sample, row, first, elements, sample);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x0[i] = clamp((c.predict_sample * sample[i] + c.predict_model * model[i]) * c.predict_scale, limit) * inverse;
      previous[i] = c.x0 * x0[i] + c.sample * sample[i] + c.model * model[i];
    }
    if (has_noise) {
      if (p.noise.given != nullptr) load_quad<T, kAligned>(p.noise.given, row, first, elements, normals[j]);
      if (p.learned || p.learned_range) {
        float variance[4];
        load_quad<T, kAligned>(p.model, model_row + elements, first, elements, variance);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float share = (variance[i] + 1.0f) / 2.0f;
          const float log_variance = share * c.log_variance_max + (1.0f - share) * c.log_variance_min;
          normals[j][i] *= p.learned ? sqrtf(variance[i]) : expf(log_variance / 2.0f);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) previous[i] += c.noise * normals[j][i];
    }
    if (p.history0 != nullptr) {
      load_quad<T, kAligned>(p.history0, row, first, elements, old);
#pragma unroll
      for (int i = 0; i < 4; ++i) previous[i] += c.history0 * old[i];
    }
    if (p.history1 != nullptr) {
      load_quad<T, kAligned>(p.history1, row, first, elements, old);
#pragma unroll
      for (int i = 0; i < 4; ++i) previous[i] += c.history1 * old[i];
    }
    store_quad<T, kAligned>(p.previous, row, first, elements, previous);
    store_quad<T, kAligned>(p.x0, row, first, elements, x0);
  }
}

/// ᾱ of a sample; NaN where the timestep is out of range.
__device__ __forceinline__ float alpha_bar(const float* alphas, const int64_t* timesteps, int64_t steps,
                                           int64_t sample) {
  const int64_t t = load_global(timesteps + sample);
  return t >= 0 && t < steps ? load_global(alphas + t) : nanf("");
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) diffusion_q_sample_kernel(DiffusionQSampleCudaParams p) {
  const Place at(p.problem);
  if (at.sample >= p.problem.samples) return;
  const int64_t elements = p.problem.elements, row = at.sample * elements;
  const float cumprod = alpha_bar(p.alphas_cumprod, p.timesteps, p.steps, at.sample);
  const float alpha = sqrtf(cumprod), sigma = sqrtf(1.0f - cumprod);
  float normals[kQuads][4];
  if (p.noise.seeds != nullptr) draw_normals(p.noise.seeds, p.step, at, normals);
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const int64_t first = at.first(j);
    if (first >= elements) break;
    float x0[4], noisy[4], target[4];
    load_quad<T, kAligned>(p.x0, row, first, elements, x0);
    if (p.noise.given != nullptr) load_quad<T, kAligned>(p.noise.given, row, first, elements, normals[j]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      noisy[i] = alpha * x0[i] + sigma * normals[j][i];
      target[i] = p.velocity ? alpha * normals[j][i] - sigma * x0[i] : normals[j][i];
    }
    store_quad<T, kAligned>(p.noisy, row, first, elements, noisy);
    if (p.target != nullptr) store_quad<T, kAligned>(p.target, row, first, elements, target);
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) diffusion_noise_kernel(DiffusionNoiseCudaParams p) {
  const Place at(p.problem);
  if (at.sample >= p.problem.samples) return;
  float normals[kQuads][4];
  draw_normals(p.seeds, p.step, at, normals);
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    if (at.first(j) >= p.problem.elements) break;
    store_quad<T, kAligned>(p.out, at.sample * p.problem.elements, at.first(j), p.problem.elements, normals[j]);
  }
}

__device__ __forceinline__ float loss_factor(const DiffusionLossCudaParams& p, int64_t sample) {
  const float mean = 1.0f / static_cast<float>(p.problem.elements);
  if (!p.weighted) return mean;
  return mean *
         min_snr_weight(p.parametrization, alpha_bar(p.alphas_cumprod, p.timesteps, p.steps, sample), p.snr_gamma);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) diffusion_loss_forward_kernel(DiffusionLossCudaParams p) {
  const int64_t elements = p.problem.elements, row = blockIdx.x * elements;
  float sums[4] = {};
  for (int64_t first = 4 * threadIdx.x; first < elements; first += 4 * kThreads) {
    float prediction[4], target[4];
    load_quad<T, kAligned>(p.prediction, row, first, elements, prediction);
    load_quad<T, kAligned>(p.target, row, first, elements, target);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += (prediction[i] - target[i]) * (prediction[i] - target[i]);
  }
  const float sum =
      block_reduce<kThreads>((sums[0] + sums[1]) + (sums[2] + sums[3]), [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) store_global(p.loss + blockIdx.x, sum * loss_factor(p, blockIdx.x));
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) diffusion_loss_backward_kernel(DiffusionLossCudaParams p) {
  const Place at(p.problem);
  if (at.sample >= p.problem.samples) return;
  const int64_t elements = p.problem.elements, row = at.sample * elements;
  const float factor = 2.0f * loss_factor(p, at.sample) * load_global(p.grad_loss + at.sample);
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const int64_t first = at.first(j);
    if (first >= elements) break;
    float prediction[4], target[4], gradient[4];
    load_quad<T, kAligned>(p.prediction, row, first, elements, prediction);
    load_quad<T, kAligned>(p.target, row, first, elements, target);
#pragma unroll
    for (int i = 0; i < 4; ++i) gradient[i] = factor * (prediction[i] - target[i]);
    if (p.grad_prediction != nullptr) store_quad<T, kAligned>(p.grad_prediction, row, first, elements, gradient);
#pragma unroll
    for (int i = 0; i < 4; ++i) gradient[i] = -gradient[i];
    if (p.grad_target != nullptr) store_quad<T, kAligned>(p.grad_target, row, first, elements, gradient);
  }
}

template <typename Params>
using Kernel = void (*)(Params);

/// A kernel for each type, by elements and by quads.
#define SSLFAST_KERNELS(kernel)                                                                                 \
  {                                                                                                             \
    {kernel<float, false>, kernel<float, true>}, {kernel<__nv_bfloat16, false>, kernel<__nv_bfloat16, true>}, { \
      kernel<__half, false>, kernel<__half, true>                                                               \
    }                                                                                                           \
  }

/// Launches the kernel that fits the type, by quads if all rows of all these tensors lie at whole quads.
template <typename Params>
void launch_one(const char* name, const Kernel<Params> (&kernels)[3][2], const Params& p,
                std::initializer_list<const void*> tensors, bool block_a_sample, cudaStream_t stream) {
  const auto& problem = p.problem;
  if (problem.samples * problem.elements == 0) return;
  const int64_t groups = (problem.elements + kNormalGroup - 1) / kNormalGroup;
  const int64_t blocks =
      block_a_sample ? problem.samples : (problem.samples * groups * kParts + kThreads - 1) / kThreads;
  if (blocks > 0x7FFFFFFF) throw std::runtime_error(std::string(name) + ": more than 2^31 - 1 blocks");
  const size_t quad_bytes = problem.type == DiffusionCudaType::float32 ? 16 : 8;
  bool quads = problem.elements % 4 == 0;
  for (const void* tensor : tensors) quads = quads && reinterpret_cast<uintptr_t>(tensor) % quad_bytes == 0;
  const size_t shared_bytes = block_a_sample ? kReduceBytes<kThreads> : 0;
  launch(kernels[static_cast<int>(problem.type)][quads],
         {name, static_cast<unsigned>(blocks), kThreads, shared_bytes, stream}, p);
}

}  // namespace

void launch_diffusion_step_cuda(const DiffusionStepCudaParams& p, cudaStream_t stream) {
  launch_one<DiffusionStepCudaParams>("diffusion_step", SSLFAST_KERNELS(diffusion_step_kernel), p,
                                      {p.model, p.sample, p.history0, p.history1, p.noise.given, p.previous, p.x0},
                                      false, stream);
}
void launch_diffusion_q_sample_cuda(const DiffusionQSampleCudaParams& p, cudaStream_t stream) {
  launch_one<DiffusionQSampleCudaParams>("diffusion_q_sample", SSLFAST_KERNELS(diffusion_q_sample_kernel), p,
                                         {p.x0, p.noise.given, p.noisy, p.target}, false, stream);
}
void launch_diffusion_loss_forward_cuda(const DiffusionLossCudaParams& p, cudaStream_t stream) {
  launch_one<DiffusionLossCudaParams>("diffusion_loss_forward", SSLFAST_KERNELS(diffusion_loss_forward_kernel), p,
                                      {p.prediction, p.target}, true, stream);
}
void launch_diffusion_loss_backward_cuda(const DiffusionLossCudaParams& p, cudaStream_t stream) {
  launch_one<DiffusionLossCudaParams>("diffusion_loss_backward", SSLFAST_KERNELS(diffusion_loss_backward_kernel), p,
                                      {p.prediction, p.target, p.grad_prediction, p.grad_target}, false, stream);
}
void launch_diffusion_noise_cuda(const DiffusionNoiseCudaParams& p, cudaStream_t stream) {
  launch_one<DiffusionNoiseCudaParams>("diffusion_noise", SSLFAST_KERNELS(diffusion_noise_kernel), p, {p.out}, false,
                                       stream);
}

}  // namespace sslfast
