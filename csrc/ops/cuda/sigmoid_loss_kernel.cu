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
  Totals* totals;  // [splits][row blocks], or null: the other side has them
};

struct SigmoidWeights {
  const ForwardParams& p;
  float scale, bias;
  Totals totals = {};

  __device__ __forceinline__ explicit SigmoidWeights(const ForwardParams& params)
      : p(params), scale(load_global(params.scale)), bias(load_global(params.bias)) {}

  __device__ __forceinline__ void prefetch(int, int, int) const {}

  template <int kM, int kN>
  __device__ __forceinline__ void operator()(float (&x)[kM][kN][4], int, int first_row, int first_column, int warp_row,
                                             int warp_column) {
    // Π(1 + exp(−|l|)) − 1: with the 1 taken out small terms keep their digits, and one logarithm does for all.
    static_assert(kM * kN * 4 < 128, "the product must be a float");
    float product = 0.0f;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first_row + warp_row + 16 * m + tile_row(i);
          const int column = first_column + warp_column + 8 * n + tile_column(i);
          const bool real = row < p.rows.a.count && column < p.rows.b.count;
          const float sign = column == row + p.first_own ? -1.0f : 1.0f, similarity = x[m][n][i];
          const float logit = sign * fmaf(similarity, scale, bias);  // the loss is log(1 + exp(logit))
          const float e = real ? fast_exp2(-kLog2E * fabsf(logit)) : 0.0f;
          const float sigmoid = (logit > 0.0f ? 1.0f : e) * fast_reciprocal(1.0f + e);
          const float w = real ? sign * sigmoid : 0.0f;
          product += fmaf(e, product, e);
          totals.loss += real ? fmaxf(logit, 0.0f) : 0.0f;
          totals.grad_bias += w;
          totals.grad_scale = fmaf(w, similarity, totals.grad_scale);
          x[m][n][i] = w * kWeightScale;
        }
    totals.loss += log1pf(product);
  }
};

template <typename Math, int kRows, int kSlice>
__global__ void __launch_bounds__(kThreads) sigmoid_loss_forward_kernel(const ForwardParams p) {
  SigmoidWeights weights(p);
  weighted_rows<Math, kRows, kSlice>(p.rows, weights);
  const auto sum_of_block = [](float value) {
    __syncthreads();  // block_reduce() writes where the last chunks, or the last sums, were
    return block_reduce<kThreads>(value, [](float a, float b) { return a + b; });
  };
  const Totals& own = weights.totals;
  const Totals of_block = {sum_of_block(own.loss), sum_of_block(own.grad_bias), sum_of_block(own.grad_scale), 0.0f};
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
  ForwardParams sides[2];  // the queries' gradient, and the keys'
  Totals* totals;
  int64_t workspace_bytes;
};

template <typename T, int kRows, int kSlice>
Layout layout_of(const Params& p) {
  Layout layout = {};
  Workspace workspace{static_cast<char*>(p.workspace)};
  layout.queries = packed_matrix(p.type, p.rows, p.dim);
  layout.keys = packed_matrix(p.type, p.keys, p.dim);
  for (PackedMatrix* m : {&layout.queries, &layout.keys}) m->data = workspace.take<char>(packed_bytes(*m));
  const bool gradients = p.grad_queries != nullptr;
  int64_t partial_count = 0;
  for (int side = 0; side < (gradients ? 2 : 1); ++side) {
    ForwardParams& f = layout.sides[side];
    f.rows = side == 0 ? cut_weighted_rows<T, kRows, kSlice>(layout.queries, layout.keys, 0)
                       : cut_weighted_rows<T, kRows, kSlice>(layout.keys, layout.queries, 0);
    if (!gradients) f.rows.slices = 1;
    f.first_own = static_cast<int>(side == 0 ? p.first_key : -p.first_key);
    f.scale = p.scale;
    f.bias = p.bias;
    partial_count = std::max(partial_count, gradients ? partial_floats(f.rows) : 0);
  }
  ForwardParams& first = layout.sides[0];
  first.totals = workspace.take<Totals>(int64_t{first.rows.splits} * (first.rows.a.padded / kRows));
  float* partial = workspace.take<float>(partial_count);
  for (ForwardParams& f : layout.sides) f.rows.partial = gradients ? partial : nullptr;
  layout.workspace_bytes = workspace.used;
  return layout;
}

template <typename Math, int kRows, int kSlice>
void launch_forward(const Params& p, cudaStream_t stream) {
  using T = typename Math::Element;
  const Layout layout = layout_of<T, kRows, kSlice>(p);
  launch_tile_pack<T>("sigmoid_loss_pack", layout.queries, p.query_data, p.dim, stream);
  launch_tile_pack<T>("sigmoid_loss_pack", layout.keys, p.key_data, p.dim, stream);
  for (int side = 0; side < (p.grad_queries != nullptr ? 2 : 1); ++side) {
    const ForwardParams& f = layout.sides[side];
    const dim3 grid = weighted_rows_grid<kRows>(f.rows);
    launch(sigmoid_loss_forward_kernel<Math, kRows, kSlice>,
           {"sigmoid_loss_forward", grid, kThreads, static_cast<size_t>(weighted_rows_bytes<T, kRows>(f.rows)), stream},
           f);
    if (p.grad_queries != nullptr)
      launch_tile_finish<float>("sigmoid_loss_finish", f.rows, p.dim, {p.scale, nullptr, 1 / kWeightScale},
                                side == 0 ? p.grad_queries : p.grad_keys, stream);
  }
  const ForwardParams& first = layout.sides[0];
  const int64_t count = int64_t{first.rows.splits} * (first.rows.a.padded / kRows);
  launch(sigmoid_loss_total_kernel, {"sigmoid_loss_total", 1, kThreads, 3 * kThreads * sizeof(double), stream},
         TotalParams{first.totals, count, p.loss, p.grad_scale, p.grad_bias});
}

/// run<Math, kRows, kSlice>(): for two-byte types 128 columns of gradient for 128 rows, or 256 for 64; floats take
/// twice the space.
template <typename Run>
auto with_math(const Params& p, const Run& run) {
  const bool narrow = p.dim <= 128;
  switch (p.type) {
    case ProductType::bfloat16:
      return narrow ? run.template operator()<BFloat16Math, 128, 128>()
                    : run.template operator()<BFloat16Math, 64, 256>();
    case ProductType::float16:
      return narrow ? run.template operator()<Float16Math, 128, 128>()
                    : run.template operator()<Float16Math, 64, 256>();
    case ProductType::float32_as_tf32:
      return run.template operator()<Tf32Math, 64, 256>();
    default:
      return run.template operator()<Tf32x3Math, 64, 256>();
  }
}

}  // namespace

int64_t sigmoid_loss_forward_workspace_bytes(const SigmoidLossForwardCudaParams& p) {
  return with_math(p, [&]<typename Math, int kRows, int kSlice>() {
    return layout_of<typename Math::Element, kRows, kSlice>(p).workspace_bytes;
  });
}

void launch_sigmoid_loss_forward_cuda(const SigmoidLossForwardCudaParams& p, cudaStream_t stream) {
  with_math(p, [&]<typename Math, int kRows, int kSlice>() { launch_forward<Math, kRows, kSlice>(p, stream); });
}

}  // namespace sslfast
