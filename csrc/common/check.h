// Argument checks of the tensor side: ValueError or TypeError that names the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace sslfast {

/// A tensor whose memory holds its values: kernels read pointers. Not sparse or nested, not one that torch negates or
/// fills with zeros only when it is read, and not one that a transform of torch.func has wrapped.
inline void check_dense(const at::Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.defined(), name, ": expected a tensor, got none");
  TORCH_CHECK_TYPE(!t.is_nested() && t.layout() == at::kStrided, name, ": expected a dense tensor, got a ",
                   t.is_nested() ? "nested" : "sparse", " one");
  TORCH_CHECK_VALUE(t.is_cpu() || t.is_cuda(), name, ": expected a tensor on cpu or cuda, got one on ", t.device());
  TORCH_CHECK_TYPE(!t.is_neg() && !t._is_zerotensor() && t.has_storage(), name,
                   ": expected a tensor with memory of its own, got one that torch computes when it is read; clone it");
}

inline void check_dim(const at::Tensor& t, int64_t dim, const char* name) {
  check_dense(t, name);
  TORCH_CHECK_VALUE(t.dim() == dim, name, ": expected a ", dim, "-D tensor, got shape ", t.sizes());
}

inline void check_floating(const at::Tensor& t, const char* name) {
  check_dense(t, name);
  const auto dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   ": expected float32, bfloat16, float16 or float64, got ", dtype);
}

inline void check_device(const at::Tensor& t, const char* name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected a tensor on ", like.device(), ", got one on ",
                    t.device());
}

inline void check_same(const at::Tensor& a, const at::Tensor& b, const char* name_a, const char* name_b) {
  check_dense(a, name_a);
  check_dense(b, name_b);
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), name_b, ": expected the shape of ", name_a, ", ", a.sizes(), ", got ",
                    b.sizes());
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), name_b, ": expected the dtype of ", name_a, ", ",
                   a.scalar_type(), ", got ", b.scalar_type());
  check_device(b, name_b, a);
}

/// A non-empty matrix with the columns, dtype and device of `like`.
inline void check_rows(const at::Tensor& t, const char* name, const at::Tensor& like) {
  check_dim(t, 2, name);
  check_floating(t, name);
  TORCH_CHECK_VALUE(t.numel() > 0, name, ": expected at least one row and one column, got shape ", t.sizes());
  TORCH_CHECK_VALUE(t.size(1) == like.size(1), name, ": expected ", like.size(1), " columns, got shape ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected ", like.scalar_type(), ", got ",
                   t.scalar_type());
  check_device(t, name, like);
}

/// A floating-point tensor of one element.
inline void check_scalar(const at::Tensor& t, const char* name) {
  check_floating(t, name);
  TORCH_CHECK_VALUE(t.numel() == 1, name, ": expected one element, got shape ", t.sizes());
}

/// The value of a scalar on the CPU, finite in the arithmetic of data of `dtype`.
inline double finite_scalar(const at::Tensor& t, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.is_cpu(), name, ": expected a tensor on cpu, got one on ", t.device());
  const double value = t.item<double>();
  TORCH_CHECK_VALUE(std::isfinite(dtype == at::kDouble ? value : static_cast<float>(value)), name,
                    ": expected a finite number, got ", value);
  return value;
}

}  // namespace sslfast
