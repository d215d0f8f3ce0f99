// The sigmoid loss of all pairs and its gradients on the CPU; csrc/ops/sigmoid_loss.h has the formulas.
//
// One tile of similarities after the other is made in the L2 cache of its thread, where it becomes a part of the loss
// and the weights of the gradients; none is ever stored. One text serves two engines: products of float or double
// panels (csrc/common/panel_matrix.h) and products of bfloat16 terms (csrc/common/bf16_matrix.h).
//
//   arithmetic   3 matrix products of M·N·D, or 1 without gradients; one exp and one division a pair
//   memory       O((M + N)·D); a tile is at most 256 × 256
//
// Blocks of rows and keys meet in rounds (csrc/common/block_pairs.h) and tiles add to the sums of their blocks in turn:
// the same bits on any number of threads.
#include <cmath>
#include <limits>

#include "csrc/common/block_pairs.h"
#include "csrc/common/pair_tiles.h"
#include "csrc/ops/sigmoid_loss.h"

namespace sslfast {
namespace CPU_CAPABILITY {
namespace {

using Params = SigmoidLossForwardParams;

struct Totals {
  double loss, grad_bias, grad_scale;
};

constexpr int64_t kChunk =
    32;  // rows of a tile that are summed up in T, and of which 2^(rows·lanes) fits into a double
static_assert(kMatrixPad % kChunk == 0);

/// Σ log(1 + e) over the lanes, of each of which Π(1 + e) − 1 is known. With the 1 taken out, small e keep their
/// digits, and there is one logarithm for hundreds of pairs.
template <typename T>
double log1p_of_products(Vec<T> products) {
  double product = 0;
  for (int i = 0; i < kLanes<T>; ++i) product += products[i] + product * products[i];
  return std::log1p(product);
}

/// The tile of products x becomes W, where wanted. kOwn: rows' own keys are among its columns.
template <bool kOwn, bool kGradients, typename Engine, typename T = typename Engine::T>
void weigh(const Params& p, const Tile<Engine>& tile, Totals& totals) {
  constexpr int64_t kWidth = Engine::kWidth;
  const int64_t valid = std::min(tile.rows, p.rows - tile.row);
  const T scale = static_cast<T>(p.scale);
  using Lane = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  IntVec<T> lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
  for (int64_t c = 0; c < tile.cols; c += kLanes<T>) {
    T* column = &tile(0, c);
    const Vec<T> bias = load(static_cast<const T*>(p.key_bias) + tile.col + c);
    const int64_t own_of_first = p.first_key + tile.row - (tile.col + c);
    for (int64_t first = 0; first < valid; first += kChunk) {
      Vec<T> above{}, products{}, weights{}, dot{};
      const int64_t last = std::min(first + kChunk, valid);
      for (int64_t r = first; r < last; ++r) {
        const Vec<T> x = load(column + r * kWidth), logit = x * scale + bias;
        const int64_t own_lane = p.first_key + tile.row + r < p.keys ? own_of_first + r : -1;
        const IntVec<T> own = lanes == static_cast<Lane>(own_lane);
        const Vec<T> m = kOwn ? (own ? -logit : logit) : logit;  // the loss is log(1 + exp(m))
        const Vec<T> e = vec_exp(m > 0 ? -m : m);
        above += m > 0 ? m : Vec<T>{};
        products += e * products + e;
        if (!kGradients) continue;
        const Vec<T> sigmoid = (m > 0 ? broadcast(T(1)) : e) / (e + T(1));
        const Vec<T> w = kOwn ? (own ? -sigmoid : sigmoid) : sigmoid;
        store(column + r * kWidth, w);
        weights += w;
        dot += w * x;
      }
      totals.loss += static_cast<double>(sum_lanes<T>(above)) + log1p_of_products<T>(products);
      totals.grad_bias += sum_lanes<T>(weights);
      totals.grad_scale += sum_lanes<T>(dot);
    }
    for (int64_t r = valid; r < tile.rows && kGradients; ++r) store(column + r * kWidth, Vec<T>{});
  }
}

template <typename Engine>
Totals add_tile(const Params& p, const Tile<Engine>& tile) {
  Totals totals{};
  const int64_t first_own = tile.row + p.first_key;
  const bool own = first_own < tile.col + tile.cols && first_own + tile.rows > tile.col;
  if (p.grad_queries)
    own ? weigh<true, true>(p, tile, totals) : weigh<false, true>(p, tile, totals);
  else
    own ? weigh<true, false>(p, tile, totals) : weigh<false, false>(p, tile, totals);
  return totals;
}

template <typename Engine>
void forward(const Params& p) {
  using T = typename Engine::T;
  const auto& plan = p.plan;
  const int64_t rows = padded(p.rows), keys = padded(p.keys), dim = padded(p.dim);
  const int more = p.grad_queries ? kForGradients : 0;
  const auto q = Engine::matrix(p.packed_queries, rows, dim, kAsRows | more);
  const auto k = Engine::matrix(p.packed_keys, keys, dim, kAsColumns | more);
  pack<Engine>(p.threads, q, p.query_data, p.rows, p.dim);
  pack<Engine>(p.threads, k, p.key_data, p.keys, p.dim);
  T* key_bias = static_cast<T*>(p.key_bias);
  for (int64_t j = 0; j < keys; ++j)  // of padding it makes the loss 0
    key_bias[j] = j < p.keys ? static_cast<T>(p.bias) : -std::numeric_limits<T>::infinity();

  T *row_sums = static_cast<T*>(p.row_sums), *column_sums = static_cast<T*>(p.column_sums);
  const auto clear = [&](T* sums, int64_t count) {
    parallel_for(p.threads, count, 64,
                 [&](int64_t begin, int64_t end) { std::fill(sums + begin * dim, sums + end * dim, T(0)); });
  };
  if (p.grad_queries) {
    clear(row_sums, rows);
    clear(column_sums, keys);
  }
  const int64_t row_blocks = count_blocks(rows, plan.row_block);
  std::fill(p.totals, p.totals + 3 * row_blocks, 0.0);
  for_each_block_of_a_rectangle(p.threads, row_blocks, count_blocks(keys, plan.key_block), [&](int64_t i, int64_t j) {
    const Engine engine;
    const Tile<Engine> tile(p, i * plan.row_block, j * plan.key_block);
    engine.similarities(q, tile.row, tile.rows, k, tile.col, tile.cols, T(1), tile.data);
    const Totals found = add_tile(p, tile);
    double* totals = p.totals + 3 * i;
    totals[0] += found.loss;
    totals[1] += found.grad_bias;
    totals[2] += found.grad_scale;
    if (!p.grad_queries) return;
    engine.prepare(tile.data, tile.rows, tile.cols, tile.weights, true);
    engine.add_row_sums(tile.data, tile.weights, tile.rows, k, tile.col, tile.cols, row_sums, rows, tile.row);
    engine.add_column_sums(tile.data, tile.weights, tile.cols, q, tile.row, tile.rows, column_sums, keys, tile.col);
  });

  *p.loss = *p.grad_bias = *p.grad_scale = 0;
  for (int64_t i = 0; i < row_blocks; ++i) {
    *p.loss += p.totals[3 * i];
    *p.grad_bias += p.totals[3 * i + 1];
    *p.grad_scale += p.totals[3 * i + 2];
  }
  if (!p.grad_queries) return;
  const auto write = [&](const T* sums, int64_t count, void* gradient, const auto& read) {
    parallel_for(p.threads, count, 64, [&](int64_t begin, int64_t end) {
      T* sum = static_cast<T*>(p.row_scratch) + at::get_thread_num() * dim;
      for (int64_t i = begin; i < end; ++i) {
        read(sums, padded(count), dim, i, sum);
        T* out = static_cast<T*>(gradient) + i * p.dim;
        for (int64_t d = 0; d < p.dim; ++d) out[d] = static_cast<T>(p.scale) * sum[d];
      }
    });
  };
  write(row_sums, p.rows, p.grad_queries, Engine::read_row_sum);
  write(column_sums, p.keys, p.grad_keys, Engine::read_column_sum);
}

}  // namespace

void launch_sigmoid_loss_forward_cpu(const SigmoidLossForwardParams& p) {
  with_engine(p.dtype, p.plan.bf16_products, [&]<typename Engine>() { forward<Engine>(p); });
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
