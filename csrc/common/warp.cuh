// What threads of a warp or a block compute together, in an order that is always the same; and the fast functions.
#pragma once

#include "csrc/common/launch.cuh"

namespace sslfast {

/// 2^x to 2 units in the last place; results below the smallest normal number are zero.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::count_exponential();
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

/// 1/x to 1 unit in the last place.
__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(SSLFAST_CUDA_EMULATED)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

/// Lane l gets the value of lane l ^ mask; T is a struct of floats.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  float words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (float& word : words) word = __shfl_xor_sync(0xFFFFFFFFu, word, mask);
  memcpy(&value, words, sizeof(T));
  return value;
}

/// Sum over the lanes of a warp, in all of them.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, mask);
  return value;
}

/// Waits for `threads` threads of the block, in full warps, that call it with the same id (1 … 15).
__device__ __forceinline__ void named_barrier(int id, int threads) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::named_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

template <int kThreads>
inline constexpr size_t kReduceBytes = kThreads / 32 * sizeof(float);

/// combine() over all threads of a block, in thread 0. Takes kReduceBytes of shared memory, from its start.
template <int kThreads, typename Combine>
__device__ __forceinline__ float block_reduce(float value, const Combine& combine) {
  float* of_warp = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, mask));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) value = combine(value, of_warp[warp]);
  return value;
}

}  // namespace sslfast
