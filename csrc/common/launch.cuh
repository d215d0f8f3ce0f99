// How kernels are launched, and where they find their shared memory. Every CUDA kernel goes through launch(), so that
// the same .cu files can be run by tests/cuda_emulator without a GPU (SSLFAST_CUDA_EMULATED).
#pragma once

#if defined(SSLFAST_CUDA_EMULATED)
#include "tests/cuda_emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <map>
#include <stdexcept>
#include <string>
#include <utility>

namespace sslfast {

/// The most dynamic shared memory that a block may ask for on any GPU since sm_80 (sm_86, sm_89 and sm_120 have no
/// more).
inline constexpr size_t kMaxSharedBytes = 99 * 1024;

/// Bytes of shared memory: what a block may have, what a multiprocessor has, and what each block takes beside its own.
struct SharedLimits {
  int block, multiprocessor, reserved;
};

/// Those of the current device.
inline SharedLimits shared_limits() {
#if defined(SSLFAST_CUDA_EMULATED)
  return {kMaxSharedBytes, kMaxSharedBytes + 1024, 1024};
#else
  static SharedLimits known[64] = {};  // threads that race for one write the same
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("CUDA: there is no current device");
  SharedLimits& limits = known[device % 64];
  if (limits.multiprocessor == 0) {
    SharedLimits found = {};
    if (cudaDeviceGetAttribute(&found.block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&found.reserved, cudaDevAttrReservedSharedMemoryPerBlock, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&found.multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) !=
            cudaSuccess)
      throw std::runtime_error("CUDA: the device does not tell how much shared memory it has");
    limits = found;
  }
  return limits;
#endif
}

struct LaunchConfig {
  const char* name;  // of the kernel, for messages
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

#if !defined(SSLFAST_CUDA_EMULATED)
/// Lets a kernel have so much shared memory on the current device. That is asked of CUDA once.
inline cudaError_t allow_shared_bytes(const void* kernel, const LaunchConfig& config) {
  static thread_local std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  size_t& bytes = allowed[{kernel, device}];
  if (error != cudaSuccess || config.shared_bytes <= bytes) return error;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.shared_bytes));
  if (error == cudaSuccess) bytes = config.shared_bytes;
  return error;
}
#endif

/// Launches kernel(params) and throws std::runtime_error if CUDA refuses. Does not wait for it.
template <typename Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::launch(config.name, config.grid, config.block, config.shared_bytes, [&] { kernel(params); });
#else
  cudaError_t error = cudaSuccess;
  if (config.shared_bytes > 48 * 1024) error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), config);
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
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#endif
}

}  // namespace sslfast
