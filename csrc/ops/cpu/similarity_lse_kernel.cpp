// The log-sum-exp of similarities on the CPU, forward and backward; csrc/ops/similarity_lse.h has the formulas.
//
// One tile of similarities after the other is made in the L2 cache of its thread, where it becomes exponentials, sums
// and weights; none is ever stored. One text serves two engines: products of float or double panels
// (csrc/common/panel_matrix.h) and products of bfloat16 terms (csrc/common/bf16_matrix.h).
//
//   arithmetic   in matrix products of M·N·D: forward 1, backward 3. Keys without gradient: 2 in all. Without keys,
//                by symmetry: forward ½, backward 1½ (½ for the similarities, 1 for both sums of a tile).
//                One exp a similarity and direction.
//   memory       O((M + N)·D); a tile is at most 256 × 256
//
// Softmax statistics are online: each row has a running maximum, and its sums so far shrink when it grows. Which tiles
// come after one another is fixed by the plan: forward, a task takes a group of row blocks and a segment of the keys,
// packs each of its key blocks once, and the partial results of the segments are joined in order at the end; backward,
// and without keys, pairs of blocks meet in rounds (csrc/common/block_pairs.h) and add to their blocks in turn.
#include <cmath>
#include <limits>

#include "csrc/common/block_pairs.h"
#include "csrc/common/pair_tiles.h"
#include "csrc/ops/similarity_lse.h"

namespace sslfast {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kMaxBlock = 256;

using Problem = SimilarityLseProblem;

template <typename T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

template <typename T>
SSLFAST_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
T max_lanes(Vec<T> v) {
  T max = v[0];
  for (int i = 1; i < kLanes<T>; ++i) max = v[i] > max ? v[i] : max;
  return max;
}

/// What is left out of tiles without keys is not the same for rows and columns.
bool symmetric(const Problem& p) { return p.key_data == nullptr; }

bool excluded(const Problem& p, int64_t i, int64_t j) {
  for (int64_t e = 0; e < p.exclude_count; ++e)
    if (p.exclude[i * p.exclude_count + e] == j) return true;
  return false;
}

/// Calls visit(r, c) for the pairs of a tile that `exclude` names, without keys from either side; some come twice.
template <typename Engine, typename Visit>
void for_each_excluded(const Problem& p, const Tile<Engine>& tile, const Visit& visit) {
  for (int64_t r = 0; r < tile.rows && tile.row + r < p.rows; ++r)
    for (int64_t e = 0; e < p.exclude_count; ++e) {
      const int64_t c = p.exclude[(tile.row + r) * p.exclude_count + e] - tile.col;
      if (c >= 0 && c < tile.cols) visit(r, c);
    }
  if (!symmetric(p)) return;
  for (int64_t c = 0; c < tile.cols && tile.col + c < p.keys; ++c)
    for (int64_t e = 0; e < p.exclude_count; ++e) {
      const int64_t r = p.exclude[(tile.col + c) * p.exclude_count + e] - tile.row;
      if (r >= 0 && r < tile.rows) visit(r, c);
    }
}

template <typename T>
T* hidden_of_thread(const Problem& p) {
  return static_cast<T*>(p.hidden) + at::get_thread_num() * p.hidden_count;
}

template <typename T>
void fill_biases(const Problem& p) {
  T *row_bias = static_cast<T*>(p.row_bias), *column_bias = static_cast<T*>(p.column_bias);
  const T* bias = static_cast<const T*>(p.key_bias);
  for (int64_t j = 0; j < padded(p.keys); ++j) column_bias[j] = j >= p.keys ? kMinusInfinity<T> : bias ? bias[j] : T(0);
  for (int64_t i = 0; i < padded(p.rows); ++i)
    row_bias[i] = symmetric(p) ? column_bias[i] : i < p.rows ? T(0) : kMinusInfinity<T>;
}

/// Sets a new maximum and shrinks what was summed so far; returns by how much. exp takes its argument minus `shift`:
/// the maximum, or 0 while there is none.
template <typename T>
double raise_maximum(T found, T& max, double& sum, T& shift) {
  const T before = max;
  max = found > before ? found : before;
  shift = max == kMinusInfinity<T> ? T(0) : max;
  const double change = before == shift ? 1.0 : std::exp(static_cast<double>(before) - static_cast<double>(shift));
  sum *= change;
  return change;
}

/// Adds a tile to the statistics of its rows. kKeep: the tile becomes its exponentials, and change[r] is by how much
/// earlier sums of row r shrink.
template <bool kKeep, typename Engine, typename T>
void add_to_rows(const Tile<Engine>& tile, const T* column_bias, T* max, double* sum, T* change) {
  constexpr int kWidth = Engine::kWidth, kVecs = kWidth / kLanes<T>;
  alignas(64) T partial[kMaxBlock * kLanes<T>];  // a vector for each row
  alignas(64) T shift[kMaxBlock];
  for (int64_t r = 0; r < tile.rows; ++r) store(partial + r * kLanes<T>, broadcast(kMinusInfinity<T>));
  for (int64_t c = 0; c < tile.cols; c += kWidth)
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* x = tile.data + c * tile.rows + r * kWidth;
      Vec<T> most = load(partial + r * kLanes<T>);
      for (int v = 0; v < kVecs; ++v)
        most = larger<T>(load(x + v * kLanes<T>) + load(column_bias + tile.col + c + v * kLanes<T>), most);
      store(partial + r * kLanes<T>, most);
    }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const double shrunk = raise_maximum(max_lanes<T>(load(partial + r * kLanes<T>)), max[r], sum[r], shift[r]);
    if (kKeep) change[r] = static_cast<T>(shrunk);
    store(partial + r * kLanes<T>, Vec<T>{});
  }
  for (int64_t c = 0; c < tile.cols; c += kWidth)
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* x = tile.data + c * tile.rows + r * kWidth;
      Vec<T> total = load(partial + r * kLanes<T>);
      for (int v = 0; v < kVecs; ++v) {
        const Vec<T> e =
            vec_exp(load(x + v * kLanes<T>) + load(column_bias + tile.col + c + v * kLanes<T>) - broadcast(shift[r]));
        if (kKeep) store(x + v * kLanes<T>, e);
        total += e;
      }
      store(partial + r * kLanes<T>, total);
    }
  for (int64_t r = 0; r < tile.rows; ++r) sum[r] += sum_lanes<T>(load(partial + r * kLanes<T>));
}

