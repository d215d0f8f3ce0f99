// Group normalisation + SiLU on CUDA. The formulas: csrc/ops/group_norm_silu.h.
//
// A block has one group of one sample and goes over it three times in forward (mean, variance, output) and twice in
// backward (sums, gradient); all but the first reading come from a cache where the group fits. Least traffic, and that
// of a group in cache: forward reads x and writes the output; backward reads x and the gradient and writes one.
//
// Threads move `kWidth` neighbours at a time: 16 bytes of float or 8 of half precision where rows allow it, else one
// element. In backward each channel is summed by one warp, or with channels_last by every R-th thread; sums are added
// in a fixed order.
#include "csrc/common/convert.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/memory.cuh"
#include "csrc/common/warp.cuh"
#include "csrc/ops/cuda/group_norm_silu_kernel.h"

namespace sslfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Some {
  T at[kWidth];
};

template <int kWidth, typename T>
__device__ __forceinline__ void load_some(const void* from, int64_t offset, float* out) {
  const auto some = load_global(reinterpret_cast<const Some<T, kWidth>*>(static_cast<const T*>(from) + offset));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = to_float(some.at[i]);
}

template <int kWidth, typename T>
__device__ __forceinline__ void store_some(void* to, int64_t offset, const float* in) {
  Some<T, kWidth> some;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) some.at[i] = from_float<T>(in[i]);
  store_global(reinterpret_cast<Some<T, kWidth>*>(static_cast<T*>(to) + offset), some);
}

__device__ __forceinline__ float sigmoid(float y) { return 1.0f / (1.0f + fast_exp2(-1.44269504f * y)); }

/// The group of this block.
template <int kWidth>
struct Group {
  int width, places, row, rows;  // channels; packs in a row; rows
  int64_t first, stride;         // offset of its first element; elements from row to row
  int sample, channel, number;
  bool last;
  float inverse_count;

  __device__ explicit Group(const GroupNormSiluCudaParams& p) {
    number = blockIdx.x;
    sample = static_cast<int>(number / p.groups);
    width = static_cast<int>(p.channels / p.groups);
    channel = static_cast<int>(number % p.groups) * width;
    places = static_cast<int>(p.places);
    last = p.channels_last;
    row = (last ? width : places) / kWidth;
    rows = last ? places : width;
    first = int64_t{sample} * p.channels * p.places + (last ? channel : channel * p.places);
    stride = last ? p.channels : p.places;
    inverse_count = 1.0f / (static_cast<float>(width) * static_cast<float>(places));
  }
  /// The channel in the group that element i of a pack belongs to.
  __device__ int channel_of(int r, int column, int i) const { return last ? column * kWidth + i : r; }
  __device__ int64_t offset(int r, int column) const { return first + r * stride + int64_t{column} * kWidth; }

  /// visit(row, column) for all packs of this thread.
  template <typename Visit>
  __device__ __forceinline__ void for_packs(const Visit& visit) const {
    for (int64_t k = threadIdx.x; k < int64_t{row} * rows; k += kThreads)
      visit(static_cast<int>(k / row), static_cast<int>(k % row));
  }
};

