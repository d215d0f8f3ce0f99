// NT-Xent on the CPU, forward and backward; csrc/ops/info_nce.h has the formulas.
//
// c = Ẑ·Ẑᵀ is symmetric, so only tiles on and above the diagonal are computed. One tile of exp(s·c) serves the row sums
// of both its row blocks (forward), and one tile of G serves the gradient of both (backward):
//
//   arithmetic   forward ½, backward ½ + 1 matrix products of (2B)²·D: 2 where the textbook form takes 3
//   memory       O(B·D): no (2B)² matrix; a tile of at most 128×128 lives in the L2 cache of its thread
//
// Positives are left out of the tiles. A loss is softplus(log Σ_{j≠i,p} exp(s·c_ij) − s·c_ip), which keeps its digits
// when it is small, and the positive's share of the gradient, in which 1 − P_ip = 1 − exp(−loss_i), is added per row.
//
// Layout: ẑ is held in panels (csrc/common/panel_tile.h: `rows`), and once more transposed (`columns`), element (row,
// col) at [row / kPanel][col][row % kPanel]. All three products run through the register kernel of panels:
//
//   c_IJ = Ẑ_I·Ẑ_Jᵀ       A = rows, B = columns
//   dẐ_I += G·Ẑ_J         A = G,    B = rows
//   dẐ_J += Gᵀ·Ẑ_I        A = Gᵀ,   B = rows     (A transposed is another stride, not a copy)
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

#include "csrc/common/block_pairs.h"
#include "csrc/common/panel_tile.h"
#include "csrc/common/vec.h"
#include "csrc/ops/info_nce.h"

namespace sslfast {
namespace CPU_CAPABILITY {
namespace {

static_assert(kPanel == kInfoNcePad);
constexpr int64_t kMaxBlock = 128;
constexpr double kNormEps = 1e-12;

/// ẑ and what the tiles need to find it. T is the accumulation type: float, or double for double input.
template <typename T>
struct Rows {
  int64_t batch, count, padded, dim_panels, block, blocks;
  T* rows;      // [dim_panels][padded][kPanel]
  T* columns;   // [padded / kPanel][dim_panels·kPanel][kPanel]
  T* inv_norm;  // [padded]

  Rows(int64_t batch_size, int64_t dim, void* scratch, void* inv_norms)
      : batch(batch_size),
        count(2 * batch),
        padded(round_up(count, kPanel)),
        dim_panels(round_up(dim, kPanel) / kPanel),
        block(info_nce_block_rows(count)),
        blocks((padded + block - 1) / block),
        rows(static_cast<T*>(scratch)),
        columns(rows + padded * dim_panels * kPanel),
        inv_norm(static_cast<T*>(inv_norms)) {}

  int64_t begin(int64_t b) const { return b * block; }
  int64_t end(int64_t b) const { return (b + 1) * block < padded ? (b + 1) * block : padded; }
  int64_t positive(int64_t row) const { return row < batch ? row + batch : row - batch; }
  T* row_panel(int64_t panel, int64_t row) const { return rows + (panel * padded + row) * kPanel; }
  T* column_panel(int64_t row) const { return columns + row * dim_panels * kPanel; }  // row: a multiple of kPanel

  /// c[strip of kStrip rows][kPanel columns] = ⟨ẑ_row, ẑ_col⟩
  SSLFAST_INLINE void similarities(int64_t row, int64_t col, T* c) const {
    multiply_strip<false, false>(row_panel(0, row), padded * kPanel, column_panel(col), dim_panels, c);
  }

