// Tensor cores through wgmma (sm_90a): products of a warpgroup, four warps, 64 rows at once, that run on while its
// threads go on. Twice the rate of mma.sync on an H100.
//
// Operands lie in slots (csrc/common/mma.cuh); accumulators are laid out as those of m16n8 tiles: acc[n] of warp w of
// the warpgroup has rows 16·w… and columns 8·n…. From begin_products() until end_products() nothing may touch the
// accumulators, nor the registers of A.
#pragma once

#include <type_traits>

#include "csrc/common/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SSLFAST_WGMMA 1
#else
#define SSLFAST_WGMMA 0
#endif

namespace sslfast {

/// Makes what this thread wrote to shared memory, or cp.async wrote for it, visible to wgmma. Before the barrier.
__device__ __forceinline__ void fence_for_wgmma() {
#if SSLFAST_WGMMA
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

/// The compiler must have these in registers here.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(const uint32_t& x) { asm volatile("" ::"r"(x) : "memory"); }
template <typename T, int kN>
__device__ __forceinline__ void pin(T (&x)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) pin(x[i]);
}

/// acc: accumulators, an array of any shape; a: weights whose registers products read.
template <typename Acc>
__device__ __forceinline__ void begin_products([[maybe_unused]] Acc& acc) {
#if SSLFAST_WGMMA
  pin(acc);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
template <typename Acc, typename... A>
__device__ __forceinline__ void end_products([[maybe_unused]] Acc& acc, [[maybe_unused]] const A&... a) {
#if SSLFAST_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" ::: "memory");
  pin(acc);
  (pin(a.at), ...);
#endif
}

#if SSLFAST_WGMMA

/// Where an operand lies: rows of 128 bytes, eight of them 1024 bytes after the last eight.
__device__ __forceinline__ uint64_t slot_descriptor(const unsigned char* shared) {
  const uint64_t address = __cvta_generic_to_shared(shared);
  return (address & 0x3FFFF) >> 4 | uint64_t{1024 >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define SSLFAST_REGISTERS_8(n)                                                                                         \
  "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), "+f"(d[n + 1][1]), "+f"(d[n + 1][2]), \
      "+f"(d[n + 1][3])
#define SSLFAST_REGISTERS_32(n) \
  SSLFAST_REGISTERS_8(n), SSLFAST_REGISTERS_8(n + 2), SSLFAST_REGISTERS_8(n + 4), SSLFAST_REGISTERS_8(n + 6)
#define SSLFAST_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SSLFAST_NAMES_32                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SSLFAST_NAMES_64                                                                         \
  SSLFAST_NAMES_32                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define SSLFAST_WGMMA_OPEN "{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\nwgmma.mma_async.sync.aligned."

/// d += A·Bᵀ: 64 rows of A and 8·kN of B, 16 columns of both.
template <typename Math, int kN>
__device__ __forceinline__ void wgmma_rows(float (&d)[kN][4], uint64_t a, uint64_t b) {
#define SSLFAST_WGMMA_ROWS(type)                                                          \
  if constexpr (kN == 16)                                                                 \
    asm volatile(SSLFAST_WGMMA_OPEN "m64n128k16.f32." type "." type " {" SSLFAST_NAMES_64 \
                                    "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                    \
                 : SSLFAST_REGISTERS_32(0), SSLFAST_REGISTERS_32(8)                       \
                 : "l"(a), "l"(b));                                                       \
  else                                                                                    \
    asm volatile(SSLFAST_WGMMA_OPEN "m64n64k16.f32." type "." type " {" SSLFAST_NAMES_32  \
                                    "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                    \
                 : SSLFAST_REGISTERS_32(0)                                                \
                 : "l"(a), "l"(b))
  static_assert(kN == 8 || kN == 16);
  if constexpr (std::is_same_v<typename Math::Operand, __half>)
    SSLFAST_WGMMA_ROWS("f16");
  else
    SSLFAST_WGMMA_ROWS("bf16");
#undef SSLFAST_WGMMA_ROWS
}

/// d += A·B: 64 rows of A from registers, 16 rows and 8·kN columns of B.
template <typename Math, int kN>
__device__ __forceinline__ void wgmma_weights(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b) {
#define SSLFAST_WGMMA_WEIGHTS(type)                                                      \
  if constexpr (kN == 8)                                                                 \
    asm volatile(SSLFAST_WGMMA_OPEN "m64n64k16.f32." type "." type " {" SSLFAST_NAMES_32 \
                                    "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"     \
                 : SSLFAST_REGISTERS_32(0)                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                  \
  else                                                                                   \
    asm volatile(SSLFAST_WGMMA_OPEN "m64n32k16.f32." type "." type " {" SSLFAST_NAMES_16 \
                                    "}, {%16, %17, %18, %19}, %20, p, 1, 1, 1;\n}\n"     \
                 : SSLFAST_REGISTERS_8(0), SSLFAST_REGISTERS_8(2)                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  static_assert(kN == 4 || kN == 8);
  if constexpr (std::is_same_v<typename Math::Operand, __half>)
    SSLFAST_WGMMA_WEIGHTS("f16");
  else
    SSLFAST_WGMMA_WEIGHTS("bf16");
#undef SSLFAST_WGMMA_WEIGHTS
}

#endif

}  // namespace sslfast
