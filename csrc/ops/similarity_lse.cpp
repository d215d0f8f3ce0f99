#include "csrc/ops/similarity_lse.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "csrc/common/check.h"
#include "csrc/common/matrix_plan.h"
#include "csrc/common/scratch.h"
#if defined(SSLFAST_WITH_CUDA)
#include "csrc/common/cuda_device.h"
#include "csrc/common/product_type_of.h"
#include "csrc/ops/cuda/similarity_lse_kernel.h"
#endif

namespace sslfast {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_vector(const at::Tensor& t, int64_t size, const char* name, const at::Tensor& like) {
  check_floating(t, name);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == size && t.device() == like.device(), name, ": expected shape [", size,
                    "] on ", like.device(), ", got ", t.sizes(), " on ", t.device());
}

void check_exclude(const at::Tensor& t, const at::Tensor& queries) {
  check_dense(t, "exclude");
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == queries.size(0) && t.scalar_type() == at::kLong,
                    "exclude: expected int64 of shape [", queries.size(0), ", any], got ", t.scalar_type(),
                    " of shape ", t.sizes());
  check_device(t, "exclude", queries);
}

void check_inputs(const at::Tensor& queries, const OptionalTensor& keys, const at::Tensor& scale,
                  const OptionalTensor& exclude, const OptionalTensor& key_bias) {
  check_rows(queries, "queries", queries);
  if (keys) check_rows(*keys, "keys", queries);
  check_scalar(scale, "scale");
  if (exclude) check_exclude(*exclude, queries);
  if (key_bias) check_vector(*key_bias, (keys ? *keys : queries).size(0), "key_bias", queries);
}

void check_gradients(const at::Tensor& queries, const OptionalTensor& keys, const at::Tensor& lse,
                     const at::Tensor& grad_lse, const OptionalTensor& lse_columns,
                     const OptionalTensor& grad_columns) {
  check_vector(lse, queries.size(0), "lse", queries);
  check_vector(grad_lse, queries.size(0), "grad_lse", queries);
  TORCH_CHECK_VALUE(lse_columns.has_value() == grad_columns.has_value() && (keys || !lse_columns),
                    "lse_columns, grad_columns: expected both or neither, and neither without keys");
  if (!lse_columns) return;
  check_vector(*lse_columns, keys->size(0), "lse_columns", queries);
  check_vector(*grad_columns, keys->size(0), "grad_columns", queries);
}

/// The inputs without what a key_bias of −inf leaves out for all rows: that may hold anything, such as the NaN of
/// padding that nobody wrote, and 0·NaN would be NaN. Without keys a row that is left out as a key is still a query:
/// its values stay unless they are not finite; then the row is `broken`, and its own result NaN. No wait for a device.
struct Visible {
  at::Tensor queries;
  OptionalTensor keys;
  at::Tensor broken;  // bool (M,), or undefined for none

  Visible(const at::Tensor& given_queries, const OptionalTensor& given_keys, const OptionalTensor& key_bias)
      : queries(given_queries), keys(given_keys) {
    if (!key_bias) return;
    const auto hidden = key_bias->eq(-std::numeric_limits<double>::infinity());
    if (hidden.is_cpu() && !hidden.any().item<bool>()) return;
    if (keys) {
      keys = keys->masked_fill(hidden.unsqueeze(1), 0);
    } else {
      broken = hidden.logical_and(queries.isfinite().all(1).logical_not());
      queries = queries.masked_fill(broken.unsqueeze(1), 0);
    }
  }
};

#if defined(SSLFAST_WITH_CUDA)
/// What forward and backward have in common on CUDA. Nothing here waits for the device.
struct CudaCall {
  at::Tensor queries, keys, scale, exclude, bias;
  SimilarityLseCudaProblem problem{};
  at::TensorOptions floats, doubles;
  at::Tensor workspace;
  CudaScope scope;

