#include "csrc/ops/info_nce.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "csrc/common/check.h"

namespace sslfast {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Everything that forward and backward have in common: checked inputs, sizes, and where scratch comes from.
struct Problem {
  at::Tensor z1, z2;
  int64_t batch, dim, padded_rows, padded_dim;
  double scale;
  at::TensorOptions acc;

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
    padded_dim = round_up(dim, kInfoNcePad);
    scale = 1 / t;
    acc = z1.options().dtype(z1.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).requires_grad(false);
  }

  at::Tensor scratch(int64_t elements) const { return at::empty({elements}, acc); }
  at::Tensor scratch_double(int64_t elements) const { return at::empty({elements}, acc.dtype(at::kDouble)); }
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
  const auto lse = at::empty({2 * problem.batch}, problem.acc);
  const auto rows = problem.scratch(2 * problem.padded_rows * problem.padded_dim);
  const auto inv_norm = problem.scratch(problem.padded_rows), max = problem.scratch(problem.padded_rows);
  const auto sum = problem.scratch_double(problem.padded_rows);

  InfoNceForwardParams params{};
  params.dtype = problem.z1.scalar_type();
  params.batch = problem.batch;
  params.dim = problem.dim;
  params.z1 = problem.z1.data_ptr();
  params.z2 = problem.z2.data_ptr();
  params.scale = problem.scale;
  params.rows = rows.data_ptr();
  params.inv_norm = inv_norm.data_ptr();
  params.max = max.data_ptr();
  params.sum = sum.data_ptr<double>();
  params.loss = loss.data_ptr();
  params.lse = lse.data_ptr();
  SSLFAST_CPU_DISPATCH(launch_info_nce_forward_cpu, params);
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
  TORCH_CHECK_VALUE(lse.dim() == 1 && lse.size(0) == row_count && lse.scalar_type() == problem.acc.dtype(),
                    "lse: expected the second result of info_nce_forward, ", problem.acc.dtype(), " of shape [",
                    row_count, "], got ", lse.scalar_type(), " of shape ", lse.sizes());
  TORCH_CHECK_VALUE(grad_loss.numel() == (reduction == "none" ? row_count : 1),
                    "grad_loss: expected the shape of the loss, got ", grad_loss.sizes());
  const auto lse_acc = lse.contiguous(), grad_acc = grad_loss.to(problem.acc).contiguous();
  const auto grad_z1 = at::empty_like(problem.z1), grad_z2 = at::empty_like(problem.z2);
  const int64_t elements = problem.padded_rows * problem.padded_dim;
  const auto rows = problem.scratch(2 * elements), grad_rows = problem.scratch(elements);
  const auto vectors = problem.scratch(3 * problem.padded_rows);
  const auto tiles = problem.scratch(at::get_num_threads() * kInfoNceTileSize);
  const auto row_dot = problem.scratch_double(problem.padded_rows), grad_temperature = problem.scratch_double(1);
  const int64_t bytes = problem.padded_rows * static_cast<int64_t>(vectors.element_size());

  InfoNceBackwardParams params{};
  params.dtype = problem.z1.scalar_type();
  params.batch = problem.batch;
  params.dim = problem.dim;
  params.z1 = problem.z1.data_ptr();
  params.z2 = problem.z2.data_ptr();
  params.scale = problem.scale;
  params.lse = lse_acc.data_ptr();
  params.grad_loss = grad_acc.data_ptr();
  params.grad_loss_stride = reduction == "none" ? 1 : 0;
  params.grad_loss_factor = reduction == "mean" ? 1.0 / static_cast<double>(row_count) : 1.0;
  params.rows = rows.data_ptr();
  params.inv_norm = vectors.data_ptr();
  params.shift = static_cast<char*>(vectors.data_ptr()) + bytes;
  params.factor = static_cast<char*>(vectors.data_ptr()) + 2 * bytes;
  params.grad_rows = grad_rows.data_ptr();
  params.tiles = tiles.data_ptr();
  params.row_dot = row_dot.data_ptr<double>();
  params.grad_z1 = grad_z1.data_ptr();
  params.grad_z2 = grad_z2.data_ptr();
  params.grad_temperature = grad_temperature.data_ptr<double>();
  SSLFAST_CPU_DISPATCH(launch_info_nce_backward_cpu, params);
  return {grad_z1, grad_z2, grad_temperature.reshape(temperature.sizes()).to(temperature.scalar_type())};
}

}  // namespace sslfast
