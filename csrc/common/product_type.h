// What CUDA kernels multiply: the type of the data and, for float32, how accurate products are (csrc/common/mma.cuh).
#pragma once

namespace sslfast {

enum class ProductType { bfloat16, float16, float32, float32_as_tf32 };

}  // namespace sslfast
