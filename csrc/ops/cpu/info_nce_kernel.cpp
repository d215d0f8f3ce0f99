// NT-Xent on the CPU, forward and backward; csrc/ops/info_nce.h has the formulas.
//
// c = Ẑ·Ẑᵀ is symmetric, so only tiles on and above the diagonal are computed. One tile of exp(s·c) serves the row sums
// of both its row blocks (forward), and one tile of G serves the gradient of both (backward):
//
//   arithmetic   forward ½, backward ½ + 1 matrix products of (2B)²·D: 2 where the textbook form takes 3
//   memory       O(B·D): no (2B)² matrix; a tile of at most 128×128 lives in the L2 cache of its thread
//
// Layout: ẑ is held in panels (csrc/common/panel_tile.h: `rows`), and once more transposed (`columns`), element (row,
// col) at [row / kPanel][col][row % kPanel]. All three products run through the register kernel of panels:
//
//   c_IJ = Ẑ_I·Ẑ_Jᵀ       A = rows, B = columns
//   dẐ_I += G·Ẑ_J         A = G,    B = rows
//   dẐ_J += Gᵀ·Ẑ_I        A = Gᵀ,   B = rows     (A transposed is another stride, not a copy)
#include <ATen/Parallel.h>
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
  int64_t count, padded, dim_panels, block, blocks;
  T* rows;      // [dim_panels][padded][kPanel]
  T* columns;   // [padded / kPanel][dim_panels·kPanel][kPanel]
  T* inv_norm;  // [padded]

  Rows(int64_t batch, int64_t dim, void* scratch, void* inv_norms)
      : count(2 * batch),
        padded(round_up(count, kPanel)),
        dim_panels(round_up(dim, kPanel) / kPanel),
        block(info_nce_block_rows(count)),
        blocks((padded + block - 1) / block),
        rows(static_cast<T*>(scratch)),
        columns(rows + padded * dim_panels * kPanel),
        inv_norm(static_cast<T*>(inv_norms)) {}

  int64_t begin(int64_t b) const { return b * block; }
  int64_t end(int64_t b) const { return (b + 1) * block < padded ? (b + 1) * block : padded; }
  T* row_panel(int64_t panel, int64_t row) const { return rows + (panel * padded + row) * kPanel; }
  T* column_panel(int64_t row) const { return columns + row * dim_panels * kPanel; }  // row: a multiple of kPanel

  /// c[strip of kStrip rows][kPanel columns] = ⟨ẑ_row, ẑ_col⟩
  SSLFAST_INLINE void similarities(int64_t row, int64_t col, T* c) const {
    multiply_strip<false, false>(row_panel(0, row), padded * kPanel, column_panel(col), dim_panels, c);
  }

  T dot(int64_t i, int64_t j) const {
    Vec<T> sum{};
    for (int64_t p = 0; p < dim_panels; ++p)
      for (int64_t k = 0; k < kPanel; k += kLanes<T>) sum += load(row_panel(p, i) + k) * load(row_panel(p, j) + k);
    return sum_lanes<T>(sum);
  }
};

/// Normalises z1 and z2 into z.rows and z.columns; padding becomes zero. Traffic: 2B·D read, twice that written.
template <typename Z, typename T>
void normalize_rows(const Rows<T>& z, const Z* z1, const Z* z2, int64_t batch, int64_t dim) {
  at::parallel_for(0, z.padded / kPanel, 2, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kPanel;
      for (int64_t row = first; row < first + kPanel; ++row) {
        const Z* source = row < batch ? z1 + row * dim : z2 + (row - batch) * dim;
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
  });
}

/// Zeroes the elements of a strip that count for nothing: the diagonal, and padded rows and columns.
template <typename T>
void exclude(T* e, int64_t row, int64_t col, int64_t count) {
  for (int64_t r = 0; r < kStrip; ++r)
    if (row + r >= col && row + r < col + kPanel) e[r * kPanel + row + r - col] = 0;
  if (row + kStrip <= count && col + kPanel <= count) return;
  for (int64_t r = 0; r < kStrip; ++r)
    for (int64_t k = 0; k < kPanel; ++k)
      if (row + r >= count || col + k >= count) e[r * kPanel + k] = 0;
}

/// Calls visit(r, k) for the elements of a strip that pair a row with its positive.
template <typename T, typename Visit>
SSLFAST_INLINE void for_each_positive(const Rows<T>& z, int64_t row, int64_t col, const Visit& visit) {
  const int64_t batch = z.count / 2;
  if (std::abs(std::abs(row - col) - batch) >= kPanel) return;
  for (int64_t r = 0; r < kStrip && row + r < z.count; ++r) {
    const int64_t k = (row + r < batch ? row + r + batch : row + r - batch) - col;
    if (k >= 0 && k < kPanel) visit(r, k);
  }
}

template <typename T>
bool touches_edge(const Rows<T>& z, int64_t i, int64_t j) {
  return i == j || z.end(j) > z.count;  // i ≤ j: only block j can be the padded one
}

