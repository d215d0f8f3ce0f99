#include "csrc/ops/rotate4.h"

#include <ATen/ATen.h>

#include "csrc/common/check.h"
#if defined(SSLFAST_WITH_CUDA)
#include "csrc/common/cuda_device.h"
#include "csrc/ops/cuda/rotate4_kernel.h"
#endif

namespace sslfast {
namespace {

void check_images(const at::Tensor& images, const char* name) {
  check_dim(images, 4, name);
  TORCH_CHECK_VALUE(images.size(2) == images.size(3), name, ": expected square images, got shape ", images.sizes());
  switch (images.scalar_type()) {
    case at::kByte:
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf:
    case at::kDouble:
      return;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected uint8, float32, bfloat16, float16 or float64, got ",
                       images.scalar_type());
  }
}

/// The memory format in which one image is dense, contiguous first; sslfast/ops/rotate4.py has the same rule.
bool is_channels_last(const at::Tensor& images) {
  const auto first = images.narrow(0, 0, std::min<int64_t>(1, images.size(0)));
  return !first.is_contiguous() && first.is_contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor dense_images(const at::Tensor& images, bool channels_last) {
  const auto first = images.narrow(0, 0, std::min<int64_t>(1, images.size(0)));
  return channels_last || first.is_contiguous() ? images : images.contiguous();
}

Rotate4Params make_params(const at::Tensor& images, bool channels_last) {
  Rotate4Params p{};
  p.dtype = images.scalar_type();
  p.planes = channels_last ? 1 : images.size(1);
  p.pixel = channels_last ? images.size(1) : 1;
  p.size = images.size(2);
  return p;
}

at::MemoryFormat format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

#if defined(SSLFAST_WITH_CUDA)
Rotate4CudaParams cuda_params(const Rotate4Params& p) {
  Rotate4CudaType type = Rotate4CudaType::float32;
  switch (p.dtype) {
    case at::kByte:
      type = Rotate4CudaType::uint8;
      break;
    case at::kBFloat16:
      type = Rotate4CudaType::bfloat16;
      break;
    case at::kHalf:
      type = Rotate4CudaType::float16;
      break;
    default:
      TORCH_CHECK_TYPE(p.dtype == at::kFloat, "images: expected uint8, float32, bfloat16 or float16 on CUDA, got ",
                       p.dtype);
  }
  return {type, p.images, p.planes, p.size, p.pixel, p.image_stride, p.in, p.out, p.labels};
}
#endif

void require_cpu(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_cpu(), name, ": expected a CPU tensor, got one on ", t.device());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rotate4_forward(const at::Tensor& images) {
  check_images(images, "images");
  if (images.numel() == 0)
    return {images.repeat({4, 1, 1, 1}),
            at::arange(4, images.options().dtype(at::kLong)).repeat_interleave(images.size(0))};
  const bool channels_last = is_channels_last(images);
  const at::Tensor x = dense_images(images, channels_last);
  const int64_t n = x.size(0);
  const auto options = x.options().requires_grad(false);
  const auto y = at::empty({4 * n, x.size(1), x.size(2), x.size(3)}, options, format(channels_last));
  const auto labels = at::empty({4 * n}, options.dtype(at::kLong));
  Rotate4Params p = make_params(x, channels_last);
  p.images = n;
  p.image_stride = x.stride(0);
  p.in = x.const_data_ptr();
  p.out = y.data_ptr();
  p.labels = labels.data_ptr<int64_t>();
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(x)) {
    const CudaScope scope(x);
    launch_rotate4_forward_cuda(cuda_params(p), scope.stream());
    return {y, labels};
  }
#endif
  require_cpu(x, "images");
  SSLFAST_CPU_DISPATCH(launch_rotate4_forward_cpu, p);
  return {y, labels};
}

at::Tensor rotate4_backward(const at::Tensor& grad) {
  check_images(grad, "grad");
  check_floating(grad, "grad");
  TORCH_CHECK_VALUE(grad.size(0) % 4 == 0, "grad: expected a multiple of four images, got shape ", grad.sizes());
  if (grad.numel() == 0) return grad.narrow(0, 0, grad.size(0) / 4).clone();
  const bool channels_last = is_channels_last(grad);
  const at::Tensor g = grad.contiguous(format(channels_last));
  const auto dx = at::empty({g.size(0) / 4, g.size(1), g.size(2), g.size(3)}, g.options().requires_grad(false),
                            format(channels_last));
  Rotate4Params p = make_params(g, channels_last);
  p.images = dx.size(0);
  p.in = g.const_data_ptr();
  p.out = dx.data_ptr();
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(g)) {
    const CudaScope scope(g);
    launch_rotate4_backward_cuda(cuda_params(p), scope.stream());
    return dx;
  }
#endif
  require_cpu(g, "grad");
  SSLFAST_CPU_DISPATCH(launch_rotate4_backward_cpu, p);
  return dx;
}

}  // namespace sslfast