  /// ⟨ẑ_i, ẑ_j⟩, the same bits wherever it is called: forward and backward must agree on positives.
  __attribute__((noinline)) T dot(int64_t i, int64_t j) const {
    Vec<T> sum{};
    for (int64_t p = 0; p < dim_panels; ++p)
      for (int64_t k = 0; k < kPanel; k += kLanes<T>) sum += load(row_panel(p, i) + k) * load(row_panel(p, j) + k);
    return sum_lanes<T>(sum);
  }
};

/// Normalises kPanel rows of z1 and z2 into z.rows and z.columns; padding becomes zero.
template <typename Z, typename T>
void normalize_rows(const Rows<T>& z, const Z* z1, const Z* z2, int64_t dim, int64_t first) {
  for (int64_t row = first; row < first + kPanel; ++row) {
    const Z* source = row < z.batch ? z1 + row * dim : z2 + (row - z.batch) * dim;
    for (int64_t p = 0; p < z.dim_panels; ++p) {
      T* target = z.row_panel(p, row);
      const int64_t filled = row < z.count ? (dim - p * kPanel < kPanel ? dim - p * kPanel : kPanel) : 0;
      for (int64_t k = 0; k < filled; ++k) target[k] = static_cast<T>(source[p * kPanel + k]);
      for (int64_t k = filled; k < kPanel; ++k) target[k] = 0;
    }
    const T norm = std::sqrt(z.dot(row, row));
    z.inv_norm[row] = T(1) / (norm < T(kNormEps) ? T(kNormEps) : norm);
    for (int64_t p = 0; p < z.dim_panels; ++p)
      for (int64_t k = 0; k < kPanel; ++k) z.row_panel(p, row)[k] *= z.inv_norm[row];
  }
  for (int64_t p = 0; p < z.dim_panels; ++p) {
    T* target = z.column_panel(first) + p * kPanel * kPanel;
    const T* source = z.row_panel(p, first);
    for (int64_t k = 0; k < kPanel; ++k)
      for (int64_t r = 0; r < kPanel; ++r) target[k * kPanel + r] = source[r * kPanel + k];
  }
}

/// Whether a strip has elements that the sums leave out.
template <typename T>
bool has_excluded(const Rows<T>& z, int64_t row, int64_t col) {
  const auto meets = [&](int64_t diagonal) { return std::abs(col - row - diagonal) < kPanel; };
  return meets(0) || meets(z.batch) || col + kPanel > z.count;
}

/// Zeroes them: the diagonal, positives, and padded rows and columns. row and col are those of a strip that touches the
/// diagonal or lies above it.
template <typename T>
void exclude(const Rows<T>& z, T* e, int64_t row, int64_t col) {
  for (int64_t r = 0; r < kStrip; ++r) {
    const int64_t own = row + r - col;
    for (const int64_t k : {own, own + z.batch, own - z.batch})
      if (k >= 0 && k < kPanel) e[r * kPanel + k] = 0;
    const int64_t filled = row + r < z.count ? z.count - col : 0;
    for (int64_t k = filled < 0 ? 0 : filled; k < kPanel; ++k) e[r * kPanel + k] = 0;
  }
}

/// Rows of block i that a tile pairs with the columns col…col+kPanel: in a tile on the diagonal those on and above it.
template <typename T>
int64_t last_row(const Rows<T>& z, int64_t i, int64_t j, int64_t col) {
  return i == j ? col + kPanel : z.end(i);
}

/// max[row] = max_{j≠row} s·c, where the bound s lies too far above it for exp. max starts at −∞.
template <typename T>
void raise_maxima(const Rows<T>& z, T scale, T* max, int64_t i, int64_t j) {
  alignas(64) T c[kStrip * kPanel];
  for (int64_t col = z.begin(j); col < z.end(j); col += kPanel)
    for (int64_t row = z.begin(i); row < last_row(z, i, j, col); row += kStrip) {
      z.similarities(row, col, c);
      for (int64_t r = 0; r < kStrip && row + r < z.count; ++r)
        for (int64_t k = 0; k < kPanel && col + k < z.count; ++k) {
          if (row + r == col + k) continue;
          const T logit = scale * c[r * kPanel + k];
          if (logit > max[row + r]) max[row + r] = logit;
          if (logit > max[col + k]) max[col + k] = logit;
        }
    }
}

/// sum[row] += Σ exp(s·c − max[row]) over the columns of tile (i, j) without positives, and the same for its columns.
/// If bounded, max is the same for all rows, and so is the exp.
template <bool kBounded, typename T>
void add_tile_sums(const Rows<T>& z, T scale, const T* max, double* sum, int64_t i, int64_t j) {
  alignas(64) T row_sum[kMaxBlock * kLanes<T>] = {};  // a vector of partial sums for each row of block i
  for (int64_t col = z.begin(j); col < z.end(j); col += kPanel) {
    alignas(64) T col_sum[kPanel] = {};
    for (int64_t row = z.begin(i); row < last_row(z, i, j, col); row += kStrip) {
      alignas(64) T e[kStrip * kPanel];
      alignas(64) T e_by_column[kBounded ? 1 : kStrip * kPanel];
      z.similarities(row, col, e);
      if (!kBounded) exp_strip<true>(e, scale, max + col, e_by_column);
      exp_strip<false>(e, scale, max + row, e);
      if (has_excluded(z, row, col)) {
        exclude(z, e, row, col);
        if (!kBounded) exclude(z, e_by_column, row, col);
      }
      const bool both = i != j || row < col;  // a panel on the diagonal holds its pairs in both orders
      for (int64_t r = 0; r < kStrip; ++r) {
        T* partial = row_sum + (row - z.begin(i) + r) * kLanes<T>;
        for (int64_t k = 0; k < kPanel; k += kLanes<T>) {
          store(partial, load(partial) + load(e + r * kPanel + k));
          if (both) store(col_sum + k, load(col_sum + k) + load((kBounded ? e : e_by_column) + r * kPanel + k));
        }
      }
    }
    for (int64_t k = 0; k < kPanel; ++k) sum[col + k] += col_sum[k];
  }
  for (int64_t row = z.begin(i); row < z.end(i); ++row)
    sum[row] += sum_lanes<T>(load(row_sum + (row - z.begin(i)) * kLanes<T>));
}

template <typename Z, typename T>
void info_nce_forward_kernel(const InfoNceForwardParams& p) {
  const Rows<T> z(p.batch, p.dim, p.rows, p.inv_norm);
  const T scale = static_cast<T>(p.scale);
  const bool bounded = p.scale <= kInfoNceBoundedScale;
  T* max = static_cast<T*>(p.max);
  run_workers(z.blocks > 1 ? p.threads : 1, [&](const Worker& worker) {
    worker.share(z.padded / kPanel, [&](int64_t group) {
      normalize_rows(z, static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.dim, group * kPanel);
      for (int64_t row = group * kPanel; row < (group + 1) * kPanel; ++row) {
        max[row] = bounded ? scale : row < z.count ? -T(INFINITY) : T(0);
        p.sum[row] = 0;
      }
    });
    worker.barrier();
    if (bounded) {
      for_each_block_pair(worker, z.blocks,
                          [&](int64_t i, int64_t j) { add_tile_sums<true>(z, scale, max, p.sum, i, j); });
    } else {
      for_each_block_pair(worker, z.blocks, [&](int64_t i, int64_t j) { raise_maxima(z, scale, max, i, j); });
      for_each_block_pair(worker, z.blocks,
                          [&](int64_t i, int64_t j) { add_tile_sums<false>(z, scale, max, p.sum, i, j); });
    }
    worker.share(z.count, [&](int64_t row) {
      const double positive = p.scale * z.dot(row, z.positive(row));
      const double loss = softplus(std::log(p.sum[row]) + max[row] - positive);
      static_cast<T*>(p.loss)[row] = static_cast<T>(loss);
      p.lse[row] = positive + loss;
    });
  });
}

/// What turns a similarity into an element of G.
template <typename T>
struct Weights {
  T scale;
  bool bounded;
  T* shift;   // [padded]: bounded: s for all; otherwise lse_i
  T* factor;  // [padded]: s·w_i·exp(shift_i − lse_i), which also makes up for the rounding of shift; 0 for padded rows

