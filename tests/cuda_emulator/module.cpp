// sslfast_emulated: the ops of sslfast._C with their CUDA kernels run by the emulator, on CPU tensors; and what tests
// ask of the emulator itself.
#include <c10/core/CPUAllocator.h>
#include <torch/extension.h>

#include "csrc/ops/augment.h"
#include "csrc/ops/diffusion.h"
#include "csrc/ops/group_norm_silu.h"
#include "csrc/ops/info_nce.h"
#include "csrc/ops/rotate4.h"
#include "csrc/ops/sigmoid_loss.h"
#include "csrc/ops/similarity_lse.h"
#include "tests/cuda_emulator/emulator.h"
#include "tests/cuda_emulator/faulty_kernels.h"

namespace {

struct DeviceAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* p = cuda_emulator::device_allocate(bytes);
    return {p, p, &cuda_emulator::device_free, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &cuda_emulator::device_free; }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }
};

/// While it lives, every new CPU tensor is device memory of the emulator: between unmapped pages and full of NaN.
class DeviceScope {
 public:
  DeviceScope() : previous_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(&allocator_); }
  ~DeviceScope() { c10::SetCPUAllocator(previous_); }

 private:
  inline static DeviceAllocator allocator_;
  c10::Allocator* previous_;
};

/// A copy in device memory with the strides of t and its place within 16 bytes; t itself if that is where it is.
at::Tensor to_device(const at::Tensor& t) {
  if (cuda_emulator::is_device_memory(t.data_ptr())) return t;
  int64_t elements = t.numel() == 0 ? 0 : 1;
  for (int64_t d = 0; d < t.dim() && elements > 0; ++d) {
    if (t.stride(d) == 0 && t.size(d) > 1) return t.clone(at::MemoryFormat::Contiguous);  // it overlaps itself
    elements += (t.size(d) - 1) * t.stride(d);
  }
  const int64_t shift = t.storage_offset() % (16 / t.element_size());
  const at::Tensor copy = at::empty({shift + elements}, t.options()).as_strided(t.sizes(), t.strides(), shift);
  copy.copy_(t);
  return copy;
}
std::vector<at::Tensor> to_device(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> copies;
  for (const at::Tensor& t : tensors) copies.push_back(to_device(t));
  return copies;
}
std::optional<at::Tensor> to_device(const std::optional<at::Tensor>& t) {
  return t ? std::optional<at::Tensor>(to_device(*t)) : std::nullopt;
}
template <typename T>
const T& to_device(const T& value) {
  return value;
}

/// fn with its tensors in device memory.
template <typename Result, typename... Args>
auto on_device(Result (*fn)(Args...)) {
  return [fn](const std::decay_t<Args>&... args) -> Result {
    const DeviceScope scope;
    return fn(to_device(args)...);
  };
}

pybind11::dict counters() {
  pybind11::dict result;
  for (const auto& [name, c] : cuda_emulator::counters()) {
    pybind11::dict d;
    d["launches"] = c.launches;
    d["read_bytes"] = c.read_bytes;
    d["written_bytes"] = c.written_bytes;
    d["mma_flops"] = c.mma_flops;
    d["exponentials"] = c.exponentials;
    d["barriers"] = c.barriers;
    d["ldmatrix_conflicts"] = c.ldmatrix_conflicts;
    result[name.c_str()] = d;
  }
  return result;
}

void set_order(const std::string& name) {
  using cuda_emulator::Order;
  cuda_emulator::set_order(name == "ascending"    ? Order::ascending
                           : name == "descending" ? Order::descending
                                                  : Order::shuffled);
}

}  // namespace

PYBIND11_MODULE(sslfast_emulated, m) {
  m.def("augment_forward", on_device(&sslfast::augment_forward));
  m.def("diffusion_step", on_device(&sslfast::diffusion_step));
  m.def("diffusion_q_sample", on_device(&sslfast::diffusion_q_sample));
  m.def("diffusion_loss_forward", on_device(&sslfast::diffusion_loss_forward));
  m.def("diffusion_loss_backward", on_device(&sslfast::diffusion_loss_backward));
  m.def("diffusion_noise", on_device(&sslfast::diffusion_noise));
  m.def("group_norm_silu_forward", on_device(&sslfast::group_norm_silu_forward));
  m.def("group_norm_silu_backward", on_device(&sslfast::group_norm_silu_backward));
  m.def("info_nce_forward", on_device(&sslfast::info_nce_forward));
  m.def("info_nce_backward", on_device(&sslfast::info_nce_backward));
  m.def("rotate4_forward", on_device(&sslfast::rotate4_forward));
  m.def("rotate4_backward", on_device(&sslfast::rotate4_backward));
  m.def("sigmoid_loss_forward", on_device(&sslfast::sigmoid_loss_forward));
  m.def("similarity_lse_forward", on_device(&sslfast::similarity_lse_forward));
  m.def("similarity_lse_backward", on_device(&sslfast::similarity_lse_backward));
  m.def("set_order", &set_order);
  m.def("counters", &counters);
  m.def("reset_counters", &cuda_emulator::reset_counters);
  m.def("run_faulty_kernel", [](const std::string& name, const at::Tensor& in, at::Tensor out) {
    sslfast::run_faulty_kernel(name, in.const_data_ptr<float>(), out.data_ptr<float>());
  });
  m.def("run_feature_kernel", [](const std::string& name, const at::Tensor& in, at::Tensor out) {
    sslfast::run_feature_kernel(name, in.const_data_ptr<float>(), out.data_ptr<float>());
  });
  m.def("run_corners", &cuda_emulator::run_corners);
  m.def("run_all_blocks", &cuda_emulator::run_all_blocks);
  m.def("device_tensor", [](const std::vector<int64_t>& shape, at::ScalarType dtype) {
    const DeviceScope scope;
    return at::empty(shape, dtype);
  });
  m.def("matrix_product", [](const std::string& math, const at::Tensor& a, const at::Tensor& b, bool b_by_rows) {
    const DeviceScope scope;
    const auto a_copy = to_device(a), b_copy = to_device(b), c = at::empty({16, 16}, at::kFloat);
    sslfast::run_matrix_product(math, a_copy.const_data_ptr(), b_copy.const_data_ptr(), b_by_rows, c.data_ptr<float>());
    return c;
  });
}
