// What the tensor side asks of CUDA: is this a tensor for the kernels, which device and stream. Also built for the
// emulator of tests/cuda_emulator, whose device memory is made of CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstring>

#if defined(SSLFAST_CUDA_EMULATED)
#include <cuda_runtime_api.h>
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace sslfast {

#if defined(SSLFAST_CUDA_EMULATED)
inline bool is_cuda_tensor(const at::Tensor& t) { return t.is_cpu(); }
inline bool is_host_tensor(const at::Tensor&) { return false; }
struct CudaScope {
  explicit CudaScope(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  at::Tensor upload(const void* data, int64_t bytes) const {
    const at::Tensor copy = at::empty({bytes}, at::kByte);
    std::memcpy(copy.mutable_data_ptr(), data, bytes);
    return copy;
  }
};
#else
inline bool is_cuda_tensor(const at::Tensor& t) { return t.is_cuda(); }
/// A number that the host knows, beside tensors on the device.
inline bool is_host_tensor(const at::Tensor& t) { return t.is_cpu(); }
/// Makes the tensor's device the current one while it lives; stream() is the caller's current stream there.
struct CudaScope {
  c10::cuda::CUDAGuard guard;
  explicit CudaScope(const at::Tensor& t) : guard(t.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  /// A copy on the device, made on the current stream. The host does not wait: it goes through pinned memory, which
  /// torch keeps until the copy is done.
  at::Tensor upload(const void* data, int64_t bytes) const {
    const at::Tensor pinned = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    std::memcpy(pinned.mutable_data_ptr(), data, bytes);
    return pinned.to(guard.current_device(), at::kByte, /*non_blocking=*/true);
  }
};
#endif

}  // namespace sslfast
