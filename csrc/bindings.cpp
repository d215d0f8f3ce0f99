// The one pybind11 file: every C++ function that Python sees, a line each. The ops are wrapped in sslfast/ops/<op>.py.
#include <build_info.h>
#include <torch/extension.h>

#include "csrc/common/cpu_dispatch.h"
#include "csrc/ops/augment.h"
#include "csrc/ops/info_nce.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace sslfast;
  // clang-format off
  m.def("build_info",                 &build_info);
  m.def("cpu_capability",             &cpu_capability_name);
  m.def("set_cpu_capability",         &set_cpu_capability);
  m.def("available_cpu_capabilities", &available_cpu_capabilities);
  m.def("augment_draw",               &augment_draw);
  m.def("augment_forward",            &augment_forward);
  m.def("philox4x32",                 &philox4x32_words);
  m.def("info_nce_forward",           &info_nce_forward);
  m.def("info_nce_backward",          &info_nce_backward);
  // clang-format on
}