/// max[row] = max_{j≠row} s·c, where the bound s lies too far above it for exp.
template <typename T>
void row_maxima(const Rows<T>& z, T scale, T* max) {
  for (int64_t row = 0; row < z.padded; ++row) max[row] = row < z.count ? -T(INFINITY) : 0;
  for_each_block_pair(z.blocks, [&](int64_t i, int64_t j) {
    alignas(64) T c[kStrip * kPanel];
    for (int64_t col = z.begin(j); col < z.end(j); col += kPanel)
      for (int64_t row = z.begin(i); row < z.end(i); row += kStrip) {
        z.similarities(row, col, c);
        for (int64_t r = 0; r < kStrip && row + r < z.count; ++r)
          for (int64_t k = 0; k < kPanel && col + k < z.count; ++k) {
            if (row + r == col + k) continue;
            const T logit = scale * c[r * kPanel + k];
            if (logit > max[row + r]) max[row + r] = logit;
            if (logit > max[col + k]) max[col + k] = logit;
          }
      }
  });
}

/// sum[row] += Σ exp(s·c − max[row]) over the columns of tile (i, j), and for i ≠ j the same for its columns. If
/// bounded, max is the same for all rows, and so is the exp. positive[row] = c of the row and its positive, from here
/// and not from a product of its own, so that its rounding error is the same in lse and beside it.
template <bool kBounded, typename T>
void add_tile_sums(const Rows<T>& z, T scale, const T* max, double* sum, T* positive, int64_t i, int64_t j) {
  const bool edge = touches_edge(z, i, j);
  alignas(64) T row_sum[kMaxBlock * kLanes<T>] = {};  // a vector of partial sums for each row of block i
  for (int64_t col = z.begin(j); col < z.end(j); col += kPanel) {
    alignas(64) T col_sum[kPanel] = {};
    for (int64_t row = z.begin(i); row < z.end(i); row += kStrip) {
      alignas(64) T e[kStrip * kPanel];
      alignas(64) T e_by_column[kBounded ? 1 : kStrip * kPanel];
      z.similarities(row, col, e);
      for_each_positive(z, row, col,
                        [&](int64_t r, int64_t k) { positive[row + r] = positive[col + k] = e[r * kPanel + k]; });
      if (!kBounded) exp_strip<true>(e, scale, max + col, e_by_column);
      exp_strip<false>(e, scale, max + row, e);
      if (edge) {
        exclude(e, row, col, z.count);
        if (!kBounded) exclude(e_by_column, row, col, z.count);
      }
      for (int64_t r = 0; r < kStrip; ++r) {
        T* partial = row_sum + (row - z.begin(i) + r) * kLanes<T>;
        for (int64_t k = 0; k < kPanel; k += kLanes<T>) {
          store(partial, load(partial) + load(e + r * kPanel + k));
          store(col_sum + k, load(col_sum + k) + load((kBounded ? e : e_by_column) + r * kPanel + k));
        }
      }
    }
    if (i != j)
      for (int64_t k = 0; k < kPanel; ++k) sum[col + k] += col_sum[k];
  }
  for (int64_t row = z.begin(i); row < z.end(i); ++row)
    sum[row] += sum_lanes<T>(load(row_sum + (row - z.begin(i)) * kLanes<T>));
}

template <typename Z, typename T>
void info_nce_forward_kernel(const InfoNceForwardParams& p) {
  const Rows<T> z(p.batch, p.dim, p.rows, p.inv_norm);
  const T scale = static_cast<T>(p.scale);
  T *max = static_cast<T*>(p.max), *positive = static_cast<T*>(p.positive);
  normalize_rows(z, static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.batch, p.dim);

  const bool bounded = p.scale <= kInfoNceBoundedScale;
  for (int64_t row = 0; row < z.padded; ++row) max[row] = scale;
  for (int64_t row = 0; row < z.padded; ++row) p.sum[row] = 0;
  if (!bounded) row_maxima(z, scale, max);
  for_each_block_pair(z.blocks, [&](int64_t i, int64_t j) {
    if (bounded)
      add_tile_sums<true>(z, scale, max, p.sum, positive, i, j);
    else
      add_tile_sums<false>(z, scale, max, p.sum, positive, i, j);
  });

  at::parallel_for(0, z.count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      p.lse[row] = max[row] + std::log(p.sum[row]);
      static_cast<T*>(p.loss)[row] = static_cast<T>(negative_log_share(p.sum[row], positive[row], scale, max[row]));
    }
  });
}

