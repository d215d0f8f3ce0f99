// How kernels are launched, and where they find their shared memory. Every CUDA kernel goes through launch(), so that
// the same .cu files can be run by tests/cuda_emulator without a GPU (SSLFAST_CUDA_EMULATED).
#pragma once

#if defined(SSLFAST_CUDA_EMULATED)
#include "tests/cuda_emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

namespace sslfast {

/// The most dynamic shared memory that a block may ask for: what every GPU since sm_80 has (sm_86, sm_89 and sm_120
/// have no more).
inline constexpr size_t kMaxSharedBytes = 99 * 1024;

struct LaunchConfig {
  const char* name;  // of the kernel, for messages
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

/// Launches kernel(params) and throws std::runtime_error if CUDA refuses. Does not wait for it.
template <typename Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::launch(config.name, config.grid, config.block, config.shared_bytes, [&] { kernel(params); });
#else
  cudaError_t error = cudaSuccess;
  if (config.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(config.shared_bytes));
  if (error == cudaSuccess) {
    // clang-format off
    kernel<<<config.grid, config.block, config.shared_bytes, config.stream>>>(params);
    // clang-format on
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(config.name) + ": CUDA launch failed: " + cudaGetErrorString(error));
#endif
}

/// The block's dynamic shared memory; kernels use no other kind.
__device__ inline unsigned char* shared_memory() {
#if defined(SSLFAST_CUDA_EMULATED)
  return cuda_emulator::shared_memory();
#else
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#endif
}

}  // namespace sslfast
