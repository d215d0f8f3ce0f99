// Kernels for tests/test_cuda_emulator.py: correct ones, ones with a planted fault, and products of single tiles.
#pragma once

#include <string>

namespace sslfast {

/// name: "correct" or the fault. One block of 64 threads; in and out: 64 floats of device memory. Correct, every kernel
/// leaves out[i] = in[63 − i].
void run_faulty_kernel(const std::string& name, const float* in, float* out);

/// name: a feature that kernels may use, or a fault in its use. One block of 128 threads; in: 64 floats, out: 128.
void run_feature_kernel(const std::string& name, const float* in, float* out);

/// c (16, 16) = a · b by one warp, with the loads of csrc/common/mma.cuh. math: "bfloat16" or "float16".
/// a is (16, columns of a slot); b (16, columns of a slot), multiplied by its transpose, or, by rows, (16,
/// 16), used as it is.
void run_matrix_product(const std::string& math, const void* a, const void* b, bool b_by_rows, float* c);

}  // namespace sslfast
