// How the CPU kernels of losses over pairs cut their matrices (csrc/common/panel_matrix.h) into blocks: by the problem
// and the machine, never by the number of threads, so that results do not depend on that.
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "csrc/common/cpu_dispatch.h"

namespace sslfast {

/// Rows and columns of packed matrices are padded with zeros to multiples of this.
inline constexpr int64_t kMatrixPad = 32;

constexpr int64_t padded(int64_t n) { return (n + kMatrixPad - 1) / kMatrixPad * kMatrixPad; }
constexpr int64_t count_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

/// Whether products are made of bfloat16 terms (csrc/common/bf16_matrix.h), three of which pay where tiles are full.
inline bool use_bf16_products(c10::ScalarType dtype, int64_t rows, int64_t keys) {
  const auto capability = cpu_capability();
  if (dtype == c10::ScalarType::BFloat16) return capability >= CpuCapability::Avx512Bf16;
  return dtype != c10::ScalarType::Double && rows >= 32 && keys >= 64 && capability >= CpuCapability::Amx;
}

constexpr int64_t largest_matrix_block(bool bf16_products) { return bf16_products ? 256 : 128; }

/// Blocks of `padded_count` rows, as large as leaves eight of them, so that threads find work.
inline int64_t matrix_block(int64_t padded_count, bool bf16_products) {
  return std::clamp(padded(padded_count / 8), kMatrixPad, largest_matrix_block(bf16_products));
}

/// The bytes of a tile of row_block × key_block elements, and of what Engine::prepare makes of it.
constexpr int64_t matrix_tile_bytes(int64_t row_block, int64_t key_block, bool bf16_products, int64_t acc_bytes) {
  return row_block * key_block * (bf16_products ? 12 : acc_bytes);
}

}  // namespace sslfast
