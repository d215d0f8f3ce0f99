// The log-sum-exp over the rows, and if wanted the columns, of a matrix of similarities that is never stored.
//
// Queries q (M, D), keys k (N, D), scale s, biases b of the keys, l_ij = s·⟨q_i, k_j⟩ + b_j:
//
//   lse_i = log Σ_j exp(l_ij)       over the j that row i does not leave out
//   lse'_j = log Σ_i exp(l_ij)      over the i that do not leave j out
//
// For incoming gradients g of lse and h of lse', with P_ij = exp(l_ij − lse_i), P'_ij = exp(l_ij − lse'_j):
//
//   W_ij = g_i·P_ij + h_j·P'_ij     dq_i = s·Σ_j W_ij·k_j     dk_j = s·Σ_i W_ij·q_i     ds = Σ_ij W_ij·⟨q_i, k_j⟩
//
// Without keys, k = q and j = i is left out. Then l is symmetric but for the biases and what is left out, and
// W_ij = g_i·P_ij + g_j·P_ji serves both of its rows: dq_i = s·Σ_j W_ij·q_j, ds = ½ Σ_ij W_ij·⟨q_i, q_j⟩.
//
// Keys that need no gradient: Σ_j P_ij·k_j comes with the forward pass, and dq_i = s·g_i times it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "csrc/common/matrix_plan.h"

namespace sslfast {

/// The most groups, and the most segments.
inline constexpr int64_t kSimilarityLseMaxParts = 64;

/// How the work is cut into pieces: a function of the problem alone, never of the number of threads (determinism).
struct SimilarityLsePlan {
  bool bf16_products;                // on CPUs that have them
  int64_t row_block, key_block;      // a tile; at most 256
  int64_t group_blocks, groups;      // forward: row blocks that meet one packed block of keys, and how many such groups
  int64_t segment_blocks, segments;  // forward: consecutive blocks of keys that one task works through
};

/// What forward and backward have in common. Pointers are to contiguous memory. "acc" is double when the data is
/// double, and float otherwise. Padded numbers of rows and columns: multiples of kMatrixPad.
struct SimilarityLseProblem {
  c10::ScalarType dtype;    // of queries and keys
  int64_t rows, keys, dim;  // M, N, D; N = M without keys
  const void* query_data;   // (M, D)
  const void* key_data;     // (N, D), or null
  double scale;
  const int64_t* exclude;  // (M, exclude_count), or null; −1 leaves out nothing
  int64_t exclude_count;
  const void* key_bias;  // acc: (N), or null
  SimilarityLsePlan plan;
  int64_t threads;
  void* row_bias;        // scratch, acc: padded M
  void* column_bias;     // scratch, acc: padded N
  void* packed_queries;  // scratch, acc: 3·padded M·padded D (without keys 5·)
  void* tiles;           // scratch: threads·tile_bytes
  int64_t tile_bytes;    // matrix_tile_bytes()
  void* hidden;          // scratch, acc: threads·hidden_count
  int64_t hidden_count;  // (row_block + key_block)·exclude_count
};

struct SimilarityLseForwardParams {
  SimilarityLseProblem problem;
  void* packed_keys;    // scratch, acc: threads·3·key_block·padded D
  void* row_max;        // scratch, acc: segments·padded M
  double* row_sum;      // scratch: segments·padded M
  void* column_max;     // scratch, acc: groups·padded N, if lse_columns
  double* column_sum;   // scratch: groups·padded N, if lse_columns
  void* key_sums;       // scratch, acc: segments·padded M·padded D, if key_sum
  double* lse;          // out: (M)
  double* lse_columns;  // out: (N), or null
  void* key_sum;        // out, acc: (M, D), or null
};

struct SimilarityLseBackwardParams {
  SimilarityLseProblem problem;
  const double* lse;           // (M)
  const double* grad_lse;      // (M)
  const double* lse_columns;   // (N), or null
  const double* grad_columns;  // (N), or null
  void* packed_keys;           // scratch, acc: 3·padded N·padded D, if there are keys
  void* row_shift;             // scratch, acc: padded M
  void* row_factor;            // scratch, acc: padded M
  void* column_shift;          // scratch, acc: padded N
  void* column_factor;         // scratch, acc: padded N
  void* row_sums;              // scratch, acc: padded M·padded D
  void* column_sums;           // scratch, acc: padded N·padded D
  void* row_scratch;           // scratch, acc: 2·threads·padded D
  double* row_dot;             // scratch: M
  void* grad_queries;          // out, dtype: (M, D)
  void* grad_keys;             // out, dtype: (N, D), or null
  double* grad_scale;          // out: 1
};

SSLFAST_DECLARE_CPU_LAUNCHER(launch_similarity_lse_forward_cpu, SimilarityLseForwardParams)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_similarity_lse_backward_cpu, SimilarityLseBackwardParams)

/// → (lse, (M), float64; lse of the columns, (N), float64, empty unless `columns`; Σ_j P_ij·k_j, (M, D), float32, or
/// float64 for float64 data, empty unless `key_sum`). scale: one element. exclude: int64, (M, E).
std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_lse_forward(
    const at::Tensor& queries, const std::optional<at::Tensor>& keys, const at::Tensor& scale,
    const std::optional<at::Tensor>& exclude, const std::optional<at::Tensor>& key_bias, bool columns, bool key_sum);

/// → (grad_queries, grad_keys, which is empty without keys, grad_scale).
std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_lse_backward(
    const at::Tensor& queries, const std::optional<at::Tensor>& keys, const at::Tensor& scale, const at::Tensor& lse,
    const at::Tensor& grad_lse, const std::optional<at::Tensor>& exclude, const std::optional<at::Tensor>& key_bias,
    const std::optional<at::Tensor>& lse_columns, const std::optional<at::Tensor>& grad_columns);

}  // namespace sslfast
