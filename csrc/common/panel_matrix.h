// A matrix packed in panels (csrc/common/panel_tile.h), and the three products in which the tiles of a contrastive loss
// use it, in float or double on any instruction set. csrc/common/bf16_matrix.h has the same functions with bfloat16
// terms, so that one text of a kernel runs on both.
//
// A tile is rows × cols of similarities in column panels of kWidth: element (r, c) is at [c / kWidth][r][c % kWidth].
#pragma once

#include <cstring>

#include "csrc/common/matrix_plan.h"
#include "csrc/common/panel_tile.h"

namespace sslfast {
namespace CPU_CAPABILITY {

/// What a packed matrix is used for; any sum of them.
enum MatrixUse : int { kAsRows = 1, kAsColumns = 2, kForGradients = 4 };

/// Z is what is stored, T what is computed with.
template <typename Z_, typename T_>
struct PanelEngine {
  using Z = Z_;
  using T = T_;
  static constexpr int64_t kWidth = kPanel;

  struct Matrix {
    int64_t rows, dim;  // padded
    T* panels;          // [dim / kPanel][rows][kPanel]
    T* columns;         // [rows / kPanel][dim][kPanel]
    T* row_panel(int64_t panel, int64_t row) const { return panels + (panel * rows + row) * kPanel; }
  };

  static Matrix matrix(void* scratch, int64_t rows, int64_t dim, int use) {
    T* panels = static_cast<T*>(scratch);
    const bool both = use & kAsColumns && use & (kAsRows | kForGradients);
    return {rows, dim, panels, both ? panels + rows * dim : use & kAsColumns ? panels : nullptr};
  }

  /// Fills rows row…row + kMatrixPad − 1 from `count` rows of `source` (count, dim); the rest becomes zero.
  static void pack(const Matrix& m, int64_t row, const Z* source, int64_t count, int64_t dim) {
    alignas(64) T square[kPanel * kPanel];
    for (int64_t first = 0; first < m.dim; first += kPanel) {
      T* to = m.columns == m.panels ? square : m.row_panel(first / kPanel, row);
      const int64_t filled = dim - first < kPanel ? dim - first : kPanel;
      for (int64_t r = 0; r < kPanel; ++r) {
        const Z* from = source + r * dim + first;
        const int64_t valid = r < count ? filled : 0;
        for (int64_t k = 0; k < valid; ++k) to[r * kPanel + k] = static_cast<T>(from[k]);
        for (int64_t k = valid; k < kPanel; ++k) to[r * kPanel + k] = 0;
      }
      if (!m.columns) continue;
      T* column = m.columns + row * m.dim + first * kPanel;
      for (int64_t k = 0; k < kPanel; ++k)
        for (int64_t r = 0; r < kPanel; ++r) column[k * kPanel + r] = to[r * kPanel + k];
    }
  }

  /// tile = scale·Q[row…]·K[col…]ᵀ
  void similarities(const Matrix& q, int64_t row, int64_t rows, const Matrix& k, int64_t col, int64_t cols, T scale,
                    T* tile) const {
    for (int64_t c = 0; c < cols; c += kPanel)
      for (int64_t r = 0; r < rows; r += kStrip) {
        T* strip = tile + c * rows + r * kPanel;
        multiply_strip<false, false>(q.row_panel(0, row + r), q.rows * kPanel, k.columns + (col + c) * k.dim,
                                     q.dim / kPanel, strip);
        for (int64_t at = 0; at < kStrip * kPanel; at += kLanes<T>) store(strip + at, load(strip + at) * scale);
      }
  }

  /// Nothing to prepare: the products read the tile as it is.
  void prepare(const T*, int64_t, int64_t, void*, bool) const {}

  /// sums[row…] += W·K[col…], W a tile. sums: [dim / kPanel][sums_rows][kPanel].
  void add_row_sums(const T* tile, const void*, int64_t rows, const Matrix& k, int64_t col, int64_t cols, T* sums,
                    int64_t sums_rows, int64_t row) const {
    for (int64_t p = 0; p < k.dim / kPanel; ++p)
      for (int64_t r = 0; r < rows; r += kStrip)
        multiply_strip<false, true>(tile + r * kPanel, rows * kPanel, k.row_panel(p, col), cols / kPanel,
                                    sums + (p * sums_rows + row + r) * kPanel);
  }

  /// sums[col…] += Wᵀ·Q[row…]; laid out as above.
  void add_column_sums(const T* tile, const void*, int64_t cols, const Matrix& q, int64_t row, int64_t rows, T* sums,
                       int64_t sums_rows, int64_t col) const {
    for (int64_t p = 0; p < q.dim / kPanel; ++p)
      for (int64_t c = 0; c < cols; c += kStrip)
        multiply_strip<true, true>(tile + c / kPanel * rows * kPanel + c % kPanel, kPanel * kPanel, q.row_panel(p, row),
                                   rows / kPanel, sums + (p * sums_rows + col + c) * kPanel);
  }

  /// out (sums.dim) = row `row` of the sums of add_row_sums, or of add_column_sums.
  static void read_row_sum(const T* sums, int64_t sums_rows, int64_t dim, int64_t row, T* out) {
    for (int64_t p = 0; p < dim / kPanel; ++p)
      std::memcpy(out + p * kPanel, sums + (p * sums_rows + row) * kPanel, kPanel * sizeof(T));
  }
  static void read_column_sum(const T* sums, int64_t sums_rows, int64_t dim, int64_t row, T* out) {
    read_row_sum(sums, sums_rows, dim, row, out);
  }

  static void clear_row_sum(T* sums, int64_t sums_rows, int64_t dim, int64_t row) {
    for (int64_t p = 0; p < dim / kPanel; ++p)
      std::memset(sums + (p * sums_rows + row) * kPanel, 0, kPanel * sizeof(T));
  }
  static void scale_row_sum(T* sums, int64_t sums_rows, int64_t dim, int64_t row, T factor) {
    for (int64_t p = 0; p < dim / kPanel; ++p)
      for (int64_t k = 0; k < kPanel; k += kLanes<T>) {
        T* at = sums + (p * sums_rows + row) * kPanel + k;
        store(at, load(at) * factor);
      }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
