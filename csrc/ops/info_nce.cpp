#include "csrc/ops/info_nce.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "csrc/common/check.h"
#include "csrc/common/scratch.h"
#if defined(SSLFAST_WITH_CUDA)
#include "csrc/common/cuda_device.h"
#include "csrc/common/product_type_of.h"
#include "csrc/ops/cuda/info_nce_kernel.h"
#endif

namespace sslfast {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

void check_inputs(const at::Tensor& z1, const at::Tensor& z2, const at::Tensor& temperature) {
  check_dim(z1, 2, "z1");
  check_floating(z1, "z1");
  check_same(z1, z2, "z1", "z2");
  TORCH_CHECK_VALUE(z1.numel() > 0, "z1: expected at least one row and one column, got shape ", z1.sizes());
  check_scalar(temperature, "temperature");
}

void check_reduction(const std::string& reduction) {
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none",
                    "reduction: expected 'mean', 'sum' or 'none', got '", reduction, "'");
}

void check_gradient(const at::Tensor& grad_loss, const at::Tensor& z1, const at::Tensor& lse,
                    const std::string& reduction) {
  const int64_t row_count = 2 * z1.size(0);
  check_dense(lse, "lse");
  check_floating(grad_loss, "grad_loss");
  check_device(lse, "lse", z1);
  check_device(grad_loss, "grad_loss", z1);
  TORCH_CHECK_VALUE(lse.dim() == 1 && lse.size(0) == row_count && lse.scalar_type() == at::kDouble,
                    "lse: expected the second result of info_nce_forward, float64 of shape [", row_count, "], got ",
                    lse.scalar_type(), " of shape ", lse.sizes());
  TORCH_CHECK_VALUE(grad_loss.numel() == (reduction == "none" ? row_count : 1),
                    "grad_loss: expected the shape of the loss, got ", grad_loss.sizes());
}

#if defined(SSLFAST_WITH_CUDA)
/// What forward and backward have in common on CUDA. Nothing here waits for the device.
struct CudaProblem {
  at::Tensor z1, z2, temperature;
  float known_temperature = 0;  // where it is not on the device; it gets no gradient then
  ProductType type;
  int64_t batch, dim;
  at::TensorOptions floats;
  CudaScope scope;

  CudaProblem(const at::Tensor& first, const at::Tensor& second, const at::Tensor& t)
      : type(product_type_of(first, "z1")), batch(first.size(0)), dim(first.size(1)), scope(first) {
    TORCH_CHECK_VALUE(batch <= kInfoNceCudaMaxBatch && dim <= kInfoNceCudaMaxDim, "z1: expected at most ",
                      kInfoNceCudaMaxBatch, " rows and ", kInfoNceCudaMaxDim, " columns on CUDA, got shape ",
                      first.sizes());
    TORCH_CHECK_VALUE(t.device() == first.device() || is_host_tensor(t), "temperature: expected a tensor on ",
                      first.device(), " or the CPU, got one on ", t.device());
    z1 = first.contiguous();
    z2 = second.contiguous();
    if (is_host_tensor(t)) {
      known_temperature = t.item<float>();
      TORCH_CHECK_VALUE(
          known_temperature > 0 && std::isfinite(known_temperature) && std::isfinite(1 / known_temperature),
          "temperature: expected a positive number of finite inverse, got ", t.item<double>());
    } else {
      temperature = t.to(at::kFloat).contiguous();
    }
    floats = first.options().dtype(at::kFloat).requires_grad(false);
  }

  const float* temperature_data() const {
    return temperature.defined() ? temperature.const_data_ptr<float>() : nullptr;
  }
  at::Tensor workspace(int64_t bytes) const { return at::empty({bytes}, floats.dtype(at::kByte)); }
  float mean_factor(const std::string& reduction) const {
    return reduction == "mean" ? static_cast<float>(0.5 / static_cast<double>(batch)) : 1.0f;
  }
};

