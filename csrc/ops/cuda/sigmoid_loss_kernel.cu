// The sigmoid loss of all pairs and its gradients on CUDA; csrc/ops/sigmoid_loss.h has the formulas.
//
//   pack      rows, as they are, padded with zeros to whole slots and tiles
//   forward   csrc/common/weighted_rows.cuh: a block owns rows of queries, makes the products with 64 keys after the
//             other, their loss and W, and adds W·K to the gradient of its queries. The keys' gradient is the same with
//             the two exchanged
//   finish    sums what several blocks found of a row, times the scale
//   total     sums the loss, W and W·products of all blocks
//
// Arithmetic, in products of M·N·D: 2 for each side (one more for each further kSlice of columns), or 1 without
// gradients; one exponential and one reciprocal a pair and side. Making W anew for the keys costs one product more than
// the least.
//
// Determinism: no atomics; the division of work depends on M, N, D and the type alone.
#include <algorithm>

#include "csrc/common/weighted_rows.cuh"
#include "csrc/ops/cuda/sigmoid_loss_kernel.h"

namespace sslfast {
namespace {

using Params = SigmoidLossForwardCudaParams;

constexpr int kThreads = kTileThreads;

/// W is rounded to the type of the data. Times this, weights of 10⁻⁹ are above float16's smallest, and 1 is below its
/// largest.
constexpr float kWeightScale = 8192.0f;

struct alignas(16) Totals {
  float loss, grad_bias, grad_scale, unused;
};

struct ForwardParams {
  WeightedRowsParams rows;
  int first_own;  // row i's own key is first_own + i
  const float *scale, *bias;
  const float *row_unit, *column_unit;  // of the matrices, or null
  Totals* totals;                       // [splits][row blocks], or null: the other side has them
};

struct SigmoidWeights {
  const ForwardParams& p;
  float scale, bias;
  Totals totals = {};

  __device__ __forceinline__ explicit SigmoidWeights(const ForwardParams& params)
      : p(params),
        scale(load_global(params.scale) * (unit_of(params.row_unit) * unit_of(params.column_unit))),
        bias(load_global(params.bias)) {}

  __device__ __forceinline__ void prefetch(int, int, int) const {}

  template <int kN>
  __device__ __forceinline__ void operator()(float (&x)[kN][4], int, int first_row, int first_column) {
    const int own = first_row + p.first_own - first_column;  // column − row of an own key
    const bool edge = first_row + kTileRows > p.rows.a.count || first_column + 8 * kN > p.rows.b.count;
    if (edge || (own > -kTileRows && own < 8 * kN))
      weigh<true>(x, first_row, first_column);
    else
      weigh<false>(x, first_row, first_column);
  }

  /// kSpecial: the tile may have own keys, or rows that are padding.
  template <bool kSpecial, int kN>
  __device__ __forceinline__ void weigh(float (&x)[kN][4], int first_row, int first_column) {
    // Π(1 + exp(−|l|)) − 1: with the 1 taken out small terms keep their digits, and one logarithm does for all.
    static_assert(kN * 4 < 128, "the product must be a float");
    float product = 0.0f;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + warp_row() + tile_row(i), column = first_column + 8 * n + tile_column(i);
        const bool real = !kSpecial || (row < p.rows.a.count && column < p.rows.b.count);
        const float sign = kSpecial && column == row + p.first_own ? -1.0f : 1.0f, similarity = x[n][i];
        const float logit = sign * fmaf(similarity, scale, bias);  // the loss is log(1 + exp(logit))
        const float e = real ? fast_exp2(-kLog2E * fabsf(logit)) : 0.0f;
        const float sigmoid = (logit > 0.0f ? 1.0f : e) * fast_reciprocal(1.0f + e);
        const float w = real ? sign * sigmoid : 0.0f;
        product += fmaf(e, product, e);
        totals.loss += real ? fmaxf(logit, 0.0f) : 0.0f;
        totals.grad_bias += w;
        totals.grad_scale = fmaf(w, similarity, totals.grad_scale);
        x[n][i] = w * kWeightScale;
      }
    totals.loss += log1pf(product);
  }
};

template <typename Math, int kSlice>
__global__ void __launch_bounds__(kThreads, (kWeightedBlocksPerSm<Math, kSlice>))
    sigmoid_loss_forward_kernel(const ForwardParams p) {
  SigmoidWeights weights(p);
  weighted_rows<Math, kSlice>(p.rows, weights);
  const auto sum_of_block = [](float value) {
    __syncthreads();  // block_reduce() writes where the last chunks, or the last sums, were
    return block_reduce<kThreads>(value, [](float a, float b) { return a + b; });
  };
  const Totals& own = weights.totals;
  const float grad_scale = own.grad_scale * (unit_of(p.row_unit) * unit_of(p.column_unit));
  const Totals of_block = {sum_of_block(own.loss), sum_of_block(own.grad_bias), sum_of_block(grad_scale), 0.0f};
  if (threadIdx.x == 0 && blockIdx.y == 0 && p.totals != nullptr)
    store_global(p.totals + blockIdx.z * gridDim.x + blockIdx.x, of_block);
}

struct TotalParams {
  const Totals* totals;
  int64_t count;
  double *loss, *grad_scale, *grad_bias;
};

/// A block. Traffic: the partial totals, once.
__global__ void __launch_bounds__(kThreads) sigmoid_loss_total_kernel(const TotalParams p) {
  double sum[3] = {};
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
    const Totals part = load_global(p.totals + i);
    sum[0] += part.loss;
    sum[1] += part.grad_scale;
    sum[2] += part.grad_bias;
  }
  double* sums = reinterpret_cast<double*>(shared_memory());  // [3][kThreads]
  for (int k = 0; k < 3; ++k) sums[k * kThreads + threadIdx.x] = sum[k];
  __syncthreads();
  if (threadIdx.x >= 3) return;
  double total = 0;
  for (int i = 0; i < kThreads; ++i) total += sums[threadIdx.x * kThreads + i];
  store_global(threadIdx.x == 0 ? p.loss : threadIdx.x == 1 ? p.grad_scale : p.grad_bias, total);
}

