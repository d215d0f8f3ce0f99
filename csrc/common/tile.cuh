// Tiles of products between the rows of packed matrices, as the losses' CUDA kernels share them: blocks of eight warps,
// operands in slots (csrc/common/mma.cuh) that cp.async fills, sums of exponentials to base 2.
#pragma once

#include "csrc/common/cp_async.cuh"
#include "csrc/common/packed_matrix.cuh"
#include "csrc/common/wgmma.cuh"

namespace sslfast {

inline constexpr int kTileThreads = 256;
inline constexpr int kTileRows = 128;
inline constexpr double kLog2EDouble = 1.4426950408889634, kLn2Double = 0.6931471805599453;
inline constexpr float kLog2E = kLog2EDouble, kLn2 = kLn2Double;
inline constexpr float kMasked = -1e30f;  // a logit that counts for nothing

/// Starts copying chunk `chunk` of packed rows kRows·tile… into a slot.
template <int kRows>
__device__ __forceinline__ void load_slot(unsigned char* slot, const PackedMatrix& m, int tile, int chunk) {
  static_assert(kPackedRows % kRows == 0);
  constexpr int kTiles = kPackedRows / kRows;
  const char* source = static_cast<const char*>(m.data) + packed_offset(m, tile / kTiles, chunk) +
                       tile % kTiles * (kRows * kSlotRowBytes) + 16 * threadIdx.x;
  unsigned char* target = slot + 16 * threadIdx.x;
#pragma unroll
  for (int at = 0; at < kRows * kSlotRowBytes; at += 16 * kTileThreads) cp_async_16(target + at, source + at);
}

// A tile of products has kTileRows rows, 16 of each warp. Its accumulators are acc[n][i]: row warp_row() + tile_row(i),
// column 8·n + tile_column(i).

/// Where this warp's rows begin in a tile.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * 16; }

template <int kN>
__device__ __forceinline__ void clear(float (&acc)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
}

/// The products of a chunk: of step `of_a` of A and `of_b` of B.
template <typename Math>
struct ChunkProducts {
  static constexpr int kSteps = kSlotSteps / Math::kParts;  // of the high halves, or of all
  static constexpr int kCount = (2 * Math::kParts - 1) * kSteps;
  /// Product i; low·high, high·low and high·high follow each other.
  __device__ static __forceinline__ int of_a(int i) {
    return i % kSteps + (Math::kParts == 2 && i < kSteps ? kSteps : 0);
  }
  __device__ static __forceinline__ int of_b(int i) {
    return i % kSteps + (i >= kSteps && i < 2 * kSteps && Math::kParts == 2 ? kSteps : 0);
  }
};

/// acc += A·Bᵀ over the columns of one chunk, for 8·kN rows of slot b. Between begin_products() and end_products().
template <typename Math, int kN>
__device__ __forceinline__ void multiply_chunk(float (&acc)[kN][4], const unsigned char* a, const unsigned char* b) {
  using Products = ChunkProducts<Math>;
#if SSLFAST_WGMMA
  const uint64_t a_at = slot_descriptor(a + threadIdx.x / 128 * 64 * kSlotRowBytes), b_at = slot_descriptor(b);
#pragma unroll
  for (int i = 0; i < Products::kCount; ++i)
    wgmma_rows<Math>(acc, a_at + 2 * Products::of_a(i), b_at + 2 * Products::of_b(i));
#else
  const int a_start = a_offset(warp_row()), b_start = b_offset(0);
#pragma unroll(Math::kParts == 1 ? 2 : 1)  // more costs registers
  for (int i = 0; i < Products::kCount; ++i) {
    uint32_t a_fragment[4];
    ldmatrix_x4(a_fragment, a + (a_start ^ step_bits(Products::of_a(i))));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b_fragment[2][2];
      load_b(b_fragment, b + 8 * n * kSlotRowBytes + (b_start ^ step_bits(Products::of_b(i))));
      Math::product(acc[n], a_fragment, b_fragment[0]);
      Math::product(acc[n + 1], a_fragment, b_fragment[1]);
    }
  }
#endif
}

/// Weights of a warp's 16 rows and 8·kN columns as operands.
template <typename Math, int kN>
struct Weights {
  uint32_t at[Math::kParts][kN / 2][4];

  /// Element i and i + 1 (i = 0 or 2) of tile n.
  __device__ __forceinline__ void set(int n, int i, float first, float second) {
    using T = typename Math::Operand;
    T pair[2] = {from_float<T>(first), from_float<T>(second)};
    memcpy(&at[0][n / 2][n % 2 * 2 + i / 2], pair, sizeof(pair));
    if constexpr (Math::kParts == 2) {
      pair[0] = from_float<T>(first - to_float(pair[0]));
      pair[1] = from_float<T>(second - to_float(pair[1]));
      memcpy(&at[1][n / 2][n % 2 * 2 + i / 2], pair, sizeof(pair));
    }
  }
};

/// sum += W·Z: 16 rows of W a warp; one chunk of columns of Z, whose rows are W's columns. Between begin_products() and
/// end_products().
template <typename Math, int kN, int kWidth>
__device__ __forceinline__ void multiply_weights(float (&sum)[kWidth][4], const Weights<Math, kN>& w,
                                                 const unsigned char* z_slot) {
  static_assert(kWidth * 8 == kSlotColumns<Math>);
#pragma unroll
  for (int part = 0; part < 2 * Math::kParts - 1; ++part) {  // low·high, high·low, high·high
    const auto& of_w = w.at[Math::kParts == 2 && part == 0];
    const int first = part == 1 ? kSlotColumns<Math> : 0;  // of Z
#if SSLFAST_WGMMA
    const uint64_t z_at = slot_descriptor(z_slot + 2 * first);
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) wgmma_weights<Math>(sum, of_w[k], z_at + k * kSlotRowBytes);
#else
#pragma unroll
    for (int k = 0; k < kN / 2; ++k)
#pragma unroll
      for (int n = 0; n < kWidth; n += 2) {
        uint32_t b_fragment[2][2];
        load_b_rows(b_fragment, z_slot, 16 * k, first + 8 * n);
        Math::product(sum[n], of_w[k], b_fragment[0]);
        Math::product(sum[n + 1], of_w[k], b_fragment[1]);
      }
#endif
  }
}

/// Where element i of the accumulator of one m16n8 tile lies.
__device__ __forceinline__ int tile_row(int i) { return threadIdx.x % 32 / 4 + 8 * (i / 2); }
__device__ __forceinline__ int tile_column(int i) { return 2 * (threadIdx.x % 4) + i % 2; }

/// Adds c up over the 16 rows of a warp: lanes 4·g… get the sums of columns 16·g + … in c[0] and c[1].
__device__ __forceinline__ void sum_columns(float (&c)[16][2]) {
#pragma unroll
  for (int half = 8, lanes = 16; half >= 2; half /= 2, lanes /= 2) {
    const bool upper = threadIdx.x & lanes;
#pragma unroll
    for (int n = 0; n < half; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, upper ? c[n][e] : c[n + half][e], lanes);
        c[n][e] = (upper ? c[n + half][e] : c[n][e]) + other;
      }
  }
}

/// Σ 2^(x − max) · … as a running pair: the sum is sum · 2^max.
struct MaxSum {
  float max, sum;
};

__device__ __forceinline__ MaxSum merge(MaxSum a, MaxSum b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * fast_exp2(a.max - max) + b.sum * fast_exp2(b.max - max)};
}

}  // namespace sslfast