std::tuple<at::Tensor, at::Tensor> forward_cuda(const CudaProblem& problem, const std::string& reduction) {
  const auto loss = at::empty({2 * problem.batch}, problem.floats), total = at::empty({}, problem.floats);
  const auto lse = at::empty({2 * problem.batch}, problem.floats.dtype(at::kDouble));
  const auto workspace = problem.workspace(info_nce_forward_workspace_bytes(problem.type, problem.batch, problem.dim));

  InfoNceForwardCudaParams params{};
  params.type = problem.type;
  params.batch = problem.batch;
  params.dim = problem.dim;
  params.z1 = problem.z1.const_data_ptr();
  params.z2 = problem.z2.const_data_ptr();
  params.temperature = problem.temperature_data();
  params.known_temperature = problem.known_temperature;
  params.workspace = workspace.data_ptr();
  params.loss = loss.data_ptr<float>();
  params.lse = lse.data_ptr<double>();
  params.total = reduction == "none" ? nullptr : total.data_ptr<float>();
  params.total_factor = problem.mean_factor(reduction);
  launch_info_nce_forward_cuda(params, problem.scope.stream());
  return {reduction == "none" ? loss : total, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(const CudaProblem& problem, const at::Tensor& grad_loss,
                                                             const at::Tensor& lse, const std::string& reduction) {
  const auto lse_rows = lse.contiguous(), grad = grad_loss.to(at::kFloat).contiguous();
  const auto grad_z1 = at::empty_like(problem.z1), grad_z2 = at::empty_like(problem.z2);
  const bool known = !problem.temperature.defined();
  const auto grad_temperature = known ? at::zeros({}, at::kFloat) : at::empty({}, problem.floats);
  const auto workspace = problem.workspace(info_nce_backward_workspace_bytes(problem.type, problem.batch, problem.dim));

  InfoNceBackwardCudaParams params{};
  params.type = problem.type;
  params.batch = problem.batch;
  params.dim = problem.dim;
  params.z1 = problem.z1.const_data_ptr();
  params.z2 = problem.z2.const_data_ptr();
  params.temperature = problem.temperature_data();
  params.known_temperature = problem.known_temperature;
  params.lse = lse_rows.const_data_ptr<double>();
  params.grad_loss = grad.const_data_ptr<float>();
  params.grad_loss_stride = reduction == "none" ? 1 : 0;
  params.grad_loss_factor = problem.mean_factor(reduction);
  params.workspace = workspace.data_ptr();
  params.grad_z1 = grad_z1.data_ptr();
  params.grad_z2 = grad_z2.data_ptr();
  params.grad_temperature = known ? nullptr : grad_temperature.data_ptr<float>();
  launch_info_nce_backward_cuda(params, problem.scope.stream());
  return {grad_z1, grad_z2, grad_temperature};
}
#endif

/// What forward and backward have in common on the CPU: checked inputs, sizes and the choice of the kernel.
struct Problem {
  at::Tensor z1, z2;
  int64_t batch, dim, padded_rows, elements;  // elements of ẑ with its padding
  double scale;
  bool bf16_products;
  int terms;  // of a number in bfloat16 products
  at::TensorOptions acc;
  int64_t acc_bytes, threads;

  Problem(const at::Tensor& first, const at::Tensor& second, const at::Tensor& temperature) {
    TORCH_CHECK_VALUE(first.is_cpu(), "z1: expected a CPU tensor, got one on ", first.device());
    const double t = finite_scalar(temperature, "temperature", first.scalar_type());
    z1 = first.contiguous();
    z2 = second.contiguous();
    batch = z1.size(0);
    dim = z1.size(1);
    padded_rows = round_up(2 * batch, kInfoNcePad);
    elements = padded_rows * padded_dim();
    const auto dtype = z1.scalar_type();
    scale = dtype == at::kDouble ? 1 / t : static_cast<float>(1 / t);  // the one that the kernels multiply with
    TORCH_CHECK_VALUE(t > 0 && std::isfinite(scale), "temperature: expected a positive number of finite inverse, got ",
                      t);
    threads = thread_count();
    const auto capability = cpu_capability();
    bf16_products = scale <= kInfoNceBoundedScale &&
                    (dtype == at::kBFloat16 ? capability >= CpuCapability::Avx512Bf16
                                            : dtype != at::kDouble && capability >= CpuCapability::Amx &&
                                                  padded_rows >= kInfoNceSplitRows);
    terms = info_nce_terms(dtype, scale, dim);
    acc = z1.options().dtype(dtype == at::kDouble ? at::kDouble : at::kFloat).requires_grad(false);
    acc_bytes = dtype == at::kDouble ? 8 : 4;
  }

  int64_t padded_dim() const { return round_up(dim, kInfoNcePad); }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> info_nce_forward(const at::Tensor& z1, const at::Tensor& z2,
                                                    const at::Tensor& temperature, const std::string& reduction) {
  check_inputs(z1, z2, temperature);
  check_reduction(reduction);
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(z1)) return forward_cuda({z1, z2, temperature}, reduction);
#endif
  const Problem problem(z1, z2, temperature);
  const auto loss = at::empty({2 * problem.batch}, problem.acc);
  const auto lse = at::empty({2 * problem.batch}, problem.acc.dtype(at::kDouble));
  Scratch scratch;
  const int64_t forms = problem.bf16_products ? problem.terms : 2;
  const auto rows = scratch.reserve_bytes(forms * problem.elements * problem.acc_bytes);
  const auto row_scratch = scratch.reserve<float>(3 * problem.threads * problem.padded_dim());
  const auto inv_norm = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto max = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto sum = scratch.reserve<double>(problem.padded_rows);
  scratch.allocate();

  InfoNceForwardParams params{};
  params.dtype = problem.z1.scalar_type();
  params.batch = problem.batch;
  params.dim = problem.dim;
  params.z1 = problem.z1.const_data_ptr();
  params.z2 = problem.z2.const_data_ptr();
  params.scale = problem.scale;
  params.threads = problem.threads;
  params.rows = scratch.at(rows);
  params.row_scratch = scratch.at(row_scratch);
  params.inv_norm = scratch.at(inv_norm);
  params.max = scratch.at(max);
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
  check_inputs(z1, z2, temperature);
  check_reduction(reduction);
  check_gradient(grad_loss, z1, lse, reduction);
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(z1)) {
    auto [grad_z1, grad_z2, grad_t] = backward_cuda({z1, z2, temperature}, grad_loss, lse, reduction);
    return {grad_z1, grad_z2, grad_t.reshape(temperature.sizes()).to(temperature.scalar_type())};
  }
#endif
  const Problem problem(z1, z2, temperature);
  const int64_t row_count = 2 * problem.batch;
  const auto lse_rows = lse.contiguous(), grad_acc = grad_loss.to(problem.acc).contiguous();
  const auto grad_z1 = at::empty_like(problem.z1), grad_z2 = at::empty_like(problem.z2);
  const auto grad_temperature = at::empty({}, problem.acc.dtype(at::kDouble));
  const int64_t block = problem.bf16_products ? info_nce_bf16_block_rows(row_count) : info_nce_block_rows(row_count);
  const int64_t gradient_terms = info_nce_gradient_terms(problem.terms);
  const int64_t tile_bytes = block * block * (problem.bf16_products ? 4 * gradient_terms : problem.acc_bytes);
  Scratch scratch;
  const auto rows = scratch.reserve_bytes((problem.bf16_products ? problem.terms + gradient_terms : 2) *
                                          problem.elements * problem.acc_bytes);
  const auto grad_rows = scratch.reserve_bytes((problem.bf16_products ? 2 : 1) * problem.elements * problem.acc_bytes);
  const auto row_scratch = scratch.reserve<float>(3 * problem.threads * problem.padded_dim());
  const auto inv_norm = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto shift = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto factor = scratch.reserve_bytes(problem.padded_rows * problem.acc_bytes);
  const auto row_dot = scratch.reserve<double>(problem.padded_rows);
  const auto tiles = scratch.reserve_bytes(problem.threads * tile_bytes);
  scratch.allocate();

  InfoNceBackwardParams params{};
  params.dtype = problem.z1.scalar_type();
  params.batch = problem.batch;
  params.dim = problem.dim;
  params.z1 = problem.z1.const_data_ptr();
  params.z2 = problem.z2.const_data_ptr();
  params.scale = problem.scale;
  params.threads = problem.threads;
  params.lse = lse_rows.const_data_ptr<double>();
  params.grad_loss = grad_acc.const_data_ptr();
  params.grad_loss_stride = reduction == "none" ? 1 : 0;
  params.grad_loss_factor = reduction == "mean" ? 1.0 / static_cast<double>(row_count) : 1.0;
  params.rows = scratch.at(rows);
  params.row_scratch = scratch.at(row_scratch);
  params.inv_norm = scratch.at(inv_norm);
  params.shift = scratch.at(shift);
  params.factor = scratch.at(factor);
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

namespace {

/// torch.ops.sslfast.info_nce_backward, which Python registers.
std::tuple<at::Tensor, at::Tensor, at::Tensor> dispatched_backward(const at::Tensor& grad_loss, const at::Tensor& z1,
                                                                   const at::Tensor& z2, const at::Tensor& temperature,
                                                                   const at::Tensor& lse,
                                                                   const std::string& reduction) {
  using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sslfast::info_nce_backward", "").typed<Backward>();
  return op.call(grad_loss, z1, z2, temperature, lse, reduction);
}

/// nt_xent in eager mode. An autograd function in Python takes 0.1 ms more a step, a quarter of one at batch 256.
struct NTXent : torch::autograd::Function<NTXent> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& z1, const at::Tensor& z2,
                            const at::Tensor& temperature, const std::string& reduction) {
    auto [loss, lse] = info_nce_forward(z1, z2, temperature, reduction);
    ctx->save_for_backward({z1, z2, temperature, lse});
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "nt_xent has no second derivative: call backward or grad without create_graph=True");
    const auto saved = ctx->get_saved_variables();
    const auto& reduction = ctx->saved_data["reduction"].toStringRef();
    const at::Tensor& grad = grads[0];
    // A gradient without memory of its own, such as a batch of them under vmap, is the dispatcher's.
    const bool dense = grad.has_storage() && !grad.is_neg() && !grad._is_zerotensor();
    auto [grad_z1, grad_z2, grad_temperature] =
        dense ? info_nce_backward(grad, saved[0], saved[1], saved[2], saved[3], reduction)
              : dispatched_backward(grad, saved[0], saved[1], saved[2], saved[3], reduction);
    return {grad_z1, grad_z2, grad_temperature, at::Tensor()};
  }
};

}  // namespace

at::Tensor nt_xent(const at::Tensor& z1, const at::Tensor& z2, const at::Tensor& temperature,
                   const std::string& reduction) {
  return NTXent::apply(z1, z2, temperature, reduction);
}

}  // namespace sslfast
