// Function decoration for headers that CPU kernels, CUDA kernels and the CUDA emulator share.
#pragma once

// `static` + always_inline: files compiled for different instruction sets must never share one out-of-line copy. A
// member function is static already: SSLFAST_HOST_DEVICE_MEMBER.
#if defined(__CUDACC__)
#define SSLFAST_HOST_DEVICE_MEMBER __host__ __device__ __forceinline__
#else
#define SSLFAST_HOST_DEVICE_MEMBER inline __attribute__((always_inline))
#endif
#define SSLFAST_HOST_DEVICE static SSLFAST_HOST_DEVICE_MEMBER