/// The sum over all threads of the block, in all of them.
__device__ __forceinline__ float block_sum(float value) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  value = block_reduce<kThreads>(value, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) shared[0] = value;
  __syncthreads();
  value = shared[0];
  __syncthreads();
  return value;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_silu_forward_kernel(GroupNormSiluCudaParams p) {
  const Group<kWidth> group(p);
  float sum = 0.0f, x[kWidth];
  group.for_packs([&](int r, int column) {
    load_some<kWidth, T>(p.x, group.offset(r, column), x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += x[i];
  });
  const float mean = block_sum(sum) * group.inverse_count;
  sum = 0.0f;
  group.for_packs([&](int r, int column) {
    load_some<kWidth, T>(p.x, group.offset(r, column), x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += (x[i] - mean) * (x[i] - mean);
  });
  const float rstd = 1.0f / sqrtf(block_sum(sum) * group.inverse_count + p.eps);
  if (threadIdx.x == 0) {
    store_global(p.mean + group.number, mean);
    store_global(p.rstd + group.number, rstd);
  }
  group.for_packs([&](int r, int column) {
    load_some<kWidth, T>(p.x, group.offset(r, column), x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int channel = group.channel + group.channel_of(r, column, i);
      const float scale = p.weight != nullptr ? load_global(p.weight + channel) : 1.0f;
      const float shift = p.bias != nullptr ? load_global(p.bias + channel) : 0.0f;
      const float y = (x[i] - mean) * rstd * scale + shift;
      x[i] = y * sigmoid(y);
    }
    store_some<kWidth, T>(p.out, group.offset(r, column), x);
  });
}

/// z = grad · d silu(y)/dy and x̂ of a pack.
template <typename T, int kWidth>
__device__ __forceinline__ void derivatives(const GroupNormSiluCudaParams& p, const Group<kWidth>& group, int r,
                                            int column, float mean, float rstd, float* z, float* normalised,
                                            float* scale) {
  load_some<kWidth, T>(p.x, group.offset(r, column), normalised);
  load_some<kWidth, T>(p.grad_out, group.offset(r, column), z);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int channel = group.channel + group.channel_of(r, column, i);
    scale[i] = p.weight != nullptr ? load_global(p.weight + channel) : 1.0f;
    const float shift = p.bias != nullptr ? load_global(p.bias + channel) : 0.0f;
    normalised[i] = (normalised[i] - mean) * rstd;
    const float y = normalised[i] * scale[i] + shift, sigma = sigmoid(y);
    z[i] *= sigma * (1.0f + y * (1.0f - sigma));
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) group_norm_silu_backward_kernel(GroupNormSiluCudaParams p) {
  const Group<kWidth> group(p);
  const float mean = load_global(p.mean + group.number), rstd = load_global(p.rstd + group.number);
  float* partial = reinterpret_cast<float*>(shared_memory());  // (kThreads, kWidth, 2) with channels_last
  float* of_z = p.grad_parameters + (p.samples + group.sample) * p.channels + group.channel;
  float* of_zx = p.grad_parameters + group.sample * p.channels + group.channel;
  float z[kWidth], normalised[kWidth], scale[kWidth];
  float group_z = 0.0f, group_zx = 0.0f;  // of this thread's channels, times γ

  const auto finish = [&](int channel, float sum_z, float sum_zx) {
    store_global(of_z + channel, sum_z);
    store_global(of_zx + channel, sum_zx);
    const float gamma = p.weight != nullptr ? load_global(p.weight + group.channel + channel) : 1.0f;
    group_z += gamma * sum_z;
    group_zx += gamma * sum_zx;
  };
  if (!group.last) {  // a warp a channel
    for (int r = threadIdx.x / 32; r < group.rows; r += kWarps) {
      float sum_z = 0.0f, sum_zx = 0.0f;
      for (int column = threadIdx.x % 32; column < group.row; column += 32) {
        derivatives<T, kWidth>(p, group, r, column, mean, rstd, z, normalised, scale);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          sum_z += z[i];
          sum_zx += z[i] * normalised[i];
        }
      }
      sum_z = warp_sum(sum_z);
      sum_zx = warp_sum(sum_zx);
      if (threadIdx.x % 32 == 0) finish(r, sum_z, sum_zx);
    }
  } else {  // thread t: columns t % n, t % n + n, … of rows t / n, t / n + R, …
    const int columns = group.row < kThreads ? group.row : kThreads, lines = kThreads / columns;
    for (int begin = 0; begin < group.row; begin += columns) {
      const int column = begin + threadIdx.x % columns, line = threadIdx.x / columns;
      float sums[kWidth][2] = {};
      if (column < group.row && line < lines) {
        for (int r = line; r < group.rows; r += lines) {
          derivatives<T, kWidth>(p, group, r, column, mean, rstd, z, normalised, scale);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            sums[i][0] += z[i];
            sums[i][1] += z[i] * normalised[i];
          }
        }
      }
      __syncthreads();
      for (int i = 0; i < kWidth; ++i)
        for (int k = 0; k < 2; ++k) partial[(threadIdx.x * kWidth + i) * 2 + k] = sums[i][k];
      __syncthreads();
      if (line == 0 && column < group.row) {
        for (int i = 0; i < kWidth; ++i) {
          float sum_z = 0.0f, sum_zx = 0.0f;
          for (int from = 0; from < lines; ++from) {
            const float* sum = partial + ((from * columns + threadIdx.x) * kWidth + i) * 2;
            sum_z += sum[0];
            sum_zx += sum[1];
          }
          finish(column * kWidth + i, sum_z, sum_zx);
        }
      }
    }
  }
  __syncthreads();
  const float mean_z = block_sum(group_z) * group.inverse_count;
  const float mean_zx = block_sum(group_zx) * group.inverse_count;
  group.for_packs([&](int r, int column) {
    derivatives<T, kWidth>(p, group, r, column, mean, rstd, z, normalised, scale);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) z[i] = rstd * (scale[i] * z[i] - mean_z - normalised[i] * mean_zx);
    store_some<kWidth, T>(p.grad_x, group.offset(r, column), z);
  });
}

