// What the tensor side and the CUDA kernels of `similarity_lse` agree on; csrc/ops/similarity_lse.h has the formulas.
// Knows no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/common/product_type.h"

namespace sslfast {

/// The most rows, and keys, that the kernels take: a grid has at most 65535 runs of tiles.
inline constexpr int64_t kSimilarityLseCudaMaxRows = int64_t{1} << 25;

/// All pointers are to device memory, 16-byte aligned but for queries, keys and their gradients.
struct SimilarityLseCudaProblem {
  ProductType type;         // of queries and keys
  int64_t rows, keys, dim;  // M, N, D; N = M without keys
  const void* query_data;   // (M, D)
  const void* key_data;     // (N, D), or null
  const float* scale;       // 1: read by the kernels, so that the host never waits
  const int64_t* exclude;   // (M, exclude_count), or null
  int exclude_count;
  const float* key_bias;  // (N), or null
  void* workspace;        // scratch: …_workspace_bytes(); 0 bytes are asked for where it is null
};

struct SimilarityLseForwardCudaParams {
  SimilarityLseCudaProblem problem;
  double* lse;          // out: (M)
  double* lse_columns;  // out: (N), or null
};

struct SimilarityLseBackwardCudaParams {
  SimilarityLseCudaProblem problem;
  const double* lse;           // (M)
  const double* grad_lse;      // (M), or null: 1
  const double* lse_columns;   // (N), or null
  const double* grad_columns;  // (N), or null
  void* grad_queries;          // out, type: (M, D), or null
  void* grad_keys;             // out, type: (N, D), or null
  float* grad_scale;           // out: 1, or null
  float* key_sum;              // out: (M, D), Σ_j P_ij·k_j, or null: what grad_queries would be with scale 1
};

int64_t similarity_lse_forward_workspace_bytes(const SimilarityLseForwardCudaParams& params);
int64_t similarity_lse_backward_workspace_bytes(const SimilarityLseBackwardCudaParams& params);

/// Enqueue their kernels on the stream and return; throw std::runtime_error if CUDA refuses a launch.
void launch_similarity_lse_forward_cuda(const SimilarityLseForwardCudaParams& params, cudaStream_t stream);
void launch_similarity_lse_backward_cuda(const SimilarityLseBackwardCudaParams& params, cudaStream_t stream);

}  // namespace sslfast
