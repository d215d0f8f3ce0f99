// The one pybind11 file: every C++ function that Python sees, a line each. The ops are wrapped in sslfast/ops/<op>.py.
#include <build_info.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/extension.h>

#include "csrc/common/cpu_dispatch.h"
#include "csrc/ops/augment.h"
#include "csrc/ops/diffusion.h"
#include "csrc/ops/group_norm_silu.h"
#include "csrc/ops/info_nce.h"
#include "csrc/ops/rotate4.h"
#include "csrc/ops/sigmoid_loss.h"
#include "csrc/ops/similarity_lse.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = SSLFAST_TORCH_VERSION;
  info["compiler"] = SSLFAST_COMPILER;
#if defined(SSLFAST_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_why_not"] = SSLFAST_CUDA_WHY_NOT;
  return info;
}

/// Which way a call with these arguments takes; sslfast/ops/_route.py explains them.
enum Route { kKernel, kDispatcher, kReference, kTransform };

bool has_own_memory(const at::Tensor& t) {
  return t.has_storage() && !t.is_neg() && !t._is_zerotensor() && !t.is_nested() && t.layout() == at::kStrided;
}

Route route(const pybind11::args& arguments) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return kTransform;
  Route found =
      c10::impl::TorchDispatchModeTLS::stack_len() > 0 || torch::jit::tracer::isTracing() ? kDispatcher : kKernel;
  for (const auto& argument : arguments) {
    if (!THPVariable_Check(argument.ptr())) continue;
    const at::Tensor& t = THPVariable_Unpack(argument.ptr());
    if (t._fw_grad(/*level=*/0).defined()) return kReference;
    if (!THPVariable_CheckExact(argument.ptr()) || !has_own_memory(t)) found = kDispatcher;
  }
  return found;
}

/// TORCH_CHECK_VALUE and TORCH_CHECK_TYPE become ValueError and TypeError; before torch 2.14 nobody else does that
/// here.
void translate_torch_errors(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const c10::ValueError& e) {
    pybind11::set_error(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    pybind11::set_error(PyExc_TypeError, e.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace sslfast;
  pybind11::register_local_exception_translator(&translate_torch_errors);
  // clang-format off
  m.def("build_info",                 &build_info);
  m.def("cpu_capability",             &cpu_capability_name);
  m.def("set_cpu_capability",         &set_cpu_capability);
  m.def("available_cpu_capabilities", &available_cpu_capabilities);
  m.def("augment_draw",               &augment_draw);
  m.def("augment_forward",            &augment_forward);
  m.def("route",                      [](const pybind11::args& arguments) { return static_cast<int>(route(arguments)); });
  m.def("philox4x32",                 &philox4x32_words);
  m.def("diffusion_step",             &diffusion_step);
  m.def("diffusion_q_sample",         &diffusion_q_sample);
  m.def("diffusion_loss_forward",     &diffusion_loss_forward);
  m.def("diffusion_loss_backward",    &diffusion_loss_backward);
  m.def("diffusion_noise",            &diffusion_noise);
  m.def("ddpm_coefficients",          &ddpm_coefficients);
  m.def("ddim_coefficients",          &ddim_coefficients);
  m.def("dpm_coefficients",           &dpm_coefficients);
  m.def("group_norm_silu_forward",    &group_norm_silu_forward);
  m.def("group_norm_silu_backward",   &group_norm_silu_backward);
  m.def("info_nce_forward",           &info_nce_forward);
  m.def("info_nce_backward",          &info_nce_backward);
  m.def("nt_xent",                    &nt_xent);
  m.def("rotate4_forward",            &rotate4_forward);
  m.def("rotate4_backward",           &rotate4_backward);
  m.def("sigmoid_loss_forward",       &sigmoid_loss_forward);
  m.def("similarity_lse_forward",     &similarity_lse_forward);
  m.def("similarity_lse_backward",    &similarity_lse_backward);
  // clang-format on
}
