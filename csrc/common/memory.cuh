// Global memory as kernels read and write it. All global accesses go through these functions (the emulator checks and
// counts them). T is what one thread moves at once: an element, or a Pack of 16 bytes.
#pragma once

#include "csrc/common/launch.cuh"

namespace sslfast {

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

template <typename T>
__device__ __forceinline__ T load_global(const T* p) {
#if defined(SSLFAST_CUDA_EMULATED)
  return cuda_emulator::load_global(p);
#else
  return *p;
#endif
}

/// A number on the device, or one that the host knows where `pointer` is null.
struct Number {
  const float* pointer;
  float value;
  __device__ __forceinline__ float get() const { return pointer == nullptr ? value : load_global(pointer); }
};

/// 16 bytes as one access; p is 16-byte aligned.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
#if defined(SSLFAST_CUDA_EMULATED)
  return cuda_emulator::load_global(reinterpret_cast<const Pack<T>*>(p));
#else
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  return reinterpret_cast<const Pack<T>&>(bits);
#endif
}

template <typename T>
__device__ __forceinline__ void store_global(T* p, T value) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::store_global(p, value);
#else
  *p = value;
#endif
}

template <typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& value) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::store_global(reinterpret_cast<Pack<T>*>(p), value);
#else
  *reinterpret_cast<uint4*>(p) = reinterpret_cast<const uint4&>(value);
#endif
}

}  // namespace sslfast
