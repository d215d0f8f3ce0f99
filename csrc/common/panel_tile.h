// Products of matrices in panels, float32 or float64: the register kernel that the losses' CPU kernels share.
//
// "Panels" are columns in groups of kPanel: element (row, col) of a matrix is at [col / kPanel][row][col % kPanel]. A
// call makes a strip of a result, kStrip rows × kPanel columns, which is contiguous, as is operand B; operand A may be
// transposed, which is another stride and not a copy.
#pragma once

#include <cstdint>

#include "csrc/common/vec.h"

#define SSLFAST_INLINE inline __attribute__((always_inline))

namespace sslfast {
namespace CPU_CAPABILITY {

inline constexpr int64_t kPanel = 32;
inline constexpr int64_t kStrip = 8;  // rows of one register-kernel call

#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kRegisterRows = 8;
#else
inline constexpr int kRegisterRows = 4;
#endif
inline constexpr int kRegisterVecs = 2;  // rows × vecs accumulators + vecs of B + 1 broadcast fit the register file

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// c (kStrip × kPanel, contiguous) = or += A·B over `panels`·kPanel terms k. B[k][kPanel] is contiguous. A(r, k) lies
/// at a[r·kPanel + k] (or a[k·kPanel + r] if transposed) within a panel of k, and panels are a_panel apart.
template <bool kTransposed, bool kAccumulate, typename T>
SSLFAST_INLINE void multiply_strip(const T* a, int64_t a_panel, const T* b, int64_t panels, T* c) {
  constexpr int kWidth = kRegisterVecs * kLanes<T>;
  for (int64_t row = 0; row < kStrip; row += kRegisterRows) {
    for (int64_t col = 0; col < kPanel; col += kWidth) {
      Vec<T> acc[kRegisterRows][kRegisterVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kRegisterRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kRegisterVecs; ++v)
          acc[r][v] = kAccumulate ? load(c + (row + r) * kPanel + col + v * kLanes<T>) : Vec<T>{};
      const T* b_k = b + col;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const T* a_k = a + panel * a_panel + row * (kTransposed ? 1 : kPanel);
        for (int64_t k = 0; k < kPanel; ++k) {
          Vec<T> bv[kRegisterVecs];
#pragma GCC unroll 2
          for (int v = 0; v < kRegisterVecs; ++v) bv[v] = load(b_k + v * kLanes<T>);
#pragma GCC unroll 8
          for (int r = 0; r < kRegisterRows; ++r) {
            const Vec<T> av = broadcast(a_k[r * (kTransposed ? 1 : kPanel)]);
#pragma GCC unroll 2
            for (int v = 0; v < kRegisterVecs; ++v) acc[r][v] += av * bv[v];
          }
          a_k += kTransposed ? kPanel : 1;
          b_k += kPanel;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRegisterRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kRegisterVecs; ++v) store(c + (row + r) * kPanel + col + v * kLanes<T>, acc[r][v]);
    }
  }
}

/// e = exp(s·c − shift) over a strip; e may be c. The shift belongs to the strip's rows, or to its columns.
template <bool kByColumn, typename T>
SSLFAST_INLINE void exp_strip(const T* c, T scale, const T* shift, T* e) {
  for (int64_t r = 0; r < kStrip; ++r)
    for (int64_t k = 0; k < kPanel; k += kLanes<T>) {
      const Vec<T> by = kByColumn ? load(shift + k) : broadcast(shift[r]);
      store(e + r * kPanel + k, vec_exp(load(c + r * kPanel + k) * scale - by));
    }
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
