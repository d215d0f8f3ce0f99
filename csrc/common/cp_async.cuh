// cp.async: copies from global to shared memory that run while the thread computes (sm_80).
#pragma once

#include "csrc/common/launch.cuh"

namespace sslfast {

/// Starts a copy of 16 bytes, both ends 16-byte aligned, past the L1 cache.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::cp_async(shared, global);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(global) : "memory");
#endif
}

/// Closes the group of copies that this thread started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

/// Waits for all of this thread's groups but the last kPending; other threads see the data after the next
/// __syncthreads().
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

}  // namespace sslfast