/// Adds a tile to the statistics of its columns.
template <typename Engine, typename T>
void add_to_columns(const Tile<Engine>& tile, const T* row_bias, T* max, double* sum) {
  constexpr int kWidth = Engine::kWidth, kVecs = kWidth / kLanes<T>;
  for (int64_t c = 0; c < tile.cols; c += kWidth) {
    const T* x = tile.data + c * tile.rows;
    alignas(64) T most[kWidth], shift[kWidth], total[kWidth] = {};
    for (int64_t k = 0; k < kWidth; ++k) most[k] = kMinusInfinity<T>;
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int v = 0; v < kVecs; ++v) {
        T* m = most + v * kLanes<T>;
        store(m, larger<T>(load(x + r * kWidth + v * kLanes<T>) + broadcast(row_bias[tile.row + r]), load(m)));
      }
    for (int64_t k = 0; k < kWidth; ++k) raise_maximum(most[k], max[c + k], sum[c + k], shift[k]);
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int v = 0; v < kVecs; ++v) {
        T* t = total + v * kLanes<T>;
        const Vec<T> l = load(x + r * kWidth + v * kLanes<T>) + broadcast(row_bias[tile.row + r]);
        store(t, load(t) + vec_exp(l - load(shift + v * kLanes<T>)));
      }
    for (int64_t k = 0; k < kWidth; ++k) sum[c + k] += total[k];
  }
}

/// Joins partial statistics, `count` of them `stride` apart, and returns the log-sum-exp. part[k]: what the k-th counts
/// in the whole.
template <typename T>
double join(const T* max, const double* sum, int64_t count, int64_t stride, double* part) {
  T most = kMinusInfinity<T>;
  for (int64_t k = 0; k < count; ++k) most = max[k * stride] > most ? max[k * stride] : most;
  const double shift = most == kMinusInfinity<T> ? 0 : most;
  double total = 0;
  for (int64_t k = 0; k < count; ++k) {
    part[k] = std::exp(max[k * stride] - shift);
    total += sum[k * stride] * part[k];
  }
  for (int64_t k = 0; k < count; ++k) part[k] = total == 0 ? 0 : part[k] / total;
  return std::log(total) + shift;
}

