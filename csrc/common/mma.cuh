// Tensor cores through mma.sync (sm_80). Operands are bfloat16 or float16; those of float32 data are float16 numbers
// that add up to it (csrc/common/packed_matrix.cuh).
//
// Shared tiles. A "slot" is a matrix of any number of rows of 128 bytes: 64 operands. Rows are cut into eight chunks of
// 16 bytes, and chunk c of row r is stored at place c ^ (r % 8), so that ldmatrix, which reads eight consecutive rows
// at one chunk, touches every bank once. It is also the order that wgmma (csrc/common/wgmma.cuh) calls a swizzle of 128
// bytes; for that, slots begin at multiples of 1024 bytes.
//
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "csrc/common/launch.cuh"

namespace sslfast {

inline constexpr int kSlotRowBytes = 128;
inline constexpr int kSlotSteps = 4;  // of 16 operands, the depth of a product

/// Byte offset of a chunk of 16 bytes in a slot.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kSlotRowBytes + ((chunk ^ (row & 7)) << 4);
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const unsigned char* row) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::ldmatrix_x4(r, row, false);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const unsigned char* row) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::ldmatrix_x4(r, row, true);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// Step `step` of a row lies at offset ^ step_bits(step), where offset is that of step 0: the swizzle is an exclusive
// or.
__device__ __forceinline__ int step_bits(int step) { return step << 5; }

/// Where this lane reads step 0 of a fragment of A, rows row…row+15 (row: a multiple of 8).
__device__ __forceinline__ int a_offset(int row) {
  const int lane = threadIdx.x % 32;
  return chunk_offset(row + lane % 16, lane / 16);
}

/// The same for two fragments of B, whose columns row…row+15 are rows of the slot (C = A·Bᵀ).
__device__ __forceinline__ int b_offset(int row) {
  const int lane = threadIdx.x % 32;
  return chunk_offset(row + lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const unsigned char* chunk) {
  uint32_t r[4];
  ldmatrix_x4(r, chunk);
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

/// Two fragments of B, for columns column…column+15, where B's rows row…row+15 are rows of the slot (C = A·B).
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[2][2], const unsigned char* slot, int row, int column) {
  const int lane = threadIdx.x % 32;
  uint32_t r[4];
  ldmatrix_x4_transposed(r, slot + chunk_offset(row + lane % 16, column / 8 + lane / 16));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

#if !defined(SSLFAST_CUDA_EMULATED)
#define SSLFAST_MMA(shape_and_types)                                                \
  asm volatile("mma.sync.aligned." shape_and_types                                  \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// What a kernel computes its products with. Element: the type of the data. Operand: the type that is multiplied, kParts
// of which add up to an element. product() adds a·b to d, which is float32.

struct BFloat16Math {
  using Element = __nv_bfloat16;
  using Operand = __nv_bfloat16;
  static constexpr int kParts = 1;
  __device__ static __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(SSLFAST_CUDA_EMULATED)
    cuda_emulator::mma_m16n8k16_bf16(d, a, b);
#else
    SSLFAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#endif
  }
};

struct Float16Math {
  using Element = __half;
  using Operand = __half;
  static constexpr int kParts = 1;
  __device__ static __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(SSLFAST_CUDA_EMULATED)
    cuda_emulator::mma_m16n8k16_f16(d, a, b);
#else
    SSLFAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#endif
  }
};

/// float32 as high + low, which have 22 bits of it: three products for one.
struct Float32Math : Float16Math {
  using Element = float;
  static constexpr int kParts = 2;
};

/// float32 rounded to float16, whose 10 bits of mantissa are those of tf32, where
/// torch.backends.cuda.matmul.allow_tf32 says that they do.
struct RoundedFloat32Math : Float16Math {
  using Element = float;
};

/// Columns of a slot: operands of 32 float32 numbers take as much space as 64 others, the high halves first.
template <typename Math>
inline constexpr int kSlotColumns = 64 / Math::kParts;

}  // namespace sslfast