struct Layout {
  PackedMatrix queries, keys;
  float *query_scratch, *key_scratch;
  ForwardParams sides[2];  // the queries' gradient, and the keys'
  Totals* totals;
  int64_t workspace_bytes;
};

template <typename Math, int kSlice>
Layout layout_of(const Params& p) {
  Layout layout = {};
  Workspace workspace{static_cast<char*>(p.workspace)};
  layout.queries = packed_matrix(p.type, p.rows, p.dim);
  layout.keys = packed_matrix(p.type, p.keys, p.dim);
  for (PackedMatrix* m : {&layout.queries, &layout.keys}) m->data = workspace.take<char>(packed_bytes(*m));
  const MatrixUnit of_queries(p.type, workspace), of_keys(p.type, workspace);
  layout.query_scratch = of_queries.scratch;
  layout.key_scratch = of_keys.scratch;
  const bool gradients = p.grad_queries != nullptr;
  int64_t partial_count = 0;
  for (int side = 0; side < (gradients ? 2 : 1); ++side) {
    ForwardParams& f = layout.sides[side];
    f.rows = side == 0 ? cut_weighted_rows<Math, kSlice>(layout.queries, layout.keys, 0, gradients, 64)
                       : cut_weighted_rows<Math, kSlice>(layout.keys, layout.queries, 0, gradients, 64);
    f.first_own = static_cast<int>(side == 0 ? p.first_key : -p.first_key);
    f.scale = p.scale;
    f.bias = p.bias;
    f.row_unit = side == 0 ? of_queries.unit : of_keys.unit;
    f.column_unit = side == 0 ? of_keys.unit : of_queries.unit;
    partial_count = std::max(partial_count, gradients ? partial_floats(f.rows) : 0);
  }
  ForwardParams& first = layout.sides[0];
  first.totals = workspace.take<Totals>(int64_t{first.rows.splits} * (first.rows.a.padded / kTileRows));
  float* partial = workspace.take<float>(partial_count);
  for (ForwardParams& f : layout.sides) f.rows.partial = gradients ? partial : nullptr;
  layout.workspace_bytes = workspace.used;
  return layout;
}

template <typename Math, int kSlice>
void launch_forward(const Params& p, cudaStream_t stream) {
  const Layout layout = layout_of<Math, kSlice>(p);
  launch_tile_pack<Math>("sigmoid_loss_pack", layout.queries, p.query_data, p.dim, layout.query_scratch, stream);
  launch_tile_pack<Math>("sigmoid_loss_pack", layout.keys, p.key_data, p.dim, layout.key_scratch, stream);
  for (int side = 0; side < (p.grad_queries != nullptr ? 2 : 1); ++side) {
    const ForwardParams& f = layout.sides[side];
    const dim3 grid = weighted_rows_grid(f.rows);
    launch(sigmoid_loss_forward_kernel<Math, kSlice>,
           {"sigmoid_loss_forward", grid, kThreads, static_cast<size_t>(f.rows.slots.bytes), stream}, f);
    if (p.grad_queries != nullptr)
      launch_tile_finish<float>("sigmoid_loss_finish", f.rows, p.dim,
                                {p.scale, nullptr, f.column_unit, 1 / kWeightScale},
                                side == 0 ? p.grad_queries : p.grad_keys, stream);
  }
  const ForwardParams& first = layout.sides[0];
  const int64_t count = int64_t{first.rows.splits} * (first.rows.a.padded / kTileRows);
  launch(sigmoid_loss_total_kernel, {"sigmoid_loss_total", 1, kThreads, 3 * kThreads * sizeof(double), stream},
         TotalParams{first.totals, count, p.loss, p.grad_scale, p.grad_bias});
}

}  // namespace

int64_t sigmoid_loss_forward_workspace_bytes(const SigmoidLossForwardCudaParams& p) {
  return with_math(p.type, p.dim,
                   [&]<typename Math, int kSlice>() { return layout_of<Math, kSlice>(p).workspace_bytes; });
}

void launch_sigmoid_loss_forward_cuda(const SigmoidLossForwardCudaParams& p, cudaStream_t stream) {
  with_math(p.type, p.dim, [&]<typename Math, int kSlice>() { launch_forward<Math, kSlice>(p, stream); });
}

}  // namespace sslfast