  CudaCall(const at::Tensor& given_queries, const OptionalTensor& given_keys, const at::Tensor& given_scale,
           const OptionalTensor& given_exclude, const OptionalTensor& key_bias)
      : scope(given_queries) {
    problem.type = product_type_of(given_queries, "queries");
    queries = given_queries.contiguous();
    if (given_keys) keys = given_keys->contiguous();
    problem.rows = queries.size(0);
    problem.keys = keys.defined() ? keys.size(0) : problem.rows;
    problem.dim = queries.size(1);
    TORCH_CHECK_VALUE(problem.rows <= kSimilarityLseCudaMaxRows && problem.keys <= kSimilarityLseCudaMaxRows,
                      "queries, keys: expected at most ", kSimilarityLseCudaMaxRows, " rows on CUDA, got ",
                      problem.rows, " and ", problem.keys);
    check_device(given_scale, "scale", queries);
    scale = given_scale.to(at::kFloat).contiguous();
    problem.query_data = queries.const_data_ptr();
    problem.key_data = keys.defined() ? keys.const_data_ptr() : nullptr;
    problem.scale = scale.const_data_ptr<float>();
    if (given_exclude && given_exclude->numel() > 0) {
      exclude = given_exclude->contiguous();
      problem.exclude = exclude.const_data_ptr<int64_t>();
      problem.exclude_count = static_cast<int>(exclude.size(1));
    }
    if (key_bias) {
      bias = key_bias->to(at::kFloat).contiguous();
      problem.key_bias = bias.const_data_ptr<float>();
    }
    floats = queries.options().dtype(at::kFloat).requires_grad(false);
    doubles = floats.dtype(at::kDouble);
  }

