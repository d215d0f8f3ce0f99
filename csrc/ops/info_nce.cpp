#include "csrc/ops/info_nce.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "csrc/common/check.h"
#include "csrc/common/scratch.h"

namespace sslfast {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// What forward and backward have in common: checked inputs, sizes and the choice of the kernel.
struct Problem {
  at::Tensor z1, z2;
  int64_t batch, dim, padded_rows, elements;  // elements of ẑ with its padding
  double scale;
  bool bf16_products;
  at::TensorOptions acc;
  int64_t acc_bytes;

  Problem(const at::Tensor& first, const at::Tensor& second, const at::Tensor& temperature) {
    check_dim(first, 2, "z1");
    check_floating(first, "z1");
    check_same(first, second, "z1", "z2");
    TORCH_CHECK_VALUE(first.numel() > 0, "z1: expected at least one row and one column, got shape ", first.sizes());
    TORCH_CHECK_VALUE(first.is_cpu(), "z1: expected a CPU tensor, got one on ", first.device());
    TORCH_CHECK_VALUE(temperature.numel() == 1, "temperature: expected one element, got shape ", temperature.sizes());
    const double t = temperature.item<double>();
    TORCH_CHECK_VALUE(t > 0 && std::isfinite(t), "temperature: expected a positive number, got ", t);
    z1 = first.contiguous();
    z2 = second.contiguous();
    batch = z1.size(0);
    dim = z1.size(1);
    padded_rows = round_up(2 * batch, kInfoNcePad);
    elements = padded_rows * padded_dim();
    const auto dtype = z1.scalar_type();
    scale = dtype == at::kDouble ? 1 / t : static_cast<float>(1 / t);  // the one that the kernels multiply with
    const auto capability = cpu_capability();
    bf16_products = scale <= kInfoNceBoundedScale &&
                    (dtype == at::kBFloat16 ? capability >= CpuCapability::Avx512Bf16
                                            : dtype != at::kDouble && capability >= CpuCapability::Amx &&
                                                  padded_rows >= kInfoNceSplitRows);
    acc = z1.options().dtype(dtype == at::kDouble ? at::kDouble : at::kFloat).requires_grad(false);
    acc_bytes = dtype == at::kDouble ? 8 : 4;
  }