  /// c → s·(w_i·P_ij + w_j·P_ji) in place. Bounded: exp(s·c − s)·(factor_i + factor_j), one exp for both directions.
  SSLFAST_INLINE void apply(T* c, int64_t row, int64_t col) const {
    if (bounded) {
      exp_strip<false>(c, scale, shift + row, c);
      for (int64_t r = 0; r < kStrip; ++r)
        for (int64_t k = 0; k < kPanel; k += kLanes<T>)
          store(c + r * kPanel + k, load(c + r * kPanel + k) * (load(factor + col + k) + factor[row + r]));
    } else {
      alignas(64) T by_column[kStrip * kPanel];
      exp_strip<true>(c, scale, shift + col, by_column);
      exp_strip<false>(c, scale, shift + row, c);
      for (int64_t r = 0; r < kStrip; ++r)
        for (int64_t k = 0; k < kPanel; k += kLanes<T>)
          store(c + r * kPanel + k,
                load(c + r * kPanel + k) * factor[row + r] + load(by_column + r * kPanel + k) * load(factor + col + k));
    }
  }
};

/// grad[I] += G·Ẑ_J and grad[J] += Gᵀ·Ẑ_I; on the diagonal grad[I] = G·Ẑ_I from the panels of G on and above it. grad
/// is laid out as z.rows; g is scratch for the tile, in panels.
template <bool kDiagonal, typename T>
void add_tile_gradient(const Rows<T>& z, const Weights<T>& weights, T* g, T* grad, int64_t i, int64_t j) {
  const int64_t rows = z.end(i) - z.begin(i), cols = z.end(j) - z.begin(j);
  for (int64_t col = 0; col < cols; col += kPanel)
    for (int64_t row = 0; row < (kDiagonal ? col + kPanel : rows); row += kStrip) {
      T* c = g + col * rows + row * kPanel;
      z.similarities(z.begin(i) + row, z.begin(j) + col, c);
      weights.apply(c, z.begin(i) + row, z.begin(j) + col);
      if (has_excluded(z, z.begin(i) + row, z.begin(j) + col)) exclude(z, c, z.begin(i) + row, z.begin(j) + col);
    }
  for (int64_t p = 0; p < z.dim_panels; ++p) {
    T* grad_panel = grad + p * z.padded * kPanel;
    for (int64_t row = 0; row < rows; row += kStrip) {
      const int64_t from = kDiagonal ? row / kPanel * kPanel : 0;
      multiply_strip<false, !kDiagonal>(g + from * rows + row * kPanel, rows * kPanel,
                                        z.row_panel(p, z.begin(j) + from), (cols - from) / kPanel,
                                        grad_panel + (z.begin(i) + row) * kPanel);
    }
    for (int64_t col = kDiagonal ? kPanel : 0; col < cols; col += kStrip)
      multiply_strip<true, true>(g + col / kPanel * rows * kPanel + col % kPanel, kPanel * kPanel,
                                 z.row_panel(p, z.begin(i)), (kDiagonal ? col : rows) / kPanel,
                                 grad_panel + (z.begin(j) + col) * kPanel);
  }
}

/// The positive's share of dẑ_i, then dz_i = (dẑ_i − ⟨ẑ_i, dẑ_i⟩·ẑ_i)/‖z_i‖ and row_dot[i] = ⟨ẑ_i, dẑ_i⟩.
template <typename Z, typename T>
void finish_row(const InfoNceBackwardParams& p, const Rows<T>& z, const T* grad, int64_t row) {
  const int64_t other = z.positive(row);
  const T similarity = z.dot(row, other);
  const double g = positive_gradient(p, row, other, p.scale * similarity);
  Vec<T> sum{};
  for (int64_t panel = 0; panel < z.dim_panels; ++panel)
    for (int64_t k = 0; k < kPanel; k += kLanes<T>)
      sum += load(grad + (panel * z.padded + row) * kPanel + k) * load(z.row_panel(panel, row) + k);
  const double dot = sum_lanes<T>(sum) + g * similarity;
  p.row_dot[row] = dot;
  // A row shorter than eps was divided by eps, a constant: nothing to project out. As torch.nn.functional.normalize.
  const bool tiny = z.inv_norm[row] >= T(1 / kNormEps);
  const T along = tiny ? T(0) : static_cast<T>(dot), to_other = static_cast<T>(g);
  Z* out =
      row < p.batch ? static_cast<Z*>(p.grad_z1) + row * p.dim : static_cast<Z*>(p.grad_z2) + (row - p.batch) * p.dim;
  for (int64_t panel = 0; panel < z.dim_panels; ++panel) {
    const T *own = z.row_panel(panel, row), *positive = z.row_panel(panel, other);
    const T* from = grad + (panel * z.padded + row) * kPanel;
    for (int64_t k = 0; k < kPanel && panel * kPanel + k < p.dim; ++k) {
      T value = (from[k] + to_other * positive[k] - along * own[k]) * z.inv_norm[row];
      if (tiny && std::is_same_v<Z, c10::Half>) value = value > 65504 ? 65504 : value < -65504 ? -65504 : value;
      out[panel * kPanel + k] = static_cast<Z>(value);
    }
  }
}

template <typename Z, typename T>
void info_nce_backward_kernel(const InfoNceBackwardParams& p) {
  const Rows<T> z(p.batch, p.dim, p.rows, p.inv_norm);
  T* grad = static_cast<T*>(p.grad_rows);
  const Weights<T> weights{static_cast<T>(p.scale), p.scale <= kInfoNceBoundedScale, static_cast<T*>(p.shift),
                           static_cast<T*>(p.factor)};
  run_workers(z.blocks > 1 ? p.threads : 1, [&](const Worker& worker) {
    worker.share(z.padded / kPanel, [&](int64_t group) {
      normalize_rows(z, static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.dim, group * kPanel);
      for (int64_t row = group * kPanel; row < (group + 1) * kPanel; ++row) {
        const bool real = row < z.count;
        weights.shift[row] = weights.bounded || !real ? weights.scale : static_cast<T>(p.lse[row]);
        weights.factor[row] =
            real ? static_cast<T>(row_weight(p, row) * std::exp(weights.shift[row] - p.lse[row])) : T(0);
      }
    });
    worker.barrier();
    T* tile = static_cast<T*>(p.tiles) + worker.index * z.block * z.block;
    for_each_block_pair(worker, z.blocks, [&](int64_t i, int64_t j) {
      if (i == j)
        add_tile_gradient<true>(z, weights, tile, grad, i, j);
      else
        add_tile_gradient<false>(z, weights, tile, grad, i, j);
    });
    worker.share(z.count, [&](int64_t row) { finish_row<Z>(p, z, grad, row); });
  });
  double sum = 0;
  for (int64_t row = 0; row < z.count; ++row) sum += p.row_dot[row];
  *p.grad_temperature = -0.5 * p.scale * sum;
}

template <typename Params, typename Run>
void switch_dtype(const Params& p, const Run& run) {
  switch (p.dtype) {
    case c10::ScalarType::Double:
      return run(double{}, double{});
    case c10::ScalarType::BFloat16:
      return run(c10::BFloat16{}, float{});
    case c10::ScalarType::Half:
      return run(c10::Half{}, float{});
    default:
      return run(float{}, float{});
  }
}

}  // namespace

void launch_info_nce_forward_cpu(const InfoNceForwardParams& p) {
  switch_dtype(p, [&](auto z, auto t) { info_nce_forward_kernel<decltype(z), decltype(t)>(p); });
}

void launch_info_nce_backward_cpu(const InfoNceBackwardParams& p) {
  switch_dtype(p, [&](auto z, auto t) { info_nce_backward_kernel<decltype(z), decltype(t)>(p); });
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