  void allocate(int64_t bytes) {
    workspace = at::empty({bytes}, floats.dtype(at::kByte));
    problem.workspace = workspace.data_ptr();
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cuda(CudaCall call, bool columns, bool key_sum) {
  auto& p = call.problem;
  const auto lse = at::empty({p.rows}, call.doubles), lse_columns = at::empty({columns ? p.keys : 0}, call.doubles);
  SimilarityLseForwardCudaParams params{p, lse.data_ptr<double>(), columns ? lse_columns.data_ptr<double>() : nullptr};
  call.allocate(similarity_lse_forward_workspace_bytes(params));
  params.problem = p;
  launch_similarity_lse_forward_cuda(params, call.scope.stream());
  if (!key_sum) return {lse, lse_columns, at::empty({0}, call.floats)};

  const auto sums = at::empty({p.rows, p.dim}, call.floats);
  SimilarityLseBackwardCudaParams sum_params{};
  p.workspace = nullptr;
  sum_params.problem = p;
  sum_params.lse = lse.const_data_ptr<double>();
  sum_params.key_sum = sums.data_ptr<float>();
  call.allocate(similarity_lse_backward_workspace_bytes(sum_params));
  sum_params.problem = p;
  launch_similarity_lse_backward_cuda(sum_params, call.scope.stream());
  return {lse, lse_columns, sums};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(CudaCall call, const at::Tensor& lse,
                                                             const at::Tensor& grad_lse,
                                                             const OptionalTensor& lse_columns,
                                                             const OptionalTensor& grad_columns) {
  const auto as_doubles = [](const at::Tensor& t) { return t.to(at::kDouble).contiguous(); };
  const auto row_lse = as_doubles(lse), row_grad = as_doubles(grad_lse);
  const auto column_lse = lse_columns ? as_doubles(*lse_columns) : at::Tensor();
  const auto column_grad = lse_columns ? as_doubles(*grad_columns) : at::Tensor();
  const bool symmetric = call.problem.key_data == nullptr;
  const auto grad_queries = at::empty_like(call.queries);
  const auto grad_keys = symmetric ? at::empty({0}, call.queries.options()) : at::empty_like(call.keys);
  const auto grad_scale = at::empty({}, call.floats);

  SimilarityLseBackwardCudaParams params{};
  params.problem = call.problem;
  params.lse = row_lse.const_data_ptr<double>();
  params.grad_lse = row_grad.const_data_ptr<double>();
  params.lse_columns = lse_columns ? column_lse.const_data_ptr<double>() : nullptr;
  params.grad_columns = lse_columns ? column_grad.const_data_ptr<double>() : nullptr;
  params.grad_queries = grad_queries.data_ptr();
  params.grad_keys = symmetric ? nullptr : grad_keys.data_ptr();
  params.grad_scale = grad_scale.data_ptr<float>();
  call.allocate(similarity_lse_backward_workspace_bytes(params));
  params.problem = call.problem;
  launch_similarity_lse_backward_cuda(params, call.scope.stream());
  return {grad_queries, grad_keys, grad_scale};
}
#endif

/// Checked and contiguous inputs on the CPU, sizes and the scratch that both directions need.
struct CpuCall {
  at::Tensor queries, keys, exclude, bias;  // keys, exclude, bias: undefined if there are none
  SimilarityLseProblem problem{};
  at::TensorOptions acc;
  int64_t acc_bytes, padded_rows, padded_keys, padded_dim;
  Scratch scratch;

  CpuCall(const at::Tensor& given_queries, const OptionalTensor& given_keys, const at::Tensor& scale,
          const OptionalTensor& given_exclude, const OptionalTensor& key_bias) {
    TORCH_CHECK_VALUE(given_queries.is_cpu(), "queries: expected a CPU tensor, got one on ", given_queries.device());
    queries = given_queries.contiguous();
    if (given_keys) keys = given_keys->contiguous();
    const auto dtype = queries.scalar_type();
    acc = queries.options().dtype(dtype == at::kDouble ? at::kDouble : at::kFloat).requires_grad(false);
    acc_bytes = dtype == at::kDouble ? 8 : 4;

    problem.dtype = dtype;
    problem.rows = queries.size(0);
    problem.keys = keys.defined() ? keys.size(0) : problem.rows;
    problem.dim = queries.size(1);
    problem.query_data = queries.const_data_ptr();
    problem.key_data = keys.defined() ? keys.const_data_ptr() : nullptr;
    problem.scale = finite_scalar(scale, "scale", dtype);
    problem.threads = thread_count();
    if (given_exclude) read_exclude(*given_exclude);
    if (key_bias) {
      bias = key_bias->to(acc.dtype()).contiguous();
      problem.key_bias = bias.const_data_ptr();
    }
    padded_rows = padded(problem.rows);
    padded_keys = padded(problem.keys);
    padded_dim = padded(problem.dim);
    problem.plan.bf16_products = use_bf16_products(dtype, problem.rows, problem.keys);
  }

  bool symmetric() const { return problem.key_data == nullptr; }

  /// Tiles that meet in rounds.
  void plan_rounds() {
    problem.plan.row_block = matrix_block(padded_rows, problem.plan.bf16_products);
    problem.plan.key_block = matrix_block(padded_keys, problem.plan.bf16_products);
  }

  /// Groups of row blocks × segments of the keys: a few dozen tasks. The sums of the keys are kept for each segment.
  void plan_tasks(bool key_sum) {
    auto& plan = problem.plan;
    plan.row_block = std::min(padded_rows, largest_matrix_block(plan.bf16_products));
    plan.key_block = matrix_block(padded_keys, plan.bf16_products);
    const int64_t row_blocks = count_blocks(padded_rows, plan.row_block);
    plan.group_blocks = std::max(1024 / plan.row_block, count_blocks(row_blocks, kSimilarityLseMaxParts));
    plan.groups = count_blocks(row_blocks, plan.group_blocks);
    const int64_t key_blocks = count_blocks(padded_keys, plan.key_block);
    const int64_t segments =
        std::clamp<int64_t>(count_blocks(key_sum ? 32 : kSimilarityLseMaxParts, plan.groups), 1, key_blocks);
    plan.segment_blocks = count_blocks(key_blocks, segments);
    plan.segments = count_blocks(key_blocks, plan.segment_blocks);
  }

  struct Offsets {
    Scratch::Offset row_bias, column_bias, packed_queries, tiles, hidden;
  } offsets;

  Scratch::Offset reserve(int64_t elements) { return scratch.reserve_bytes(elements * acc_bytes); }

  void reserve_common() {
    const auto& plan = problem.plan;
    problem.tile_bytes = matrix_tile_bytes(plan.row_block, plan.key_block, plan.bf16_products, acc_bytes);
    problem.hidden_count = (plan.row_block + plan.key_block) * problem.exclude_count;
    offsets = {reserve(padded_rows), reserve(padded_keys), reserve((symmetric() ? 5 : 3) * padded_rows * padded_dim),
               scratch.reserve_bytes(problem.threads * problem.tile_bytes),
               reserve(problem.threads * problem.hidden_count)};
  }

  void allocate() {
    scratch.allocate();
    problem.row_bias = scratch.at(offsets.row_bias);
    problem.column_bias = scratch.at(offsets.column_bias);
    problem.packed_queries = scratch.at(offsets.packed_queries);
    problem.tiles = scratch.at(offsets.tiles);
    problem.hidden = scratch.at(offsets.hidden);
  }

 private:
  void read_exclude(const at::Tensor& given) {
    exclude = given.contiguous();
    problem.exclude = exclude.const_data_ptr<int64_t>();
    problem.exclude_count = exclude.size(1);
    for (int64_t at = 0; at < exclude.numel(); ++at)
      TORCH_CHECK_VALUE(problem.exclude[at] >= -1 && problem.exclude[at] < problem.keys,
                        "exclude: expected indices of keys from 0 to ", problem.keys - 1, ", or -1 for none, got ",
                        problem.exclude[at]);
  }
};

}  // namespace

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& queries, const OptionalTensor& keys,
                                                       const at::Tensor& scale, const OptionalTensor& exclude,
                                                       const OptionalTensor& key_bias, bool columns, bool key_sum) {
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(queries)) return forward_cuda({queries, keys, scale, exclude, key_bias}, columns, key_sum);
#endif
  CpuCall call(queries, keys, scale, exclude, key_bias);
  call.symmetric() ? call.plan_rounds() : call.plan_tasks(key_sum);
  const auto& p = call.problem;
  const int64_t segments = call.symmetric() ? 1 : p.plan.segments, groups = columns ? p.plan.groups : 0;
  const auto lse = at::empty({p.rows}, call.acc.dtype(at::kDouble));
  const auto lse_columns = at::empty({columns ? p.keys : 0}, lse.options());
  const auto sums = key_sum ? at::empty({p.rows, p.dim}, call.acc) : at::empty({0}, call.acc);