template <typename Engine>
void forward_between_rows(const SimilarityLseForwardParams& a) {
  using T = typename Engine::T;
  const Problem& p = a.problem;
  const auto z = Engine::matrix(p.packed_queries, padded(p.rows), padded(p.dim), kAsRows | kAsColumns);
  pack<Engine>(p.threads, z, p.query_data, p.rows, p.dim);
  T* max = static_cast<T*>(a.row_max);
  const T *row_bias = static_cast<const T*>(p.row_bias), *column_bias = static_cast<const T*>(p.column_bias);
  std::fill(max, max + z.rows, kMinusInfinity<T>);
  std::fill(a.row_sum, a.row_sum + z.rows, 0.0);
  for_each_block_pair(p.threads, (z.rows + p.plan.row_block - 1) / p.plan.row_block, [&](int64_t i, int64_t j) {
    const Engine engine;
    const Tile<Engine> tile(p, i * p.plan.row_block, j * p.plan.row_block);
    engine.similarities(z, tile.row, tile.rows, z, tile.col, tile.cols, static_cast<T>(p.scale), tile.data);
    for (int64_t r = 0; r < tile.rows && i == j; ++r) tile(r, r) = kMinusInfinity<T>;
    T* hidden = hidden_of_thread<T>(p);
    for_each_excluded(p, tile, [&](int64_t r, int64_t c) { *hidden++ = tile(r, c); });
    for_each_excluded(p, tile, [&](int64_t r, int64_t c) {
      if (excluded(p, tile.row + r, tile.col + c)) tile(r, c) = kMinusInfinity<T>;
    });
    add_to_rows<false>(tile, column_bias, max + tile.row, a.row_sum + tile.row, static_cast<T*>(nullptr));
    if (i == j) return;
    hidden = hidden_of_thread<T>(p);
    for_each_excluded(p, tile, [&](int64_t r, int64_t c) {
      const T similarity = *hidden++;
      tile(r, c) = excluded(p, tile.col + c, tile.row + r) ? kMinusInfinity<T> : similarity;
    });
    add_to_columns(tile, row_bias, max + tile.col, a.row_sum + tile.col);
  });
  double part;
  for (int64_t i = 0; i < p.rows; ++i) a.lse[i] = join(max + i, a.row_sum + i, 1, 0, &part);
}

