// What the tensor side and the kernels of `rotate4` agree on; csrc/ops/rotate4.h has the formulas. Knows no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sslfast {

enum class Rotate4CudaType { uint8, bfloat16, float16, float32 };

/// Memory of an image as in Rotate4Params.
struct Rotate4CudaParams {
  Rotate4CudaType type;
  int64_t images, planes, size, pixel;
  int64_t image_stride;  // forward: elements between images of x
  const void* in;        // forward: x; backward: g (4·images)
  void* out;             // forward: y (4·images); backward: dx
  int64_t* labels;       // forward, out: (4·images)
};

/// Enqueue their kernel on the stream and return; throw std::runtime_error if CUDA refuses the launch.
void launch_rotate4_forward_cuda(const Rotate4CudaParams& params, cudaStream_t stream);
void launch_rotate4_backward_cuda(const Rotate4CudaParams& params, cudaStream_t stream);

}  // namespace sslfast
