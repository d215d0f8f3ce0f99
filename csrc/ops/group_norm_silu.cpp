#include "csrc/ops/group_norm_silu.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "csrc/common/check.h"
#include "csrc/common/scratch.h"
#if defined(SSLFAST_WITH_CUDA)
#include "csrc/common/cuda_device.h"
#include "csrc/ops/cuda/group_norm_silu_kernel.h"
#endif

namespace sslfast {
namespace {

c10::ScalarType acc_type(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

/// What forward and backward have in common: checked inputs in one memory format.
struct Problem {
  at::MemoryFormat format;
  at::Tensor x, weight, bias;
  at::TensorOptions acc;
  GroupNormSiluParams params{};

  Problem(const at::Tensor& input, int64_t groups, const std::optional<at::Tensor>& gamma,
          const std::optional<at::Tensor>& beta) {
    check_floating(input, "x");
    const auto dtype = input.scalar_type();
    TORCH_CHECK_VALUE(input.dim() >= 2, "x: expected (samples, channels, ...), got shape ", input.sizes());
    const int64_t channels = input.size(1);
    TORCH_CHECK_VALUE(groups >= 1 && channels % groups == 0, "num_groups: expected a divisor of the ", channels,
                      " channels, got ", groups);
    TORCH_CHECK_VALUE(input.numel() > 0, "x: expected at least one element, got shape ", input.sizes());
    format = input.suggest_memory_format();
    x = input.contiguous(format);
    acc = input.options().dtype(acc_type(input)).requires_grad(false);
    weight = parameter(gamma, "weight", channels);
    bias = parameter(beta, "bias", channels);
    params.dtype = dtype;
    params.samples = input.size(0);
    params.channels = channels;
    params.places = input.numel() / (input.size(0) * channels);
    params.groups = groups;
    params.channels_last = format != at::MemoryFormat::Contiguous;
    params.x = x.const_data_ptr();
    params.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
    params.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  }

  at::Tensor parameter(const std::optional<at::Tensor>& t, const char* name, int64_t channels) const {
    if (!t) return {};
    check_floating(*t, name);
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == channels, name, ": expected shape [", channels, "], got ",
                      t->sizes());
    TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type() || t->scalar_type() == at::kFloat, name,
                     ": expected float32 or the dtype of x, ", x.scalar_type(), ", got ", t->scalar_type());
    check_device(*t, name, x);
    return t->to(acc).contiguous();
  }

  /// Reserves the slices of all threads; `z`: with room for a task in the type of the arithmetic.
  void reserve(Scratch& scratch, bool z) {
    const int64_t width = (group_norm_silu_width(params) + 15) / 16 * 16, size = acc.dtype().itemsize();
    int64_t bytes = width * (2 * 8 + 7 * size);
    if (z && acc.dtype() != x.dtype()) bytes += group_norm_silu_width(params) * params.places * size;
    params.scratch_bytes = (bytes + 63) / 64 * 64;
    params.threads = thread_count();
    slices = scratch.reserve_bytes(params.threads * params.scratch_bytes);
  }
  Scratch::Offset slices{};
};

void require_cpu(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_cpu(), "x: expected a CPU tensor, got one on ", x.device());
}

#if defined(SSLFAST_WITH_CUDA)
GroupNormSiluCudaParams cuda_params(const GroupNormSiluParams& p) {
  TORCH_CHECK_TYPE(p.dtype != at::kDouble, "x: expected float32, bfloat16 or float16 on CUDA, got Double");
  GroupNormSiluCudaParams c{};
  c.type = p.dtype == at::kFloat      ? GroupNormSiluCudaType::float32
           : p.dtype == at::kBFloat16 ? GroupNormSiluCudaType::bfloat16
                                      : GroupNormSiluCudaType::float16;
  c.samples = p.samples;
  c.channels = p.channels;
  c.places = p.places;
  c.groups = p.groups;
  c.channels_last = p.channels_last;
  c.eps = static_cast<float>(p.eps);
  c.x = p.x;
  c.weight = static_cast<const float*>(p.weight);
  c.bias = static_cast<const float*>(p.bias);
  c.mean = static_cast<float*>(p.mean);
  c.rstd = static_cast<float*>(p.rstd);
  c.out = p.out;
  c.grad_out = p.grad_out;
  c.grad_x = p.grad_x;
  c.grad_weight = static_cast<float*>(p.grad_weight);
  c.grad_bias = static_cast<float*>(p.grad_bias);
  return c;
}
#endif

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu_forward(const at::Tensor& x, int64_t num_groups,
                                                                       const std::optional<at::Tensor>& weight,
                                                                       const std::optional<at::Tensor>& bias,
                                                                       double eps) {
  Problem problem(x, num_groups, weight, bias);
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps: expected a number from 0 on, got ", eps);
  auto& params = problem.params;
  const auto out = at::empty_like(problem.x);
  const auto mean = at::empty({params.samples, num_groups}, problem.acc), rstd = at::empty_like(mean);
  params.eps = eps;
  params.out = out.data_ptr();
  params.mean = mean.data_ptr();
  params.rstd = rstd.data_ptr();
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(x)) {
    const CudaScope scope(x);
    launch_group_norm_silu_forward_cuda(cuda_params(params), scope.stream());
    return {out, mean, rstd};
  }
#endif
  require_cpu(x);
  Scratch scratch;
  problem.reserve(scratch, false);
  scratch.allocate();
  params.scratch = scratch.at<std::byte>(problem.slices);
  SSLFAST_CPU_DISPATCH(launch_group_norm_silu_forward_cpu, params);
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu_backward(
    const at::Tensor& grad_out, const at::Tensor& x, int64_t num_groups, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& mean, const at::Tensor& rstd) {
  check_same(x, grad_out, "x", "grad_out");
  Problem problem(x, num_groups, weight, bias);
  auto& params = problem.params;
  for (const auto* t : {&mean, &rstd}) {
    check_dense(*t, "mean, rstd");
    TORCH_CHECK_VALUE(t->sizes() == at::IntArrayRef({params.samples, num_groups}) && t->scalar_type() == acc_type(x) &&
                          t->device() == x.device(),
                      "mean, rstd: expected what forward returned, got ", t->scalar_type(), " of shape ", t->sizes());
  }
  const auto grad = grad_out.contiguous(problem.format), means = mean.contiguous(), rstds = rstd.contiguous();
  const auto grad_x = at::empty_like(problem.x);
  const auto grad_weight = at::empty({params.channels}, problem.acc), grad_bias = at::empty_like(grad_weight);
  params.grad_out = grad.const_data_ptr();
  params.mean = means.data_ptr();
  params.rstd = rstds.data_ptr();
  params.grad_x = grad_x.data_ptr();
  params.grad_weight = grad_weight.data_ptr();
  params.grad_bias = grad_bias.data_ptr();
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(x)) {
    const CudaScope scope(x);
    const auto cuda_parts = at::empty({2, params.samples, params.channels}, problem.acc);
    auto cuda = cuda_params(params);
    cuda.grad_parameters = cuda_parts.data_ptr<float>();
    launch_group_norm_silu_backward_cuda(cuda, scope.stream());
    return {grad_x, grad_weight, grad_bias};
  }
#endif
  require_cpu(x);
  Scratch scratch;
  const auto parts = scratch.reserve<double>(2 * params.samples * params.channels);
  problem.reserve(scratch, true);
  scratch.allocate();
  params.grad_parameters = scratch.at<double>(parts);
  params.scratch = scratch.at<std::byte>(problem.slices);
  SSLFAST_CPU_DISPATCH(launch_group_norm_silu_backward_cpu, params);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace sslfast