template <typename Engine>
void forward_with_keys(const SimilarityLseForwardParams& a) {
  using T = typename Engine::T;
  using Z = typename Engine::Z;
  const Problem& p = a.problem;
  const auto& plan = p.plan;
  const int64_t rows = padded(p.rows), keys = padded(p.keys), dim = padded(p.dim);
  const auto q = Engine::matrix(p.packed_queries, rows, dim, kAsRows);
  pack<Engine>(p.threads, q, p.query_data, p.rows, p.dim);

  T *row_max = static_cast<T*>(a.row_max), *column_max = static_cast<T*>(a.column_max);
  T* key_sums = static_cast<T*>(a.key_sums);
  const T *row_bias = static_cast<const T*>(p.row_bias), *column_bias = static_cast<const T*>(p.column_bias);
  std::fill(row_max, row_max + plan.segments * rows, kMinusInfinity<T>);
  std::fill(a.row_sum, a.row_sum + plan.segments * rows, 0.0);
  if (a.lse_columns) {
    std::fill(column_max, column_max + plan.groups * keys, kMinusInfinity<T>);
    std::fill(a.column_sum, a.column_sum + plan.groups * keys, 0.0);
  }
  parallel_for(p.threads, plan.groups * plan.segments, 1, [&](int64_t begin, int64_t end) {
    const Engine engine;
    const int use = a.key_sum ? kAsColumns | kForGradients : kAsColumns;
    char* packed = static_cast<char*>(a.packed_keys) + at::get_thread_num() * 3 * plan.key_block * dim * sizeof(T);
    alignas(64) T change[kMaxBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task % plan.groups, segment = task / plan.groups;
      const int64_t first_row = group * plan.group_blocks * plan.row_block;
      const int64_t last_row = std::min(rows, first_row + plan.group_blocks * plan.row_block);
      const int64_t first_key = segment * plan.segment_blocks * plan.key_block;
      const int64_t last_key = std::min(keys, first_key + plan.segment_blocks * plan.key_block);
      T *max = row_max + segment * rows, *sums = key_sums + segment * rows * dim;
      double* sum = a.row_sum + segment * rows;
      if (a.key_sum)
        for (int64_t row = first_row; row < last_row; ++row) Engine::clear_row_sum(sums, rows, dim, row);
      for (int64_t col = first_key; col < last_key; col += plan.key_block) {
        const int64_t cols = std::min(plan.key_block, keys - col);
        const auto k = Engine::matrix(packed, cols, dim, use);
        for (int64_t c = 0; c < cols; c += kMatrixPad)
          Engine::pack(k, c, static_cast<const Z*>(p.key_data) + (col + c) * p.dim, p.keys - col - c, p.dim);
        for (int64_t row = first_row; row < last_row; row += plan.row_block) {
          const Tile<Engine> tile(p, row, col);
          engine.similarities(q, row, tile.rows, k, 0, cols, static_cast<T>(p.scale), tile.data);
          for_each_excluded(p, tile, [&](int64_t r, int64_t c) { tile(r, c) = kMinusInfinity<T>; });
          if (a.lse_columns)
            add_to_columns(tile, row_bias, column_max + group * keys + col, a.column_sum + group * keys + col);
          if (!a.key_sum) {
            add_to_rows<false>(tile, column_bias, max + row, sum + row, change);
            continue;
          }
          add_to_rows<true>(tile, column_bias, max + row, sum + row, change);
          for (int64_t r = 0; r < tile.rows; ++r)
            if (change[r] != 1) Engine::scale_row_sum(sums, rows, dim, row + r, change[r]);
          engine.prepare(tile.data, tile.rows, cols, tile.weights, false);
          engine.add_row_sums(tile.data, tile.weights, tile.rows, k, 0, cols, sums, rows, row);
        }
      }
    }
  });

  parallel_for(p.threads, p.rows, 64, [&](int64_t begin, int64_t end) {
    double part[kSimilarityLseMaxParts];
    T* row_of_sums = static_cast<T*>(a.packed_keys) + at::get_thread_num() * 3 * plan.key_block * dim;
    for (int64_t i = begin; i < end; ++i) {
      a.lse[i] = join(row_max + i, a.row_sum + i, plan.segments, rows, part);
      if (!a.key_sum) continue;
      T* out = static_cast<T*>(a.key_sum) + i * p.dim;
      std::fill(out, out + p.dim, T(0));
      for (int64_t s = 0; s < plan.segments; ++s) {
        Engine::read_row_sum(key_sums + s * rows * dim, rows, dim, i, row_of_sums);
        for (int64_t d = 0; d < p.dim; ++d) out[d] += static_cast<T>(part[s]) * row_of_sums[d];
      }
    }
  });
  if (!a.lse_columns) return;
  parallel_for(p.threads, p.keys, 64, [&](int64_t begin, int64_t end) {
    double part[kSimilarityLseMaxParts];
    for (int64_t j = begin; j < end; ++j)
      a.lse_columns[j] = join(column_max + j, a.column_sum + j, plan.groups, keys, part) + column_bias[j];
  });
}

/// What turns a scaled similarity into its weight exp(l − lse)·grad, for one direction. shift is lse in T, and factor =
/// grad·exp(shift − lse) makes up for its rounding. Rows without gradient and padding: weight 0, whatever the
/// similarity.
template <typename T>
void fill_weights(const double* lse, const double* grad, const T* bias, int64_t count, int64_t padded_count, T* shift,
                  T* factor) {
  for (int64_t i = 0; i < padded_count; ++i) {
    if (i >= count || lse[i] == kMinusInfinity<double>) {
      shift[i] = std::numeric_limits<T>::max();
      factor[i] = 0;
    } else {
      const double exact = lse[i] - (bias ? bias[i] : T(0));
      shift[i] = static_cast<T>(exact);
      factor[i] = static_cast<T>(grad[i] * std::exp(shift[i] - exact));
    }
  }
}

template <typename T>
struct Directions {
  const T *column_bias, *row_shift, *row_factor;     // of l_ij − lse_i
  const T *row_bias, *column_shift, *column_factor;  // of l_ij − lse'_j, if there is that direction

  T by_row(T similarity, int64_t i, int64_t j) const {
    return vec_exp(broadcast(similarity) + column_bias[j] - row_shift[i])[0] * row_factor[i];
  }
  T by_column(T similarity, int64_t i, int64_t j) const {
    return vec_exp(broadcast(similarity) + row_bias[i] - column_shift[j])[0] * column_factor[j];
  }
};

