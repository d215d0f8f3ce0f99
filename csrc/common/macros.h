// Function decoration for headers that CPU kernels, CUDA kernels and the CUDA emulator share.
#pragma once

#if defined(__CUDACC__)
#define SSLFAST_HOST_DEVICE static __host__ __device__ __forceinline__
#else
// `static` + always_inline: files compiled for different instruction sets must never share one out-of-line copy.
#define SSLFAST_HOST_DEVICE static inline __attribute__((always_inline))
#endif
