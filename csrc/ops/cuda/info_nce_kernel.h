// What the tensor side and the kernels of `info_nce` agree on; csrc/ops/info_nce.h has the formulas. Knows no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/common/product_type.h"

namespace sslfast {

/// The most that the kernels take: the finishing kernel keeps rows in shared memory, and a grid has at most 65535
/// blocks in y, where forward counts runs of 8 tiles of 128 rows.
inline constexpr int64_t kInfoNceCudaMaxDim = 4096;
inline constexpr int64_t kInfoNceCudaMaxBatch = int64_t{1} << 24;
static_assert(2 * kInfoNceCudaMaxBatch / 128 / 8 <= 65535);

/// All pointers are to device memory, 16-byte aligned but for z1, z2, grad_z1 and grad_z2.
struct InfoNceForwardCudaParams {
  ProductType type;
  int64_t batch, dim;
  const void* z1;            // (batch, dim)
  const void* z2;            // (batch, dim)
  const float* temperature;  // 1: read by the kernels, so that the host never waits; or nullptr, and
  float known_temperature;   // this
  void* workspace;           // scratch: info_nce_forward_workspace_bytes()
  float* loss;               // out: (2·batch)
  double* lse;               // out: (2·batch)
  float* total;              // out: 1, total_factor · Σ loss; or nullptr
  float total_factor;
};

struct InfoNceBackwardCudaParams {
  ProductType type;
  int64_t batch, dim;
  const void* z1;
  const void* z2;
  const float* temperature;  // as in forward
  float known_temperature;
  const double* lse;         // (2·batch)
  const float* grad_loss;    // (2·batch), or one value for all rows if grad_loss_stride is 0
  int64_t grad_loss_stride;  // 1 or 0
  float grad_loss_factor;    // multiplies grad_loss (1/(2·batch) for a mean)
  void* workspace;           // scratch: info_nce_backward_workspace_bytes()
  void* grad_z1;             // out, type: (batch, dim)
  void* grad_z2;             // out, type: (batch, dim)
  float* grad_temperature;   // out: 1; or nullptr
};

int64_t info_nce_forward_workspace_bytes(ProductType type, int64_t batch, int64_t dim);
int64_t info_nce_backward_workspace_bytes(ProductType type, int64_t batch, int64_t dim);

/// Enqueue their kernels on the stream and return; throw std::runtime_error if CUDA refuses a launch.
void launch_info_nce_forward_cuda(const InfoNceForwardCudaParams& params, cudaStream_t stream);
void launch_info_nce_backward_cuda(const InfoNceBackwardCudaParams& params, cudaStream_t stream);

}  // namespace sslfast