  call.reserve_common();
  auto& scratch = call.scratch;
  const auto packed_keys = call.reserve(call.symmetric() ? 0 : p.threads * 3 * p.plan.key_block * call.padded_dim);
  const auto row_max = call.reserve(segments * call.padded_rows);
  const auto row_sum = scratch.reserve<double>(segments * call.padded_rows);
  const auto column_max = call.reserve(groups * call.padded_keys);
  const auto column_sum = scratch.reserve<double>(groups * call.padded_keys);
  const auto key_sums = call.reserve(key_sum ? segments * call.padded_rows * call.padded_dim : 0);
  call.allocate();

  SimilarityLseForwardParams params{};
  params.problem = p;
  params.packed_keys = scratch.at(packed_keys);
  params.row_max = scratch.at(row_max);
  params.row_sum = scratch.at<double>(row_sum);
  params.column_max = scratch.at(column_max);
  params.column_sum = scratch.at<double>(column_sum);
  params.key_sums = scratch.at(key_sums);
  params.lse = lse.data_ptr<double>();
  params.lse_columns = columns ? lse_columns.data_ptr<double>() : nullptr;
  params.key_sum = key_sum ? sums.data_ptr() : nullptr;
  SSLFAST_CPU_DISPATCH(launch_similarity_lse_forward_cpu, params);
  return {lse, lse_columns, sums};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& queries, const OptionalTensor& keys,
                                                        const at::Tensor& scale, const at::Tensor& lse,
                                                        const at::Tensor& grad_lse, const OptionalTensor& exclude,
                                                        const OptionalTensor& key_bias,
                                                        const OptionalTensor& lse_columns,
                                                        const OptionalTensor& grad_columns) {
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(queries)) {
    auto [grad_queries, grad_keys, grad] =
        backward_cuda({queries, keys, scale, exclude, key_bias}, lse, grad_lse, lse_columns, grad_columns);
    return {grad_queries, grad_keys, grad.reshape(scale.sizes()).to(scale.scalar_type())};
  }
