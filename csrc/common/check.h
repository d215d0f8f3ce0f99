// Argument checks of the tensor side: ValueError or TypeError that names the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace sslfast {

inline void check_dim(const at::Tensor& t, int64_t dim, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == dim, name, ": expected a ", dim, "-D tensor, got shape ", t.sizes());
}

inline void check_floating(const at::Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), name, ": expected a floating-point tensor, got ",
                   t.scalar_type());
}

inline void check_same(const at::Tensor& a, const at::Tensor& b, const char* name_a, const char* name_b) {
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), name_b, ": expected the shape of ", name_a, ", ", a.sizes(), ", got ",
                    b.sizes());
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), name_b, ": expected the dtype of ", name_a, ", ",
                   a.scalar_type(), ", got ", b.scalar_type());
  TORCH_CHECK_VALUE(a.device() == b.device(), name_b, ": expected the device of ", name_a, ", ", a.device(), ", got ",
                    b.device());
}

/// A non-empty matrix with the columns, dtype and device of `like`.
inline void check_rows(const at::Tensor& t, const char* name, const at::Tensor& like) {
  check_dim(t, 2, name);
  check_floating(t, name);
  TORCH_CHECK_VALUE(t.numel() > 0, name, ": expected at least one row and one column, got shape ", t.sizes());
  TORCH_CHECK_VALUE(t.size(1) == like.size(1), name, ": expected ", like.size(1), " columns, got shape ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected ", like.scalar_type(), ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected a tensor on ", like.device(), ", got one on ",
                    t.device());
}

}  // namespace sslfast
