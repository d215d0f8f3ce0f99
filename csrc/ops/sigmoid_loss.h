// The sigmoid loss of all pairs of two sets of vectors, and its gradients, from one matrix of similarities that is
// never stored.
//
// Queries q (M, D), keys k (N, D), scale s, bias b, l_ij = s·⟨q_i, k_j⟩ + b; key first_key + i is row i's own, if there
// is such a key: y_ij = 1 for this pair and −1 for the others.
//
//   loss = Σ_ij log(1 + exp(−y_ij·l_ij))        W_ij = ∂loss / ∂l_ij = −y_ij / (1 + exp(y_ij·l_ij))
//   dq_i = s·Σ_j W_ij·k_j     dk_j = s·Σ_i W_ij·q_i     ds = Σ_ij W_ij·⟨q_i, k_j⟩     db = Σ_ij W_ij
//
// W knows nothing of the other pairs: unlike those of a softmax, the gradients come with the loss.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <tuple>

#include "csrc/common/matrix_plan.h"

namespace sslfast {

struct SigmoidLossPlan {
  bool bf16_products;
  int64_t row_block, key_block;  // a tile; at most 256
};

/// Pointers are to contiguous memory. "acc" is double when the data is double, and float otherwise. Padded numbers of
/// rows and columns: multiples of kMatrixPad.
struct SigmoidLossForwardParams {
  c10::ScalarType dtype;    // of queries and keys
  int64_t rows, keys, dim;  // M, N, D
  const void* query_data;   // (M, D)
  const void* key_data;     // (N, D)
  double scale, bias;
  int64_t first_key;
  SigmoidLossPlan plan;
  int64_t threads;
  void* key_bias;        // scratch, acc: padded N
  void* packed_queries;  // scratch, acc: 3·padded M·padded D
  void* packed_keys;     // scratch, acc: 3·padded N·padded D
  void* tiles;           // scratch: threads·tile_bytes
  int64_t tile_bytes;    // matrix_tile_bytes()
  void* row_sums;        // scratch, acc: padded M·padded D, if gradients
  void* column_sums;     // scratch, acc: padded N·padded D, if gradients
  void* row_scratch;     // scratch, acc: threads·padded D
  double* totals;        // scratch: 3·blocks of rows
  double* loss;          // out: 1
  void* grad_queries;    // out, acc: (M, D), or null: no gradients
  void* grad_keys;       // out, acc: (N, D), or null
  double* grad_scale;    // out: 1
  double* grad_bias;     // out: 1
};

SSLFAST_DECLARE_CPU_LAUNCHER(launch_sigmoid_loss_forward_cpu, SigmoidLossForwardParams)

/// → (loss, float64; grad_queries, (M, D), and grad_keys, (N, D), float32, or float64 for float64 data, empty unless
/// `gradients`; grad_scale, grad_bias, float64, 0 unless `gradients`). scale, bias: one element.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_forward(
    const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& scale, const at::Tensor& bias,
    int64_t first_key, bool gradients);

}  // namespace sslfast
