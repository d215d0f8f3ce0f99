// Matrices as the losses' CUDA kernels multiply them, of bfloat16 or float16 operands: 128 rows after the other, of
// these 128 bytes of each row after the other, in the order of a slot (csrc/common/mma.cuh). So a slot is copied as it
// is. Rows and columns are padded with zeros.
//
// float32 data: x = 2^e·(high + low), both float16, e one for the matrix or the row. With the largest x·2^-e about 2⁷
// the sum is right to 2⁻²³ of x, or 2⁻³² of the largest; products high·high + high·low + low·high lack no more than
// that.
#pragma once

#include "csrc/common/convert.cuh"
#include "csrc/common/memory.cuh"
#include "csrc/common/mma.cuh"
#include "csrc/common/product_type.h"
#include "csrc/common/warp.cuh"

namespace sslfast {

inline constexpr int kPackedRows = 128;  // packed rows are padded to a multiple of it

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/// Bytes that an element takes in a packed matrix.
constexpr int operand_bytes(ProductType type) { return type == ProductType::float32 ? 4 : 2; }

struct PackedMatrix {
  int count, padded, chunks, padded_dim;  // rows, rows with padding, slots of a row, columns with padding
  void* data;
};

inline PackedMatrix packed_matrix(ProductType type, int64_t count, int64_t dim) {
  const int64_t chunks = divide_up(dim * operand_bytes(type), kSlotRowBytes);
  return {static_cast<int>(count), static_cast<int>(round_up(count, kPackedRows)), static_cast<int>(chunks),
          static_cast<int>(chunks * kSlotRowBytes / operand_bytes(type)), nullptr};
}

inline int64_t packed_bytes(const PackedMatrix& m) { return int64_t{m.padded} * m.chunks * kSlotRowBytes; }

/// Where chunk `chunk` of 128 rows begins.
__host__ __device__ __forceinline__ int64_t packed_offset(const PackedMatrix& m, int row_block, int chunk) {
  return (int64_t{row_block} * m.chunks + chunk) * (kPackedRows * kSlotRowBytes);
}

/// Hands out parts of the workspace, 256-byte aligned; only adds them up if there is none yet.
struct Workspace {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return part;
  }
};

inline bool rows_are_aligned(const void* a, const void* b, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | static_cast<uintptr_t>(row_bytes)) % 16 ==
         0;
}

/// Elements d… of a row of `dim`, zeros beyond its end. If aligned, rows are multiples of 16 bytes.
template <typename T>
__device__ __forceinline__ Pack<T> load_row(const T* row, int d, int dim, bool aligned) {
  if (aligned && d < dim) return load_pack(row + d);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) pack.at[i] = d + i < dim ? load_global(row + d + i) : from_float<T>(0.0f);
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_row(T* row, int d, int dim, bool aligned, const Pack<T>& pack) {
  if (aligned && d < dim) return store_pack(row + d, pack);
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i)
    if (d + i < dim) store_global(row + d + i, pack.at[i]);
}

/// Eight elements of a row as load_row() has them.
template <typename T>
__device__ __forceinline__ void load_eight(float (&x)[8], const T* row, int d, int dim, bool aligned) {
#pragma unroll
  for (int i = 0; i < 8; i += Pack<T>::kSize) {
    const Pack<T> pack = load_row(row, d + i, dim, aligned);
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) x[i + k] = to_float(pack.at[k]);
  }
}

/// Writes columns d…d+7 of row `row`.
template <typename Math>
__device__ __forceinline__ void store_packed(const PackedMatrix& m, int row, int d, const float (&x)[8]) {
  using T = typename Math::Operand;
  const int chunk = d / kSlotColumns<Math>, piece = d % kSlotColumns<Math> / 8;
  char* slot = static_cast<char*>(m.data) + packed_offset(m, row / kPackedRows, chunk);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) pack.at[i] = from_float<T>(x[i]);
  store_pack(reinterpret_cast<T*>(slot + chunk_offset(row % kPackedRows, piece)), pack);
  if constexpr (Math::kParts == 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float high = to_float(pack.at[i]);
      pack.at[i] = from_float<T>(fabsf(high) < HUGE_VALF ? x[i] - high : 0.0f);
    }
    store_pack(reinterpret_cast<T*>(slot + chunk_offset(row % kPackedRows, piece + 4)), pack);
  }
}

}  // namespace sslfast
