// The ProductType of a tensor, with torch's switch for tf32 (torch.backends.cuda.matmul).
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include "csrc/common/product_type.h"

namespace sslfast {

inline ProductType product_type_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return ProductType::bfloat16;
    case at::kHalf:
      return ProductType::float16;
    case at::kFloat: {
      const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
      return precision == at::Float32Precision::TF32 ? ProductType::float32_as_tf32 : ProductType::float32;
    }
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, bfloat16 or float16 on CUDA, got ", t.scalar_type());
  }
}

}  // namespace sslfast
