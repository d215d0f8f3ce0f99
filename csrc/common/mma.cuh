// Tensor cores through mma.sync (sm_80), one interface for bfloat16, float16 and float32 operands.
//
// Shared tiles. A "slot" is a matrix of any number of rows of 128 bytes: 64 elements of 2 bytes or 32 floats. Rows are
// cut into eight chunks of 16 bytes, and chunk c of row r is stored at place c ^ swizzle(r), so that all the accesses
// below touch every bank once: eight consecutive rows at one chunk (ldmatrix), and four rows at two chunks (floats read
// by hand).
//
// Fragments. With 32 bytes of a row (two chunks) as the depth of one step, ldmatrix gives the fragments of m16n8k16 for
// 2-byte elements and those of m16n8k8 for floats from the same addresses, so only multiply() knows the type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "csrc/common/launch.cuh"

namespace sslfast {

inline constexpr int kSlotRowBytes = 128;
template <typename T>
inline constexpr int kSlotColumns = kSlotRowBytes / static_cast<int>(sizeof(T));
inline constexpr int kSlotSteps = 4;  // of 32 bytes

/// Byte offset of a chunk of 16 bytes in a slot.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  const int swizzle = (row & 3) << 1 | (row >> 2 & 1);
  return row * kSlotRowBytes + ((chunk ^ swizzle) << 4);
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

/// The fragment of B for columns column…column+7, where B's rows are rows of the slot (C = A·B), from row `row`: 16
/// rows of 2-byte elements or 8 rows of floats. Two-byte elements: two fragments, for columns column…column+15.
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[2][2], const unsigned char* slot, int row, int column) {
  const int lane = threadIdx.x % 32;
  uint32_t r[4];
  ldmatrix_x4_transposed(r, slot + chunk_offset(row + lane % 16, column / 8 + lane / 16));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[1][2], const unsigned char* slot, int row, int column) {
  const int lane = threadIdx.x % 32, at = column + lane / 4;
  for (int h = 0; h < 2; ++h) {
    const unsigned char* chunk = slot + chunk_offset(row + lane % 4 + 4 * h, at / 4);
    b[0][h] = reinterpret_cast<const uint32_t*>(chunk)[at % 4];
  }
}

#if !defined(SSLFAST_CUDA_EMULATED)
#define SSLFAST_MMA(shape_and_types)                                                \
  asm volatile("mma.sync.aligned." shape_and_types                                  \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// What a kernel computes its products with: Element is the type in memory, product() adds a·b to d, which is float32.

struct BFloat16Math {
  using Element = __nv_bfloat16;
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
  __device__ static __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(SSLFAST_CUDA_EMULATED)
    cuda_emulator::mma_m16n8k16_f16(d, a, b);
#else
    SSLFAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#endif
  }
};

/// x rounded to tf32: 10 bits of mantissa, to nearest.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t x) {
#if defined(SSLFAST_CUDA_EMULATED)
  return cuda_emulator::round_to_tf32(x);
#else
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(x)));
  return rounded;
#endif
}

/// Operands must be rounded: products of unrounded operands would be truncated.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(SSLFAST_CUDA_EMULATED)
  cuda_emulator::mma_m16n8k8_tf32(d, a, b);
#else
  SSLFAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#endif
}

template <int kWords>
struct Tf32Parts {
  uint32_t high[kWords], low[kWords];  // x = high + low up to 2⁻²² of x

  __device__ __forceinline__ explicit Tf32Parts(const uint32_t (&x)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      high[i] = round_to_tf32(x[i]);
      low[i] = round_to_tf32(__float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i])));
    }
  }
};

/// float32 operands rounded to tf32: as torch.backends.cuda.matmul.allow_tf32 has it. Relative error about 5e-4 a
/// product.
struct Tf32Math {
  using Element = float;
  __device__ static __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const Tf32Parts<4> pa(a);
    const Tf32Parts<2> pb(b);
    mma_tf32(d, pa.high, pb.high);
  }
};

/// float32 operands as sums of two tf32 parts; of the four products the smallest, 2⁻²² of the whole, is left out.
struct Tf32x3Math {
  using Element = float;
  __device__ static __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const Tf32Parts<4> pa(a);
    const Tf32Parts<2> pb(b);
    mma_tf32(d, pa.low, pb.high);
    mma_tf32(d, pa.high, pb.low);
    mma_tf32(d, pa.high, pb.high);
  }
};

}  // namespace sslfast