#endif
  CpuCall call(queries, keys, scale, exclude, key_bias);
  call.plan_rounds();
  const auto& p = call.problem;
  const auto doubles = [](const at::Tensor& t) { return t.to(at::kDouble).contiguous(); };
  const auto row_lse = doubles(lse), row_grad = doubles(grad_lse);
  const auto column_lse = lse_columns ? doubles(*lse_columns) : at::Tensor();
  const auto column_grad = lse_columns ? doubles(*grad_columns) : at::Tensor();
  const auto grad_queries = at::empty_like(call.queries);
  const auto grad_keys = call.symmetric() ? at::empty({0}, call.queries.options()) : at::empty_like(call.keys);
  const auto grad_scale = at::empty({}, call.acc.dtype(at::kDouble));

  call.reserve_common();
  auto& scratch = call.scratch;
  const auto packed_keys = call.reserve(call.symmetric() ? 0 : 3 * call.padded_keys * call.padded_dim);
  const auto row_shift = call.reserve(call.padded_rows), row_factor = call.reserve(call.padded_rows);
  const auto column_shift = call.reserve(call.padded_keys), column_factor = call.reserve(call.padded_keys);
  const auto row_sums = call.reserve(call.padded_rows * call.padded_dim);
  const auto column_sums = call.reserve(call.padded_keys * call.padded_dim);
  const auto row_scratch = call.reserve(2 * p.threads * call.padded_dim);
  const auto row_dot = scratch.reserve<double>(p.rows);
  call.allocate();

  SimilarityLseBackwardParams params{};
  params.problem = p;
  params.lse = row_lse.const_data_ptr<double>();
  params.grad_lse = row_grad.const_data_ptr<double>();
  params.lse_columns = lse_columns ? column_lse.const_data_ptr<double>() : nullptr;
  params.grad_columns = lse_columns ? column_grad.const_data_ptr<double>() : nullptr;
  params.packed_keys = scratch.at(packed_keys);
  params.row_shift = scratch.at(row_shift);
  params.row_factor = scratch.at(row_factor);
  params.column_shift = scratch.at(column_shift);
  params.column_factor = scratch.at(column_factor);
  params.row_sums = scratch.at(row_sums);
  params.column_sums = scratch.at(column_sums);
  params.row_scratch = scratch.at(row_scratch);
  params.row_dot = scratch.at<double>(row_dot);
  params.grad_queries = grad_queries.data_ptr();
  params.grad_keys = call.symmetric() ? nullptr : grad_keys.data_ptr();
  params.grad_scale = grad_scale.data_ptr<double>();
  SSLFAST_CPU_DISPATCH(launch_similarity_lse_backward_cpu, params);
  return {grad_queries, grad_keys, grad_scale.reshape(scale.sizes()).to(scale.scalar_type())};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_lse_forward(
    const at::Tensor& queries, const OptionalTensor& keys, const at::Tensor& scale, const OptionalTensor& exclude,
    const OptionalTensor& key_bias, bool columns, bool key_sum) {
  check_inputs(queries, keys, scale, exclude, key_bias);
  TORCH_CHECK_VALUE(keys || !(columns || key_sum), "columns, key_sum: expected keys");
  const Visible visible(queries, keys, key_bias);
  auto found = forward(visible.queries, visible.keys, scale, exclude, key_bias, columns, key_sum);
  if (visible.broken.defined())
    std::get<0>(found).masked_fill_(visible.broken, std::numeric_limits<double>::quiet_NaN());
  return found;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_lse_backward(
    const at::Tensor& queries, const OptionalTensor& keys, const at::Tensor& scale, const at::Tensor& lse,
    const at::Tensor& grad_lse, const OptionalTensor& exclude, const OptionalTensor& key_bias,
    const OptionalTensor& lse_columns, const OptionalTensor& grad_columns) {
  check_inputs(queries, keys, scale, exclude, key_bias);
  check_gradients(queries, keys, lse, grad_lse, lse_columns, grad_columns);
  const Visible visible(queries, keys, key_bias);
  // An lse of −inf: a row without gradient.
  const auto rows =
      visible.broken.defined() ? lse.masked_fill(visible.broken, -std::numeric_limits<double>::infinity()) : lse;
  return backward(visible.queries, visible.keys, scale, rows, grad_lse, exclude, key_bias, lse_columns, grad_columns);
}

}  // namespace sslfast