/// The tile x of scaled similarities becomes W. Returns Σ W·x, in which what is left out (−∞, of weight 0) counts for
/// nothing.
template <bool kColumns, typename Engine, typename T>
double to_weights(const Tile<Engine>& tile, const Directions<T>& by) {
  constexpr int kWidth = Engine::kWidth, kVecs = kWidth / kLanes<T>;
  double dot = 0;
  for (int64_t c = 0; c < tile.cols; c += kWidth) {
    Vec<T> panel_dot{};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.row + r;
      for (int v = 0; v < kVecs; ++v) {
        const int64_t j = tile.col + c + v * kLanes<T>;
        T* at = tile.data + c * tile.rows + r * kWidth + v * kLanes<T>;
        const Vec<T> x = load(at);
        Vec<T> w = vec_exp(x + load(by.column_bias + j) - broadcast(by.row_shift[i])) * by.row_factor[i];
        if (kColumns)
          w += vec_exp(x + broadcast(by.row_bias[i]) - load(by.column_shift + j)) * load(by.column_factor + j);
        store(at, w);
        panel_dot += w * (x < T(-1e20) ? broadcast(T(-1e20)) : x);
      }
    }
    dot += sum_lanes<T>(panel_dot);
  }
  return dot;
}

/// Scaled similarities of a tile → W, without what is left out. Returns the sum of their products.
template <typename Engine, typename T>
double weigh(const Problem& p, const Tile<Engine>& tile, const Directions<T>& by) {
  const bool diagonal = symmetric(p) && tile.row == tile.col;
  T* hidden = hidden_of_thread<T>(p);
  for_each_excluded(p, tile, [&](int64_t r, int64_t c) { *hidden++ = tile(r, c); });
  for_each_excluded(p, tile, [&](int64_t r, int64_t c) { tile(r, c) = kMinusInfinity<T>; });
  for (int64_t r = 0; r < tile.rows && diagonal; ++r) tile(r, r) = kMinusInfinity<T>;
  double dot = by.column_factor ? to_weights<true>(tile, by) : to_weights<false>(tile, by);
  if (!symmetric(p)) return dot;
  // One of the two rows of a pair may leave it out and the other not.
  hidden = hidden_of_thread<T>(p);
  for_each_excluded(p, tile, [&](int64_t r, int64_t c) {
    const int64_t i = tile.row + r, j = tile.col + c;
    const T x = *hidden++;
    const T weight =
        i == j ? T(0)
               : (excluded(p, i, j) ? T(0) : by.by_row(x, i, j)) + (excluded(p, j, i) ? T(0) : by.by_column(x, i, j));
    dot += static_cast<double>(weight - tile(r, c)) * x;
    tile(r, c) = weight;
  });
  return diagonal ? dot / 2 : dot;
}

