// Tiles of products between the rows of packed matrices, as the losses' CUDA kernels share them: blocks of eight warps,
// operands in slots (csrc/common/mma.cuh) that cp.async fills, sums of exponentials to base 2.
//
// A packed matrix has rows of whole slots (128 bytes), padded with zeros, and a number of rows that tiles divide.
#pragma once

#include "csrc/common/convert.cuh"
#include "csrc/common/cp_async.cuh"
#include "csrc/common/memory.cuh"
#include "csrc/common/mma.cuh"
#include "csrc/common/product_type.h"
#include "csrc/common/warp.cuh"

namespace sslfast {

inline constexpr int kTileThreads = 256;
inline constexpr double kLog2EDouble = 1.4426950408889634, kLn2Double = 0.6931471805599453;
inline constexpr float kLog2E = kLog2EDouble, kLn2 = kLn2Double;
inline constexpr float kMasked = -1e30f;  // a logit that counts for nothing

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

constexpr int element_bytes(ProductType type) {
  return type == ProductType::bfloat16 || type == ProductType::float16 ? 2 : 4;
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

/// Starts copying chunk `chunk` of kRows rows of packed data, `chunks` slots wide, from row `first` into a slot: 32
/// rows at a time, 128 bytes of each.
template <int kRows>
__device__ __forceinline__ void load_slot(unsigned char* slot, const void* data, int chunks, int first, int chunk) {
  static_assert(kTileThreads == 32 * 8);
  const int row = threadIdx.x / 8;
  const int64_t row_bytes = int64_t{chunks} * kSlotRowBytes;
  const char* source =
      static_cast<const char*>(data) + (first + row) * row_bytes + chunk * kSlotRowBytes + threadIdx.x % 8 * 16;
  unsigned char* target = slot + chunk_offset(row, threadIdx.x % 8);
#pragma unroll
  for (int rows = 0; rows < kRows; rows += 32) cp_async_16(target + rows * kSlotRowBytes, source + rows * row_bytes);
}

/// acc += A·Bᵀ over the columns of one chunk, for kM·16 rows of slot a from `row` and kN·8 rows of slot b from
/// `column`.
template <typename Math, int kM, int kN>
__device__ __forceinline__ void multiply_chunk(float (&acc)[kM][kN][4], const unsigned char* a, int row,
                                               const unsigned char* b, int column) {
  const int a_start = a_offset(row), b_start = b_offset(column);
#pragma unroll(kM* kN >= 16 ? 2 : 1)  // more costs registers
  for (int step = 0; step < kSlotSteps; ++step) {
    uint32_t a_fragment[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix_x4(a_fragment[m], a + 16 * m * kSlotRowBytes + (a_start ^ step_bits(step)));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b_fragment[2][2];
      load_b(b_fragment, b + 8 * n * kSlotRowBytes + (b_start ^ step_bits(step)));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Math::product(acc[m][n], a_fragment[m], b_fragment[0]);
        Math::product(acc[m][n + 1], a_fragment[m], b_fragment[1]);
      }
    }
  }
}

/// sum += W·Z for 32 rows of W, rows × kColumns in slots of kRows rows, and 8·kWidth columns from `column` of one chunk
/// of Z, whose rows are W's columns. a_start: a_offset() of W's first row.
template <typename Math, int kRows, int kColumns, int kWidth>
__device__ __forceinline__ void multiply_weights(float (&sum)[2][kWidth][4], const unsigned char* w_slots, int a_start,
                                                 const unsigned char* z_slot, int column) {
  using T = typename Math::Element;
  constexpr int kLoad = sizeof(T) == 2 ? 2 : 1;    // fragments that load_b_rows() gives
  constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;  // columns of W of one product
#pragma unroll
  for (int k = 0; k < kColumns / kDepth; ++k) {
    const unsigned char* w_slot = w_slots + k / kSlotSteps * kRows * kSlotRowBytes;
    uint32_t a_fragment[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
      ldmatrix_x4(a_fragment[m], w_slot + 16 * m * kSlotRowBytes + (a_start ^ step_bits(k % kSlotSteps)));
#pragma unroll
    for (int n = 0; n < kWidth; n += kLoad) {
      uint32_t b_fragment[kLoad][2];
      load_b_rows(b_fragment, z_slot, k * kDepth, column + 8 * n);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < kLoad; ++i) Math::product(sum[m][n + i], a_fragment[m], b_fragment[i]);
    }
  }
}

/// Where element i of the accumulator of one m16n8 tile lies.
__device__ __forceinline__ int tile_row(int i) { return threadIdx.x % 32 / 4 + 8 * (i / 2); }
__device__ __forceinline__ int tile_column(int i) { return 2 * (threadIdx.x % 4) + i % 2; }

/// Σ 2^(x − max) · … as a running pair: the sum is sum · 2^max.
struct MaxSum {
  float max, sum;
};

__device__ __forceinline__ MaxSum merge(MaxSum a, MaxSum b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * fast_exp2(a.max - max) + b.sum * fast_exp2(b.max - max)};
}

}  // namespace sslfast
