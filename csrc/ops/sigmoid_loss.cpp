#include "csrc/ops/sigmoid_loss.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "csrc/common/check.h"
#include "csrc/common/scratch.h"
#if defined(SSLFAST_WITH_CUDA)
#include "csrc/common/cuda_device.h"
#include "csrc/common/product_type_of.h"
#include "csrc/ops/cuda/sigmoid_loss_kernel.h"
#endif

namespace sslfast {
namespace {

struct Outputs {
  at::Tensor loss, grad_queries, grad_keys, grad_scale, grad_bias;

  Outputs(const at::Tensor& queries, const at::Tensor& keys, at::ScalarType acc, bool gradients) {
    const auto options = queries.options().dtype(acc).requires_grad(false), doubles = options.dtype(at::kDouble);
    loss = at::empty({}, doubles);
    grad_queries = gradients ? at::empty(queries.sizes(), options) : at::empty({0}, options);
    grad_keys = gradients ? at::empty(keys.sizes(), options) : at::empty({0}, options);
    grad_scale = at::empty({}, doubles);
    grad_bias = at::empty({}, doubles);
  }
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> tuple() const {
    return {loss, grad_queries, grad_keys, grad_scale, grad_bias};
  }
};

#if defined(SSLFAST_WITH_CUDA)
/// Nothing here waits for the device.
Outputs forward_cuda(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& given_scale,
                     const at::Tensor& given_bias, int64_t first_key, bool gradients) {
  const CudaScope scope(queries);
  check_device(given_scale, "scale", queries);
  check_device(given_bias, "bias", queries);
  TORCH_CHECK_VALUE(std::max(queries.size(0), keys.size(0)) <= kSigmoidLossCudaMaxRows,
                    "queries, keys: expected at most ", kSigmoidLossCudaMaxRows, " rows on CUDA, got ", queries.size(0),
                    " and ", keys.size(0));
  const auto scale = given_scale.to(at::kFloat).contiguous(), bias = given_bias.to(at::kFloat).contiguous();
  const Outputs out(queries, keys, at::kFloat, gradients);
  SigmoidLossForwardCudaParams p{};
  p.type = product_type_of(queries, "queries");
  p.rows = queries.size(0);
  p.keys = keys.size(0);
  p.dim = queries.size(1);
  p.query_data = queries.const_data_ptr();
  p.key_data = keys.const_data_ptr();
  p.scale = scale.const_data_ptr<float>();
  p.bias = bias.const_data_ptr<float>();
  p.first_key = first_key;
  p.loss = out.loss.data_ptr<double>();
  p.grad_queries = gradients ? out.grad_queries.data_ptr<float>() : nullptr;
  p.grad_keys = gradients ? out.grad_keys.data_ptr<float>() : nullptr;
  p.grad_scale = out.grad_scale.data_ptr<double>();
  p.grad_bias = out.grad_bias.data_ptr<double>();
  const auto workspace = at::empty({sigmoid_loss_forward_workspace_bytes(p)}, queries.options().dtype(at::kByte));
  p.workspace = workspace.data_ptr();
  launch_sigmoid_loss_forward_cuda(p, scope.stream());
  return out;
}
#endif

Outputs forward_cpu(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& scale, const at::Tensor& bias,
                    int64_t first_key, bool gradients) {
  TORCH_CHECK_VALUE(queries.is_cpu(), "queries: expected a CPU tensor, got one on ", queries.device());
  const auto dtype = queries.scalar_type();
  const bool is_double = dtype == at::kDouble;
  const Outputs out(queries, keys, is_double ? at::kDouble : at::kFloat, gradients);
  SigmoidLossForwardParams p{};
  p.dtype = dtype;
  p.rows = queries.size(0);
  p.keys = keys.size(0);
  p.dim = queries.size(1);
  p.query_data = queries.const_data_ptr();
  p.key_data = keys.const_data_ptr();
  p.scale = finite_scalar(scale, "scale", dtype);
  p.bias = finite_scalar(bias, "bias", dtype);
  p.first_key = first_key;

  const int64_t rows = padded(p.rows), columns = padded(p.keys), dim = padded(p.dim);
  const bool bf16_products = use_bf16_products(dtype, p.rows, p.keys);
  p.plan = {bf16_products, matrix_block(rows, bf16_products), matrix_block(columns, bf16_products)};
  const int64_t acc_bytes = is_double ? 8 : 4, threads = thread_count();
  p.threads = threads;
  p.tile_bytes = matrix_tile_bytes(p.plan.row_block, p.plan.key_block, bf16_products, acc_bytes);
  Scratch scratch;
  const auto reserve = [&](int64_t elements) { return scratch.reserve_bytes(elements * acc_bytes); };
  const auto key_bias = reserve(columns);
  const auto packed_queries = reserve(3 * rows * dim), packed_keys = reserve(3 * columns * dim);
  const auto tiles = scratch.reserve_bytes(threads * p.tile_bytes);
  const auto row_sums = reserve(gradients ? rows * dim : 0), column_sums = reserve(gradients ? columns * dim : 0);
  const auto row_scratch = reserve(threads * dim);
  const auto totals = scratch.reserve<double>(3 * count_blocks(rows, p.plan.row_block));
  scratch.allocate();
  p.key_bias = scratch.at(key_bias);
  p.packed_queries = scratch.at(packed_queries);
  p.packed_keys = scratch.at(packed_keys);
  p.tiles = scratch.at(tiles);
  p.row_sums = scratch.at(row_sums);
  p.column_sums = scratch.at(column_sums);
  p.row_scratch = scratch.at(row_scratch);
  p.totals = scratch.at<double>(totals);
  p.loss = out.loss.data_ptr<double>();
  p.grad_queries = gradients ? out.grad_queries.data_ptr() : nullptr;
  p.grad_keys = gradients ? out.grad_keys.data_ptr() : nullptr;
  p.grad_scale = out.grad_scale.data_ptr<double>();
  p.grad_bias = out.grad_bias.data_ptr<double>();
  SSLFAST_CPU_DISPATCH(launch_sigmoid_loss_forward_cpu, p);
  return out;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_forward(
    const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& scale, const at::Tensor& bias,
    int64_t first_key, bool gradients) {
  check_rows(queries, "queries", queries);
  check_rows(keys, "keys", queries);
  check_scalar(scale, "scale");
  check_scalar(bias, "bias");
  const auto q = queries.contiguous(), k = keys.contiguous();
  first_key = std::clamp(first_key, -q.size(0), k.size(0));  // beyond these no row has a key of its own
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(q)) return forward_cuda(q, k, scale, bias, first_key, gradients).tuple();
#endif
  return forward_cpu(q, k, scale, bias, first_key, gradients).tuple();
}

}  // namespace sslfast