/// What turns a similarity into an element of G.
template <typename T>
struct Weights {
  T scale;
  bool bounded;
  T* shift;   // [padded]: bounded: s for all; otherwise lse_i
  T* factor;  // [padded]: s·w_i·exp(shift_i − lse_i), which also makes up for the rounding of shift; 0 for padded rows
  T* weight;  // [padded]: s·w_i

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

/// grad[I] += G·Ẑ_J and, for i ≠ j, grad[J] += Gᵀ·Ẑ_I. grad is laid out as z.rows; g is scratch for the tile, in
/// panels.
template <typename T>
void add_tile_gradient(const Rows<T>& z, const Weights<T>& weights, T* g, T* grad, int64_t i, int64_t j) {
  const int64_t rows = z.end(i) - z.begin(i), cols = z.end(j) - z.begin(j);
  const bool edge = touches_edge(z, i, j);
  for (int64_t col = 0; col < cols; col += kPanel)
    for (int64_t row = 0; row < rows; row += kStrip) {
      T* c = g + col * rows + row * kPanel;
      z.similarities(z.begin(i) + row, z.begin(j) + col, c);
      weights.apply(c, z.begin(i) + row, z.begin(j) + col);
      for_each_positive(z, z.begin(i) + row, z.begin(j) + col, [&](int64_t r, int64_t k) {
        c[r * kPanel + k] -= weights.weight[z.begin(i) + row + r] + weights.weight[z.begin(j) + col + k];
      });
      if (edge) exclude(c, z.begin(i) + row, z.begin(j) + col, z.count);
    }
  for (int64_t p = 0; p < z.dim_panels; ++p) {
    T* grad_panel = grad + p * z.padded * kPanel;
    for (int64_t row = 0; row < rows; row += kStrip)
      multiply_strip<false, true>(g + row * kPanel, rows * kPanel, z.row_panel(p, z.begin(j)), cols / kPanel,
                                  grad_panel + (z.begin(i) + row) * kPanel);
    if (i == j) continue;
    for (int64_t col = 0; col < cols; col += kStrip)
      multiply_strip<true, true>(g + col / kPanel * rows * kPanel + col % kPanel, kPanel * kPanel,
                                 z.row_panel(p, z.begin(i)), rows / kPanel, grad_panel + (z.begin(j) + col) * kPanel);
  }
}

/// dz_i = (dẑ_i − ⟨ẑ_i, dẑ_i⟩·ẑ_i)/‖z_i‖ and row_dot[i] = ⟨ẑ_i, dẑ_i⟩.
template <typename Z, typename T>
void finish_row(const InfoNceBackwardParams& p, const Rows<T>& z, const T* grad, int64_t row) {
  Vec<T> sum{};
  for (int64_t panel = 0; panel < z.dim_panels; ++panel)
    for (int64_t k = 0; k < kPanel; k += kLanes<T>)
      sum += load(grad + (panel * z.padded + row) * kPanel + k) * load(z.row_panel(panel, row) + k);
  const T dot = sum_lanes<T>(sum);
  p.row_dot[row] = dot;
  // A row shorter than eps was divided by eps, a constant: nothing to project out. As torch.nn.functional.normalize.
  const bool tiny = z.inv_norm[row] >= T(1 / kNormEps);
  Z* out =
      row < p.batch ? static_cast<Z*>(p.grad_z1) + row * p.dim : static_cast<Z*>(p.grad_z2) + (row - p.batch) * p.dim;
  for (int64_t d = 0; d < p.dim; ++d) {
    const int64_t at = (d / kPanel * z.padded + row) * kPanel + d % kPanel;
    T value = (grad[at] - (tiny ? T(0) : dot * z.rows[at])) * z.inv_norm[row];
    if (tiny && std::is_same_v<Z, c10::Half>) value = value > 65504 ? 65504 : value < -65504 ? -65504 : value;
    out[d] = static_cast<Z>(value);
  }
}

template <typename Z, typename T>
void info_nce_backward_kernel(const InfoNceBackwardParams& p) {
  const Rows<T> z(p.batch, p.dim, p.rows, p.inv_norm);
  const T* grad_loss = static_cast<const T*>(p.grad_loss);
  T* grad = static_cast<T*>(p.grad_rows);
  normalize_rows(z, static_cast<const Z*>(p.z1), static_cast<const Z*>(p.z2), p.batch, p.dim);

  const Weights<T> weights{static_cast<T>(p.scale), p.scale <= kInfoNceBoundedScale, static_cast<T*>(p.shift),
                           static_cast<T*>(p.factor), static_cast<T*>(p.weight)};
  for (int64_t row = 0; row < z.padded; ++row) {
    const bool real = row < z.count;
    const double weight = real ? p.scale * p.grad_loss_factor * grad_loss[row * p.grad_loss_stride] : 0.0;
    weights.weight[row] = static_cast<T>(weight);
    weights.shift[row] = weights.bounded || !real ? weights.scale : static_cast<T>(p.lse[row]);
    weights.factor[row] = real ? static_cast<T>(weight * std::exp(weights.shift[row] - p.lse[row])) : T(0);
  }
  at::parallel_for(0, z.padded * z.dim_panels, 512, [&](int64_t begin, int64_t end) {
    std::memset(grad + begin * kPanel, 0, (end - begin) * kPanel * sizeof(T));
  });
  for_each_block_pair(z.blocks, [&](int64_t i, int64_t j) {
    T* tile = static_cast<T*>(p.tiles) + at::get_thread_num() * z.block * z.block;
    add_tile_gradient(z, weights, tile, grad, i, j);
  });
  at::parallel_for(0, z.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) finish_row<Z>(p, z, grad, row);
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
