// What the tensor side asks of CUDA: is this a tensor for the kernels, which device and stream. Also built for the
// emulator of tests/cuda_emulator, whose device memory is made of CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(SSLFAST_CUDA_EMULATED)
#include <cuda_runtime_api.h>
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace sslfast {

#if defined(SSLFAST_CUDA_EMULATED)
inline bool is_cuda_tensor(const at::Tensor& t) { return t.is_cpu(); }
struct CudaScope {
  explicit CudaScope(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
#else
inline bool is_cuda_tensor(const at::Tensor& t) { return t.is_cuda(); }
/// Makes the tensor's device the current one while it lives; stream() is the caller's current stream there.
struct CudaScope {
  c10::cuda::CUDAGuard guard;
  explicit CudaScope(const at::Tensor& t) : guard(t.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
};
#endif

}  // namespace sslfast
