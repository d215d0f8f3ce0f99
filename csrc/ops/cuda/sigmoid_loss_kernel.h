// What the tensor side and the CUDA kernels of `sigmoid_loss` agree on; csrc/ops/sigmoid_loss.h has the formulas. Knows
// no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/common/product_type.h"

namespace sslfast {

/// The most rows, and keys, that the kernels take.
inline constexpr int64_t kSigmoidLossCudaMaxRows = int64_t{1} << 25;

/// All pointers are to device memory, 16-byte aligned but for queries and keys.
struct SigmoidLossForwardCudaParams {
  ProductType type;           // of queries and keys
  int64_t rows, keys, dim;    // M, N, D
  const void* query_data;     // (M, D)
  const void* key_data;       // (N, D)
  const float *scale, *bias;  // 1 each: read by the kernels, so that the host never waits
  int64_t first_key;          // −M … N
  void* workspace;            // scratch: …_workspace_bytes(); 0 bytes are asked for where it is null
  double* loss;               // out: 1
  float* grad_queries;        // out: (M, D), or null: no gradients
  float* grad_keys;           // out: (N, D), or null
  double* grad_scale;         // out: 1
  double* grad_bias;          // out: 1
};

int64_t sigmoid_loss_forward_workspace_bytes(const SigmoidLossForwardCudaParams& params);

/// Enqueues its kernels on the stream and returns; throws std::runtime_error if CUDA refuses a launch.
void launch_sigmoid_loss_forward_cuda(const SigmoidLossForwardCudaParams& params, cudaStream_t stream);

}  // namespace sslfast
