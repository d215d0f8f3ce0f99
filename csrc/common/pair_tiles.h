// What the CPU kernels of losses over pairs share beside the matrices themselves: the engine for a problem, packing on
// all threads, and the tile of similarities that a thread works on.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "csrc/common/bf16_matrix.h"
#include "csrc/common/panel_matrix.h"
#include "csrc/common/workers.h"

namespace sslfast {
namespace CPU_CAPABILITY {

/// Calls run<Engine>() with the engine for the data and this machine.
template <typename Run>
void with_engine(c10::ScalarType dtype, [[maybe_unused]] bool bf16_products, const Run& run) {
#if defined(CPU_CAPABILITY_AVX512)
  if (bf16_products) {
    const bool amx = cpu_capability() == CpuCapability::Amx;
    if (dtype == c10::ScalarType::BFloat16)
      return amx ? run.template operator()<Bf16Engine<Amx, c10::BFloat16>>()
                 : run.template operator()<Bf16Engine<DotProducts, c10::BFloat16>>();
    if (dtype == c10::ScalarType::Half) return run.template operator()<Bf16Engine<Amx, c10::Half>>();
    return run.template operator()<Bf16Engine<Amx, float>>();
  }
#endif
  switch (dtype) {
    case c10::ScalarType::Double:
      return run.template operator()<PanelEngine<double, double>>();
    case c10::ScalarType::BFloat16:
      return run.template operator()<PanelEngine<c10::BFloat16, float>>();
    case c10::ScalarType::Half:
      return run.template operator()<PanelEngine<c10::Half, float>>();
    default:
      return run.template operator()<PanelEngine<float, float>>();
  }
}

/// Fills a packed matrix from `data` (count, dim).
template <typename Engine>
void pack(int64_t threads, const typename Engine::Matrix& m, const void* data, int64_t count, int64_t dim) {
  using Z = typename Engine::Z;
  parallel_for(threads, m.rows / kMatrixPad, 2, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kMatrixPad; row < end * kMatrixPad; row += kMatrixPad)
      Engine::pack(m, row, static_cast<const Z*>(data) + row * dim, count - row, dim);
  });
}

/// A tile of similarities: rows row…row + rows − 1, columns col…col + cols − 1, in the scratch memory of this thread.
template <typename Engine>
struct Tile {
  using T = typename Engine::T;
  static constexpr int64_t kWidth = Engine::kWidth;
  T* data;        // [cols / kWidth][rows][kWidth]
  void* weights;  // what Engine::prepare makes of it
  int64_t row, rows, col, cols;

  /// Problem has rows, keys, tiles, tile_bytes, and a plan with row_block and key_block.
  template <typename Problem>
  Tile(const Problem& p, int64_t first_row, int64_t first_col) : row(first_row), col(first_col) {
    char* scratch = static_cast<char*>(p.tiles) + at::get_thread_num() * p.tile_bytes;
    data = reinterpret_cast<T*>(scratch);
    weights = scratch + p.plan.row_block * p.plan.key_block * static_cast<int64_t>(sizeof(T));
    rows = std::min(p.plan.row_block, padded(p.rows) - row);
    cols = std::min(p.plan.key_block, padded(p.keys) - col);
  }
  T& operator()(int64_t r, int64_t c) const { return data[(c / kWidth * rows + r) * kWidth + c % kWidth]; }
};

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