  int64_t padded_dim() const { return round_up(dim, kInfoNcePad); }
};

void check_reduction(const std::string& reduction) {
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none",
                    "reduction: expected 'mean', 'sum' or 'none', got '", reduction, "'");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> info_nce_forward(const at::Tensor& z1, const at::Tensor& z2,
                                                    const at::Tensor& temperature, const std::string& reduction) {
  const Problem problem(z1, z2, temperature);
  check_reduction(reduction);
  const auto loss = at::empty({2 * problem.batch}, problem.acc);
  const auto lse = at::empty({2 * problem.batch}, problem.acc.dtype(at::kDouble));
  Scratch scratch;
  const auto rows = scratch.reserve_bytes((problem.bf16_products ? 3 : 2) * problem.elements * problem.acc_bytes);
  const auto row_scratch = scratch.reserve<float>(2 * at::get_num_threads() * problem.padded_dim());
  const auto inv_norm = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto max = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto positive = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto sum = scratch.reserve<double>(problem.padded_rows);
  scratch.allocate();

  InfoNceForwardParams params{};
  params.dtype = problem.z1.scalar_type();
  params.batch = problem.batch;
  params.dim = problem.dim;
  params.z1 = problem.z1.const_data_ptr();
  params.z2 = problem.z2.const_data_ptr();
  params.scale = problem.scale;
  params.rows = scratch.at(rows);
  params.row_scratch = scratch.at(row_scratch);
  params.inv_norm = scratch.at(inv_norm);
  params.max = scratch.at(max);
  params.positive = scratch.at(positive);
  params.sum = scratch.at<double>(sum);
  params.loss = loss.data_ptr();
  params.lse = lse.data_ptr<double>();
  if (problem.bf16_products) {
    SSLFAST_CPU_DISPATCH(launch_info_nce_forward_bf16_cpu, params);
  } else {
    SSLFAST_CPU_DISPATCH(launch_info_nce_forward_cpu, params);
  }
  if (reduction == "none") return {loss, lse};

  // In one thread and in double: the same bits for any number of threads.
  const auto total = at::empty({}, problem.acc);
  AT_DISPATCH_FLOATING_TYPES(loss.scalar_type(), "info_nce_forward", [&] {
    double sum = 0;
    for (int64_t row = 0; row < 2 * problem.batch; ++row) sum += loss.const_data_ptr<scalar_t>()[row];
    *total.data_ptr<scalar_t>() = static_cast<scalar_t>(reduction == "mean" ? sum / (2 * problem.batch) : sum);
  });
  return {total, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_backward(const at::Tensor& grad_loss, const at::Tensor& z1,
                                                                 const at::Tensor& z2, const at::Tensor& temperature,
                                                                 const at::Tensor& lse, const std::string& reduction) {
  const Problem problem(z1, z2, temperature);
  check_reduction(reduction);
  const int64_t row_count = 2 * problem.batch;
  TORCH_CHECK_VALUE(lse.dim() == 1 && lse.size(0) == row_count && lse.scalar_type() == at::kDouble,
                    "lse: expected the second result of info_nce_forward, float64 of shape [", row_count, "], got ",
                    lse.scalar_type(), " of shape ", lse.sizes());
  TORCH_CHECK_VALUE(grad_loss.numel() == (reduction == "none" ? row_count : 1),
                    "grad_loss: expected the shape of the loss, got ", grad_loss.sizes());
  const auto lse_rows = lse.contiguous(), grad_acc = grad_loss.to(problem.acc).contiguous();
  const auto grad_z1 = at::empty_like(problem.z1), grad_z2 = at::empty_like(problem.z2);
  const auto grad_temperature = at::empty({}, problem.acc.dtype(at::kDouble));
  const int64_t block = problem.bf16_products ? info_nce_bf16_block_rows(row_count) : info_nce_block_rows(row_count);
  const int64_t tile_bytes = problem.bf16_products ? 8 * block * block : block * block * problem.acc_bytes;
  Scratch scratch;
  const auto rows = scratch.reserve_bytes((problem.bf16_products ? 5 : 2) * problem.elements * problem.acc_bytes);
  const auto grad_rows = scratch.reserve_bytes((problem.bf16_products ? 2 : 1) * problem.elements * problem.acc_bytes);
  const auto row_scratch = scratch.reserve<float>(2 * at::get_num_threads() * problem.padded_dim());
  const auto inv_norm = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto shift = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto factor = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto weight = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto row_dot = scratch.reserve<double>(problem.padded_rows);
  const auto tiles = scratch.reserve_bytes(at::get_num_threads() * tile_bytes);
  scratch.allocate();

  InfoNceBackwardParams params{};
  params.dtype = problem.z1.scalar_type();
  params.batch = problem.batch;
  params.dim = problem.dim;
  params.z1 = problem.z1.const_data_ptr();
  params.z2 = problem.z2.const_data_ptr();
  params.scale = problem.scale;
  params.lse = lse_rows.const_data_ptr<double>();
  params.grad_loss = grad_acc.const_data_ptr();
  params.grad_loss_stride = reduction == "none" ? 1 : 0;
  params.grad_loss_factor = reduction == "mean" ? 1.0 / static_cast<double>(row_count) : 1.0;
  params.rows = scratch.at(rows);
  params.row_scratch = scratch.at(row_scratch);
  params.inv_norm = scratch.at(inv_norm);
  params.shift = scratch.at(shift);
  params.factor = scratch.at(factor);
  params.weight = scratch.at(weight);
  params.grad_rows = scratch.at(grad_rows);
  params.tiles = scratch.at(tiles);
  params.row_dot = scratch.at<double>(row_dot);
  params.grad_z1 = grad_z1.data_ptr();
  params.grad_z2 = grad_z2.data_ptr();
  params.grad_temperature = grad_temperature.data_ptr<double>();
  if (problem.bf16_products) {
    SSLFAST_CPU_DISPATCH(launch_info_nce_backward_bf16_cpu, params);
  } else {
    SSLFAST_CPU_DISPATCH(launch_info_nce_backward_cpu, params);
  }
  return {grad_z1, grad_z2, grad_temperature.reshape(temperature.sizes()).to(temperature.scalar_type())};
}

}  // namespace sslfast
