// What the tensor side and the kernels of `augment` agree on; docs/augment.md says what is computed. Knows no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/common/augment_steps.h"
#include "csrc/common/filters.h"

namespace sslfast {

enum class AugmentCudaOutput { float32, bfloat16, float16 };

/// One view of one image.
struct alignas(16) AugmentCudaTask {
  const void* image;                                  // bytes or floats, in device memory
  const void* image_end;                              // one past its last element
  int64_t row_stride, column_stride, channel_stride;  // in elements; columns or channels lie next to each other
  int64_t output;                                     // its place among all views: view · samples + sample
  int32_t crop_top, crop_left, crop_height, crop_width;
  int32_t flip;
  int32_t blur_radius;  // what of it matters (gaussian_weights); 0: no blur
  int32_t step_count;
  ActiveStep steps[kAugmentSteps];
};

struct AugmentForwardCudaParams {
  int channels;       // 1 or 3
  bool bytes;         // images are uint8 (0 … 255), otherwise float (0 … 1)
  int height, width;  // of the output
  Interpolation interpolation;
  bool antialias;
  float mean[3], inverse_std[3];
  void* output;  // (tasks, channels, height, width), or (tasks, height, width, channels)
  AugmentCudaOutput output_type;
  bool channels_last;
};

/// How a task is computed; see csrc/ops/cuda/augment_kernel.cu. Depends on the task and the size of the output alone.
enum class AugmentCudaWay { whole, tiles, scratch };
AugmentCudaWay augment_cuda_way(const AugmentForwardCudaParams& params, int blur_radius);

/// Bytes of device memory that launch_augment_forward_cuda() wants for `count` tasks that go the same way.
int64_t augment_cuda_workspace_bytes(const AugmentForwardCudaParams& params, AugmentCudaWay way, int64_t count);

/// Enqueues the kernels for `count` tasks (in device memory) that all go the same way, none of which has a larger blur
/// radius; throws std::runtime_error if CUDA refuses a launch.
void launch_augment_forward_cuda(const AugmentForwardCudaParams& params, AugmentCudaWay way,
                                 const AugmentCudaTask* tasks, int64_t count, int max_blur_radius, void* workspace,
                                 cudaStream_t stream);

}  // namespace sslfast