/// The parts of all samples added up, a thread a channel.
__global__ void __launch_bounds__(kThreads) group_norm_silu_parameters_kernel(GroupNormSiluCudaParams p) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  float weight = 0.0f, bias = 0.0f;
  for (int64_t n = 0; n < p.samples; ++n) {
    weight += load_global(p.grad_parameters + n * p.channels + channel);
    bias += load_global(p.grad_parameters + (p.samples + n) * p.channels + channel);
  }
  store_global(p.grad_weight + channel, weight);
  store_global(p.grad_bias + channel, bias);
}

constexpr size_t kSharedBytes = kThreads * 4 * 2 * sizeof(float);

template <typename T>
bool in_packs(const GroupNormSiluCudaParams& p) {
  bool aligned = (p.channels_last ? p.channels / p.groups : p.places) % 4 == 0;
  for (const void* pointer : {p.x, static_cast<const void*>(p.out), p.grad_out, static_cast<const void*>(p.grad_x)})
    aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % (4 * sizeof(T)) == 0;
  return aligned;
}

template <typename T>
void launch_type(const GroupNormSiluCudaParams& p, bool backward, cudaStream_t stream) {
  const int64_t blocks = p.samples * p.groups;
  if (blocks > 0x7FFFFFFF || p.places > 0x7FFFFFFF)
    throw std::runtime_error("group_norm_silu: more than 2^31 - 1 groups");
  const bool packs = in_packs<T>(p);
  const auto go = [&](const char* name, auto kernel) {
    launch(kernel, {name, static_cast<unsigned>(blocks), kThreads, kSharedBytes, stream}, p);
  };
  if (!backward) {
    go("group_norm_silu_forward", packs ? group_norm_silu_forward_kernel<T, 4> : group_norm_silu_forward_kernel<T, 1>);
    return;
  }
  go("group_norm_silu_backward", packs ? group_norm_silu_backward_kernel<T, 4> : group_norm_silu_backward_kernel<T, 1>);
  const auto rows = static_cast<unsigned>((p.channels + kThreads - 1) / kThreads);
  launch(group_norm_silu_parameters_kernel, {"group_norm_silu_parameters", rows, kThreads, 0, stream}, p);
}

void launch_any(const GroupNormSiluCudaParams& p, bool backward, cudaStream_t stream) {
  switch (p.type) {
    case GroupNormSiluCudaType::float32:
      return launch_type<float>(p, backward, stream);
    case GroupNormSiluCudaType::bfloat16:
      return launch_type<__nv_bfloat16>(p, backward, stream);
    case GroupNormSiluCudaType::float16:
      return launch_type<__half>(p, backward, stream);
  }
}

}  // namespace

void launch_group_norm_silu_forward_cuda(const GroupNormSiluCudaParams& p, cudaStream_t stream) {
  launch_any(p, false, stream);
}
void launch_group_norm_silu_backward_cuda(const GroupNormSiluCudaParams& p, cudaStream_t stream) {
  launch_any(p, true, stream);
}

}  // namespace sslfast