template <typename Engine>
void backward(const SimilarityLseBackwardParams& a) {
  using T = typename Engine::T;
  using Z = typename Engine::Z;
  const Problem& p = a.problem;
  const auto& plan = p.plan;
  const int64_t rows = padded(p.rows), keys = padded(p.keys), dim = padded(p.dim);
  const int use = symmetric(p) ? kAsRows | kAsColumns | kForGradients : kAsRows | kForGradients;
  const auto q = Engine::matrix(p.packed_queries, rows, dim, use);
  const auto k = symmetric(p) ? q : Engine::matrix(a.packed_keys, keys, dim, kAsColumns | kForGradients);
  pack<Engine>(p.threads, q, p.query_data, p.rows, p.dim);
  if (!symmetric(p)) pack<Engine>(p.threads, k, p.key_data, p.keys, p.dim);

  T *row_shift = static_cast<T*>(a.row_shift), *row_factor = static_cast<T*>(a.row_factor);
  T *column_shift = static_cast<T*>(a.column_shift), *column_factor = static_cast<T*>(a.column_factor);
  const T *row_bias = static_cast<const T*>(p.row_bias), *column_bias = static_cast<const T*>(p.column_bias);
  fill_weights(a.lse, a.grad_lse, static_cast<const T*>(nullptr), p.rows, rows, row_shift, row_factor);
  if (symmetric(p)) {
    column_shift = row_shift;
    column_factor = row_factor;
  } else if (a.lse_columns) {
    fill_weights(a.lse_columns, a.grad_columns, column_bias, p.keys, keys, column_shift, column_factor);
  } else {
    column_factor = nullptr;
  }
  const Directions<T> by{column_bias, row_shift, row_factor, row_bias, column_shift, column_factor};

  std::fill(a.row_dot, a.row_dot + p.rows, 0.0);
  T *row_sums = static_cast<T*>(a.row_sums), *column_sums = static_cast<T*>(a.column_sums);
  parallel_for(p.threads, rows, 64,
               [&](int64_t begin, int64_t end) { std::fill(row_sums + begin * dim, row_sums + end * dim, T(0)); });
  parallel_for(p.threads, keys, 64, [&](int64_t begin, int64_t end) {
    std::fill(column_sums + begin * dim, column_sums + end * dim, T(0));
  });
  const auto add_tile = [&](int64_t i, int64_t j) {
    const Engine engine;
    const Tile<Engine> tile(p, i * plan.row_block, j * plan.key_block);
    const bool diagonal = symmetric(p) && i == j;
    engine.similarities(q, tile.row, tile.rows, k, tile.col, tile.cols, static_cast<T>(p.scale), tile.data);
    a.row_dot[tile.row] += weigh(p, tile, by);
    engine.prepare(tile.data, tile.rows, tile.cols, tile.weights, !diagonal);
    engine.add_row_sums(tile.data, tile.weights, tile.rows, k, tile.col, tile.cols, row_sums, rows, tile.row);
    if (!diagonal)
      engine.add_column_sums(tile.data, tile.weights, tile.cols, q, tile.row, tile.rows, column_sums, keys, tile.col);
  };
  const int64_t row_blocks = (rows + plan.row_block - 1) / plan.row_block;
  if (symmetric(p))
    for_each_block_pair(p.threads, row_blocks, add_tile);
  else
    for_each_block_of_a_rectangle(p.threads, row_blocks, (keys + plan.key_block - 1) / plan.key_block, add_tile);

  const T scale = static_cast<T>(p.scale);
  parallel_for(p.threads, p.rows, 64, [&](int64_t begin, int64_t end) {
    T *sum = static_cast<T*>(a.row_scratch) + 2 * at::get_thread_num() * dim, *other = sum + dim;
    for (int64_t i = begin; i < end; ++i) {
      const Z* own = static_cast<const Z*>(p.query_data) + i * p.dim;
      Z* out = static_cast<Z*>(a.grad_queries) + i * p.dim;
      Engine::read_row_sum(row_sums, rows, dim, i, sum);
      if (symmetric(p)) {
        Engine::read_column_sum(column_sums, keys, dim, i, other);
        for (int64_t d = 0; d < p.dim; ++d) sum[d] += other[d];
      }
      for (int64_t d = 0; d < p.dim; ++d) out[d] = static_cast<Z>(scale * sum[d]);
      if (p.scale != 0) continue;  // where row_dot has Σ W·s·⟨q, k⟩
      for (int64_t d = 0; d < p.dim; ++d)
        a.row_dot[i] += static_cast<double>(sum[d]) * static_cast<double>(static_cast<T>(own[d]));
      if (symmetric(p)) a.row_dot[i] /= 2;
    }
  });
  double total = 0;
  for (int64_t i = 0; i < p.rows; ++i) total += a.row_dot[i];
  *a.grad_scale = p.scale == 0 ? total : total / p.scale;
  if (symmetric(p)) return;
  parallel_for(p.threads, p.keys, 64, [&](int64_t begin, int64_t end) {
    T* sum = static_cast<T*>(a.row_scratch) + 2 * at::get_thread_num() * dim;
    for (int64_t j = begin; j < end; ++j) {
      Engine::read_column_sum(column_sums, keys, dim, j, sum);
      Z* out = static_cast<Z*>(a.grad_keys) + j * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) out[d] = static_cast<Z>(scale * sum[d]);
    }
  });
}

}  // namespace

void launch_similarity_lse_forward_cpu(const SimilarityLseForwardParams& p) {
  with_engine(p.problem.dtype, p.problem.plan.bf16_products, [&]<typename Engine>() {
    fill_biases<typename Engine::T>(p.problem);
    symmetric(p.problem) ? forward_between_rows<Engine>(p) : forward_with_keys<Engine>(p);
  });
}

void launch_similarity_lse_backward_cpu(const SimilarityLseBackwardParams& p) {
  with_engine(p.problem.dtype, p.problem.plan.bf16_products, [&]<typename Engine>() {
    fill_biases<typename Engine::T>(p.problem);
    backward<Engine>(p);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
