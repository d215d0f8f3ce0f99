// The log-sum-exp of similarities on CUDA, forward and backward; csrc/ops/similarity_lse.h has the formulas. The tiles
// are those of csrc/common/tile.cuh.
//
//   pack      rows, as they are, padded with zeros to whole slots and tiles
//   forward   tiles of 128×128 of Q·Kᵀ; a block takes a run of them in one row of tiles and keeps the maximum and the
//             sum of each of its rows, and if wanted of each column of a tile. Without keys only tiles on and above the
//             diagonal: their columns are rows too
//   combine   the partial sums of every row, or column, in a fixed order → lse
//   backward  csrc/common/weighted_rows.cuh: a block owns 128 rows I and kSlice columns of their gradient and visits 64
//             rows J after the other: Q_I·K_Jᵀ → W_IJ → dQ_I += W_IJ·K_J. The gradient of the keys is the same with the
//             two exchanged; without keys one launch does both
//   finish    sums what several blocks found of a row, times the scale
//
// Arithmetic, in products of M·N·D: forward 1 (½ without keys), backward 2 for each side (2 in all without keys), and
// as many times M·N exponentials, twice that with columns. Making W anew for each side costs one product more than the
// least; leaving partial gradients in memory would cost more (csrc/ops/cuda/info_nce_kernel.cu has the numbers). Keys
// that need no gradient: their weighted sum is one side.
//
// Softmax in base 2. Each row, and each column of a tile, follows its own maximum: nothing is known of the lengths.
// Determinism: no atomics; the division of work depends on M, N, D and the type alone.
#include "csrc/common/launch.cuh"
#include "csrc/common/weighted_rows.cuh"
#include "csrc/ops/cuda/similarity_lse_kernel.h"

namespace sslfast {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int kBlock = kPackedRows;  // rows and columns of a forward tile

using Problem = SimilarityLseCudaProblem;

/// A packed matrix, and the pairs that its rows leave out.
struct Matrix : PackedMatrix {
  const int64_t* exclude;  // (count, exclude_count), or null
  float *scratch, *unit;   // of MatrixUnit
};

Matrix take_matrix(ProductType type, int64_t count, int64_t dim, Workspace& workspace) {
  Matrix m = {packed_matrix(type, count, dim), nullptr, nullptr, nullptr};
  m.data = workspace.take<char>(packed_bytes(m));
  const MatrixUnit unit(type, workspace);
  m.scratch = unit.scratch;
  m.unit = unit.unit;
  return m;
}

template <typename Math>
void launch_pack(const Matrix& m, const void* source, int64_t dim, cudaStream_t stream) {
  launch_tile_pack<Math>("similarity_lse_pack", m, source, dim, m.scratch, stream);
}

/// The pairs of a tile that are left out, as bits of the accumulator's elements: of the sums of its rows, and of its
/// columns.
template <typename Bits>
struct Excluded {
  Bits by_rows = 0, by_columns = 0;
};

/// Between queries and keys a pair that a row leaves out is out of both sums; among queries it is out of the row's own.
template <int kN, typename Bits>
__device__ __forceinline__ Excluded<Bits> find_excluded(const Matrix& a, const Matrix& b, int exclude_count,
                                                        int first_row, int first_column) {
  Excluded<Bits> out;
  if (a.exclude != nullptr)
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + warp_row() + tile_row(2 * h);
      for (int e = 0; e < exclude_count && row < a.count; ++e) {
        const int64_t column = load_global(a.exclude + int64_t{row} * exclude_count + e) - first_column;
        if (column < 0 || column >= 8 * kN) continue;
#pragma unroll
        for (int i = 0; i < kN * 4; ++i)
          if (i % 4 / 2 == h && i / 4 * 8 + tile_column(i) == column) out.by_rows |= Bits{1} << i;
      }
    }
  if (b.exclude != nullptr)
    for (int at = 0; at < 2 * kN; ++at) {
      const int column = first_column + 8 * (at / 2) + tile_column(at % 2);
      for (int e = 0; e < exclude_count && column < b.count; ++e) {
        const int64_t row = load_global(b.exclude + int64_t{column} * exclude_count + e) - first_row;
        if (row < 0 || row >= kTileRows) continue;
#pragma unroll
        for (int i = 0; i < kN * 4; ++i)
          if (i / 4 * 2 + i % 2 == at && warp_row() + tile_row(i % 4) == row) out.by_columns |= Bits{1} << i;
      }
    }
  if (a.exclude == nullptr || b.exclude == nullptr) out.by_rows = out.by_columns = out.by_rows | out.by_columns;
  return out;
}

// ---- forward

struct BiasParams {
  const float* bias;  // (count), or null
  int count, padded;
  float* out;  // (padded): bias · log₂e; kMasked for padding
};

__global__ void __launch_bounds__(kThreads) similarity_lse_bias_kernel(const BiasParams p) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= p.padded) return;
  const float bias = row >= p.count ? kMasked : p.bias == nullptr ? 0.0f : load_global(p.bias + row) * kLog2E;
  store_global(p.out + row, bias);
}

void launch_bias(const float* bias, const Matrix& m, float* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(m.padded, kThreads)));
  launch(similarity_lse_bias_kernel, {"similarity_lse_bias", grid, kThreads, 0, stream},
         BiasParams{bias, m.count, m.padded, out});
}

struct ForwardParams {
  Matrix a, b;  // queries and keys; the same without keys
  bool symmetric;
  int exclude_count;
  const float* scale;
  const float *row_bias, *column_bias;  // (padded)
  int run;                              // tiles of a block
  SlotPlan slots;
  float *row_max, *row_sum;        // [slots][padded]; with symmetry slot k < I of row block I is from the columns
                                   // of tile (k, I)
  float *column_max, *column_sum;  // [row blocks][padded], or with symmetry those of the rows
};

/// Behind the slots: sums of columns by the eight warps, biases of the columns of tiles under way, and of the rows.
constexpr int64_t kForwardSumsBytes = kThreads / 32 * kBlock * int64_t{sizeof(MaxSum)};
constexpr int64_t kForwardMoreBytes = kForwardSumsBytes + (kTileBuffers + 1) * kBlock * int64_t{sizeof(float)};

/// Two, so that one computes exponentials while the other multiplies, where there are registers for it.
template <typename Math, bool kGeneral>
inline constexpr int kForwardBlocksPerSm = SSLFAST_WGMMA && Math::kParts == 1 && !kGeneral ? 2 : 1;

/// What products of packed rows are multiplied by.
__device__ __forceinline__ float log2_scale(const float* scale, const float* row_unit, const float* column_unit) {
  return load_global(scale) * kLog2E * (unit_of(row_unit) * unit_of(column_unit));
}

/// Exponentials of one tile and one warp can share their maximum where all logits are this close (to base 2).
constexpr float kSharedRange = 100.0f;

/// The sums of a tile's columns over the 16 rows of this warp → sums[column]. x: logits without bias, to base 2.
__device__ __forceinline__ void column_sums_of_warp(const float (&x)[16][4], const float (&row_bias)[2],
                                                    uint64_t left_out, MaxSum* sums) {
  constexpr int kN = 16;
  const int lane = threadIdx.x % 32;
  float most = kMasked, least = left_out == 0 ? -kMasked : kMasked;
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float y = x[n][i] + row_bias[i / 2];
      most = fmaxf(most, y);
      least = fminf(least, y);
    }
#pragma unroll
  for (int other = 1; other < 32; other *= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, other));
    least = fminf(least, __shfl_xor_sync(0xFFFFFFFFu, least, other));
  }
  if (most - least <= kSharedRange) {  // not where there is a NaN
    float c[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        c[n][e] = fast_exp2(x[n][e] + (row_bias[0] - most)) + fast_exp2(x[n][2 + e] + (row_bias[1] - most));
    sum_columns(c);
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[8 * (lane / 4 * 2 + k) + tile_column(e)] = {most, c[k][e]};
    return;
  }
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float y[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) y[h] = left_out >> (4 * n + 2 * h + e) & 1 ? kMasked : x[n][2 * h + e] + row_bias[h];
      MaxSum column = merge(MaxSum{y[0], 1.0f}, MaxSum{y[1], 1.0f});
#pragma unroll
      for (int other = 4; other < 32; other *= 2) column = merge(column, shuffle_xor(column, other));
      if (lane < 4) sums[8 * n + tile_column(e)] = column;
    }
}

/// Block (I, k): tiles (I, first + k·run …), first = I with symmetry. Only if kGeneral are there sums of columns,
/// symmetry and pairs left out.
template <typename Math, bool kGeneral>
__global__ void __launch_bounds__(kThreads, (kForwardBlocksPerSm<Math, kGeneral>))
    similarity_lse_forward_kernel(const ForwardParams p) {
  constexpr int kN = kBlock / 8;
  const int blocks = p.b.padded / kBlock;
  const int block_i = blockIdx.x, first_j = (p.symmetric ? block_i : 0) + blockIdx.y * p.run;
  if (first_j >= blocks) return;
  const int tiles = min(p.run, blocks - first_j), first_row = block_i * kBlock;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale2 = log2_scale(p.scale, p.a.unit, p.b.unit);

  MaxSum* column_sums = reinterpret_cast<MaxSum*>(shared_memory() + p.slots.bytes);     // [8][kBlock]
  float* column_bias = reinterpret_cast<float*>(column_sums + kThreads / 32 * kBlock);  // [kTileBuffers][kBlock]
  float* all_row_bias = column_bias + kTileBuffers * kBlock;                            // [kBlock]
  const auto of_tile = [&](int tile) {
    const int at = 4 * threadIdx.x;
    if (at >= kBlock) return;
    cp_async_16(column_bias + tile % kTileBuffers * kBlock + at, p.column_bias + (first_j + tile) * kBlock + at);
    if (tile == 0) cp_async_16(all_row_bias + at, p.row_bias + first_row + at);
  };
  TilePipeline<kBlock, false> pipeline(p.a, p.b, p.slots, block_i, first_j, tiles);

  MaxSum row[2] = {{kMasked, 0.0f}, {kMasked, 0.0f}};
  pipeline.start(of_tile);
  for (int tile = 0; tile < tiles; ++tile) {
    const int block_j = first_j + tile, first_column = block_j * kBlock;
    float x[kN][4];
    pipeline.template products<Math>(x, of_tile);

    const bool diagonal = kGeneral && p.symmetric && block_i == block_j;
    Excluded<uint64_t> out;
    const float* bias = column_bias + tile % kTileBuffers * kBlock;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] *= scale2;
    const auto add_rows = [&]<bool kWithout>(std::bool_constant<kWithout>) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = row[h].max, sum = 0.0f;
        const auto logit = [&](int n, int e) {
          const float y = x[n][2 * h + e] + bias[8 * n + tile_column(e)];
          return kWithout && (out.by_rows >> (4 * n + 2 * h + e) & 1) ? kMasked : y;
        };
#pragma unroll
        for (int k = 0; k < 2 * kN; ++k) most = fmaxf(most, logit(k / 2, k % 2));
#pragma unroll
        for (int k = 0; k < 2 * kN; ++k) sum += fast_exp2(logit(k / 2, k % 2) - most);
        row[h] = {most, row[h].sum * fast_exp2(row[h].max - most) + sum};
      }
    };
    if (kGeneral && (p.a.exclude != nullptr || p.b.exclude != nullptr || diagonal)) {
      out = find_excluded<kN, uint64_t>(p.a, p.b, p.exclude_count, first_row, first_column);
#pragma unroll
      for (int i = 0; i < 4 * kN && diagonal; ++i)
        if (warp_row() + tile_row(i % 4) == i / 4 * 8 + tile_column(i)) out.by_rows |= uint64_t{1} << i;
      add_rows(std::true_type());
    } else {
      add_rows(std::false_type());
    }
    if (!kGeneral || diagonal || p.column_max == nullptr) continue;  // on the diagonal its rows are its columns

    const float row_bias[2] = {all_row_bias[warp_row() + tile_row(0)], all_row_bias[warp_row() + tile_row(2)]};
    column_sums_of_warp(x, row_bias, out.by_columns, column_sums + warp * kBlock);
    __syncthreads();
    if (threadIdx.x < kBlock) {
      MaxSum sum = column_sums[threadIdx.x];
      for (int w = 1; w < kThreads / 32; ++w) sum = merge(sum, column_sums[w * kBlock + threadIdx.x]);
      const int64_t at = int64_t{block_i} * p.b.padded + first_column + threadIdx.x;
      store_global(p.column_max + at, sum.max);
      store_global(p.column_sum + at, sum.sum);
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    MaxSum sum = merge(row[h], shuffle_xor(row[h], 1));
    sum = merge(sum, shuffle_xor(sum, 2));
    if (lane % 4 != 0) continue;
    const int slot = (p.symmetric ? block_i : 0) + static_cast<int>(blockIdx.y);
    const int64_t at = int64_t{slot} * p.a.padded + first_row + warp_row() + tile_row(2 * h);
    store_global(p.row_max + at, sum.max);
    store_global(p.row_sum + at, sum.sum);
  }
}

struct CombineParams {
  const float *max, *sum;  // [slots][padded]
  int count, padded, slots;
  int blocks, run;    // with symmetry (blocks > 0) block I has I slots and one for each run of its own
  const float* bias;  // (padded), to base 2: what is added to the result; or null
  double* lse;        // out: (count)
};

/// 32 rows a block; each warp takes every eighth partial sum of them. Traffic: the partial sums, once.
__global__ void __launch_bounds__(kThreads) similarity_lse_combine_kernel(const CombineParams p) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x * 32 + lane, block = row / kBlock;
  const int slots = p.blocks > 0 ? block + (p.blocks - block + p.run - 1) / p.run : p.slots;
  MaxSum sum = {kMasked, 0.0f};
#pragma unroll 4
  for (int slot = warp; slot < slots; slot += kWarps) {
    const int64_t at = int64_t{slot} * p.padded + row;
    sum = merge(sum, MaxSum{load_global(p.max + at), load_global(p.sum + at)});
  }
  MaxSum* sums = reinterpret_cast<MaxSum*>(shared_memory());  // [kWarps][32]
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || row >= p.count) return;
  for (int w = 1; w < kWarps; ++w) sum = merge(sum, sums[w * 32 + lane]);
  const bool empty = sum.max <= kMasked / 2 && sum.sum == sum.sum;  // and no NaN in it
  const double own = p.bias == nullptr ? 0.0 : static_cast<double>(load_global(p.bias + row));
  const double lse2 = empty ? -HUGE_VAL : sum.max + log2(static_cast<double>(sum.sum)) + own;
  store_global(p.lse + row, lse2 * kLn2Double);
}

struct ForwardLayout {
  ForwardParams forward;
  CombineParams rows, columns;
  float *row_bias, *column_bias;
  bool general;
  int64_t workspace_bytes;
};

ForwardLayout forward_layout(const SimilarityLseForwardCudaParams& p) {
  const Problem& q = p.problem;
  ForwardLayout layout = {};
  ForwardParams& f = layout.forward;
  f.symmetric = q.key_data == nullptr;
  Workspace workspace{static_cast<char*>(q.workspace)};
  f.a = take_matrix(q.type, q.rows, q.dim, workspace);
  f.b = f.symmetric ? f.a : take_matrix(q.type, q.keys, q.dim, workspace);
  f.a.exclude = q.exclude;
  f.b.exclude = f.symmetric ? q.exclude : nullptr;
  f.exclude_count = q.exclude_count;
  f.scale = q.scale;
  layout.general = f.symmetric || p.lse_columns != nullptr || q.exclude != nullptr;
  f.slots = plan_slots(f.a.chunks, 0, kBlock, kForwardMoreBytes, q.type != ProductType::float32 && !layout.general);
  // Longer runs where there are blocks enough to fill a GPU anyway, so that Q_I is read less often.
  const int64_t row_blocks = f.a.padded / kBlock, blocks = f.b.padded / kBlock, tiles = row_blocks * blocks;
  f.run = static_cast<int>(tiles < 2048 ? 1 : tiles < 16384 ? tiles / 2048 : 8);
  const int64_t slots = f.symmetric ? blocks : divide_up(blocks, f.run);

  f.row_bias = layout.row_bias = workspace.take<float>(f.a.padded);
  f.column_bias = layout.column_bias = f.symmetric ? layout.row_bias : workspace.take<float>(f.b.padded);
  f.row_max = workspace.take<float>(slots * f.a.padded);
  f.row_sum = workspace.take<float>(slots * f.a.padded);
  if (f.symmetric) {
    f.column_max = f.row_max;
    f.column_sum = f.row_sum;
  } else if (p.lse_columns != nullptr) {
    f.column_max = workspace.take<float>(row_blocks * f.b.padded);
    f.column_sum = workspace.take<float>(row_blocks * f.b.padded);
  }
  layout.rows = {
      f.row_max, f.row_sum, f.a.count, f.a.padded, static_cast<int>(slots), f.symmetric ? static_cast<int>(blocks) : 0,
      f.run,     nullptr,   p.lse};
  layout.columns = {f.column_max, f.column_sum,  f.b.count,    f.b.padded, static_cast<int>(row_blocks), 0,
                    f.run,        f.column_bias, p.lse_columns};
  layout.workspace_bytes = workspace.used;
  return layout;
}

void launch_combine(const CombineParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(p.count, 32)));
  launch(similarity_lse_combine_kernel, {"similarity_lse_combine", grid, kThreads, kThreads * sizeof(MaxSum), stream},
         p);
}

template <typename Math>
void launch_forward(const SimilarityLseForwardCudaParams& p, cudaStream_t stream) {
  const Problem& q = p.problem;
  const ForwardLayout layout = forward_layout(p);
  const ForwardParams& f = layout.forward;
  launch_pack<Math>(f.a, q.query_data, q.dim, stream);
  if (!f.symmetric) launch_pack<Math>(f.b, q.key_data, q.dim, stream);
  launch_bias(f.symmetric ? q.key_bias : nullptr, f.a, layout.row_bias, stream);
  if (!f.symmetric) launch_bias(q.key_bias, f.b, layout.column_bias, stream);

  const dim3 grid(static_cast<unsigned>(f.a.padded / kBlock),
                  static_cast<unsigned>(divide_up(f.b.padded / kBlock, f.run)));
  const size_t shared_bytes = static_cast<size_t>(f.slots.bytes + kForwardMoreBytes);
  const LaunchConfig config = {"similarity_lse_forward", grid, kThreads, shared_bytes, stream};
  if (layout.general)
    launch(similarity_lse_forward_kernel<Math, true>, config, f);
  else
    launch(similarity_lse_forward_kernel<Math, false>, config, f);
  launch_combine(layout.rows, stream);
  if (p.lse_columns != nullptr) launch_combine(layout.columns, stream);
}

// ---- backward

/// W is rounded to the type of the data, which may be float16: this scale keeps its elements below 2¹⁵ and near it,
/// whatever the incoming gradient.
struct GradientScaleParams {
  const double *rows, *columns;  // incoming gradients, or null
  int row_count, column_count;
  float* gradient_scale;  // out: 2^(13 − exponent of the largest), 1 if that is zero or not finite
};

__global__ void __launch_bounds__(kThreads) similarity_lse_gradient_scale_kernel(const GradientScaleParams p) {
  float largest = p.rows == nullptr ? 1.0f : 0.0f;
  for (int i = threadIdx.x; i < p.row_count && p.rows != nullptr; i += kThreads)
    largest = fmaxf(largest, fabsf(static_cast<float>(load_global(p.rows + i))));
  for (int i = threadIdx.x; i < p.column_count && p.columns != nullptr; i += kThreads)
    largest = fmaxf(largest, fabsf(static_cast<float>(load_global(p.columns + i))));
  largest = block_reduce<kThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x != 0) return;
  const unsigned exponent = __float_as_uint(largest) >> 23;
  const bool usable = exponent > 14 && exponent < 254;
  store_global(p.gradient_scale, usable ? __uint_as_float((254 + 13 - exponent) << 23) : 1.0f);
}

/// What W takes of a row beside its products: W_ij = Σ over both 2^(y + bias of the other − lse2)·factor.
struct RowStats {
  float bias, lse2, factor, unused;
};

struct StatsParams {
  int count, padded;
  const float* bias;         // (count): of the row as a key; or null
  bool less_bias;            // lse is that of a column, and takes its bias in
  const double *lse, *grad;  // (count), or null: no lse of these rows; gradient 1
  const float* gradient_scale;
  RowStats* stats;  // out: (padded)
};

__global__ void __launch_bounds__(kThreads) similarity_lse_stats_kernel(const StatsParams p) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= p.padded) return;
  RowStats stats = {kMasked, -kMasked, 0.0f, 0.0f};
  if (row < p.count) {
    const float bias = p.bias == nullptr ? 0.0f : load_global(p.bias + row);
    stats.bias = bias * kLog2E;
    const double lse = p.lse == nullptr ? -HUGE_VAL : load_global(p.lse + row);
    if (lse != -HUGE_VAL) {
      const double exact = (lse - (p.less_bias ? bias : 0.0f)) * kLog2EDouble;
      const double grad = (p.grad == nullptr ? 1.0 : load_global(p.grad + row)) * load_global(p.gradient_scale);
      stats.lse2 = static_cast<float>(exact);
      stats.factor = static_cast<float>(grad * exp2(stats.lse2 - exact));  // makes up for the rounding
    }
  }
  store_global(p.stats + row, stats);
}

struct BackwardParams {
  WeightedRowsParams rows;
  const int64_t *row_exclude, *column_exclude;  // or null
  const float *row_unit, *column_unit;          // of the matrices, or null
  bool symmetric, by_rows, by_columns;          // whose sums there are gradients of
  int exclude_count;
  const float* scale;
  const RowStats *row_stats, *column_stats;  // (padded)
  float* dots;                               // [splits][row blocks]: Σ W·⟨a, b⟩ of the block, times the gradient scale
};

constexpr int64_t kStatsBytes = (kTileRows + kTileBuffers * kWeightedColumns) * int64_t{sizeof(RowStats)};

/// Products → W, and the sum of W·products.
struct SoftmaxWeights {
  static constexpr int kColumns = kWeightedColumns;
  const BackwardParams& p;
  RowStats *row_stats, *column_stats;  // shared: [kTileRows], [kTileBuffers][kColumns]
  float scale2, dot = 0.0f;

  __device__ __forceinline__ explicit SoftmaxWeights(const BackwardParams& params)
      : p(params),
        row_stats(reinterpret_cast<RowStats*>(shared_memory() + params.rows.slots.bytes)),
        column_stats(row_stats + kTileRows),
        scale2(log2_scale(params.scale, params.row_unit, params.column_unit)) {}

  __device__ __forceinline__ void prefetch(int tile, int first_row, int first_column) const {
    if (threadIdx.x < kColumns)
      cp_async_16(column_stats + tile % kTileBuffers * kColumns + threadIdx.x,
                  p.column_stats + first_column + threadIdx.x);
    if (tile == 0 && threadIdx.x < kTileRows)
      cp_async_16(row_stats + threadIdx.x, p.row_stats + first_row + threadIdx.x);
  }

  template <int kN>
  __device__ __forceinline__ void operator()(float (&x)[kN][4], int tile, int first_row, int first_column) {
    const bool diagonal = p.symmetric && first_column < first_row + kTileRows && first_column + kColumns > first_row;
    if (p.row_exclude != nullptr || p.column_exclude != nullptr || diagonal)
      weigh<true, true, true>(x, tile, first_row, first_column);
    else if (p.by_rows && p.by_columns)
      weigh<true, true, false>(x, tile, first_row, first_column);
    else if (p.by_rows)
      weigh<true, false, false>(x, tile, first_row, first_column);
    else
      weigh<false, true, false>(x, tile, first_row, first_column);
  }

  /// kWithout: pairs may be left out.
  template <bool kByRows, bool kByColumns, bool kWithout, int kN>
  __device__ __forceinline__ void weigh(float (&x)[kN][4], int tile, int first_row, int first_column) {
    const RowStats* columns = column_stats + tile % kTileBuffers * kColumns;
    const RowStats rows[2] = {row_stats[warp_row() + tile_row(0)], row_stats[warp_row() + tile_row(2)]};
    Excluded<uint32_t> out;
    if (kWithout) {
      const Matrix a = {p.rows.a, p.row_exclude, nullptr, nullptr}, b = {p.rows.b, p.column_exclude, nullptr, nullptr};
      out = find_excluded<kN, uint32_t>(a, b, p.exclude_count, first_row, first_column);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const RowStats column = columns[8 * n + tile_column(e)];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 2 * h + e, bit = 4 * n + i;
          float by_rows = 0.0f, by_columns = 0.0f;
          if (kByRows) by_rows = fast_exp2(fmaf(x[n][i], scale2, column.bias - rows[h].lse2)) * rows[h].factor;
          if (kByColumns) by_columns = fast_exp2(fmaf(x[n][i], scale2, rows[h].bias - column.lse2)) * column.factor;
          if (kWithout) {
            const bool itself =
                p.symmetric && first_row + warp_row() + tile_row(i) == first_column + 8 * n + tile_column(e);
            if (itself || (out.by_rows >> bit & 1)) by_rows = 0.0f;
            if (itself || (out.by_columns >> bit & 1)) by_columns = 0.0f;
          }
          const float w = by_rows + by_columns;
          dot = fmaf(w, x[n][i], dot);
          x[n][i] = w;
        }
      }
  }
};

template <typename Math, int kSlice>
__global__ void __launch_bounds__(kThreads, (kWeightedBlocksPerSm<Math, kSlice>))
    similarity_lse_backward_kernel(const BackwardParams p) {
  SoftmaxWeights weights(p);
  weighted_rows<Math, kSlice>(p.rows, weights);
  __syncthreads();  // block_reduce() writes where the last chunks were
  const float own = weights.dot * (unit_of(p.row_unit) * unit_of(p.column_unit));
  const float dot = block_reduce<kThreads>(own, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0 && blockIdx.y == 0) store_global(p.dots + blockIdx.z * gridDim.x + blockIdx.x, dot);
}

struct ScaleGradientParams {
  const float* dots;
  int64_t count;
  bool halve;  // without keys each pair was met twice
  const float* gradient_scale;
  float* grad_scale;
};

__global__ void __launch_bounds__(kThreads) similarity_lse_scale_gradient_kernel(const ScaleGradientParams p) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) sum += load_global(p.dots + i);
  sum = block_reduce<kThreads>(sum, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) store_global(p.grad_scale, sum * (p.halve ? 0.5f : 1.0f) / load_global(p.gradient_scale));
}

struct BackwardLayout {
  Matrix queries, keys;
  BackwardParams sides[2];  // the queries' gradient, and the keys'
  float* gradient_scale;
  RowStats *query_stats, *key_stats;
  int64_t workspace_bytes;
};

template <typename Math, int kSlice>
BackwardLayout backward_layout(const SimilarityLseBackwardCudaParams& p) {
  const Problem& q = p.problem;
  const bool symmetric = q.key_data == nullptr;
  BackwardLayout layout = {};
  Workspace workspace{static_cast<char*>(q.workspace)};
  layout.queries = take_matrix(q.type, q.rows, q.dim, workspace);
  layout.queries.exclude = q.exclude;
  layout.query_stats = workspace.take<RowStats>(layout.queries.padded);
  layout.keys = layout.queries;
  layout.key_stats = layout.query_stats;
  if (!symmetric) {
    layout.keys = take_matrix(q.type, q.keys, q.dim, workspace);
    layout.key_stats = workspace.take<RowStats>(layout.keys.padded);
  }
  layout.gradient_scale = workspace.take<float>(1);
  int64_t partial_count = 0, dots = 0;
  for (int side = 0; side < (p.grad_keys == nullptr ? 1 : 2); ++side) {
    BackwardParams& b = layout.sides[side];
    const Matrix &own = side == 0 ? layout.queries : layout.keys, &others = side == 0 ? layout.keys : layout.queries;
    b.row_exclude = own.exclude;
    b.column_exclude = others.exclude;
    b.row_unit = own.unit;
    b.column_unit = others.unit;
    b.symmetric = symmetric;
    b.exclude_count = q.exclude_count;
    b.scale = q.scale;
    b.row_stats = side == 0 ? layout.query_stats : layout.key_stats;
    b.column_stats = side == 0 ? layout.key_stats : layout.query_stats;
    const bool columns = p.lse_columns != nullptr;
    b.by_rows = symmetric || side == 0 || columns;
    b.by_columns = symmetric || side == 1 || columns;
    b.rows = cut_weighted_rows<Math, kSlice>(own, others, kStatsBytes, true, 64);
    const int64_t count = partial_floats(b.rows), blocks = int64_t{b.rows.splits} * (own.padded / kTileRows);
    partial_count = count > partial_count ? count : partial_count;
    dots = blocks > dots ? blocks : dots;
  }
  float* partial = workspace.take<float>(partial_count);
  float* dot = workspace.take<float>(dots);
  for (BackwardParams& b : layout.sides) {
    b.rows.partial = partial;
    b.dots = dot;
  }
  layout.workspace_bytes = workspace.used;
  return layout;
}

template <typename Math, int kSlice>
void launch_backward(const SimilarityLseBackwardCudaParams& p, cudaStream_t stream) {
  using T = typename Math::Element;
  const Problem& q = p.problem;
  const bool symmetric = q.key_data == nullptr;
  const BackwardLayout layout = backward_layout<Math, kSlice>(p);
  launch(similarity_lse_gradient_scale_kernel,
         {"similarity_lse_gradient_scale", 1, kThreads, kReduceBytes<kThreads>, stream},
         GradientScaleParams{p.grad_lse, p.grad_columns, static_cast<int>(q.rows), static_cast<int>(q.keys),
                             layout.gradient_scale});
  const auto launch_stats = [&](const Matrix& m, const float* bias, bool less_bias, const double* lse,
                                const double* grad, RowStats* stats) {
    const dim3 grid(static_cast<unsigned>(divide_up(m.padded, kThreads)));
    launch(similarity_lse_stats_kernel, {"similarity_lse_stats", grid, kThreads, 0, stream},
           StatsParams{m.count, m.padded, bias, less_bias, lse, grad, layout.gradient_scale, stats});
  };
  launch_pack<Math>(layout.queries, q.query_data, q.dim, stream);
  launch_stats(layout.queries, symmetric ? q.key_bias : nullptr, false, p.lse, p.grad_lse, layout.query_stats);
  if (!symmetric) {
    launch_pack<Math>(layout.keys, q.key_data, q.dim, stream);
    launch_stats(layout.keys, q.key_bias, true, p.lse_columns, p.grad_columns, layout.key_stats);
  }
  for (int side = 0; side < (p.grad_keys == nullptr ? 1 : 2); ++side) {
    const BackwardParams& b = layout.sides[side];
    const dim3 grid = weighted_rows_grid(b.rows);
    const int64_t shared_bytes = b.rows.slots.bytes + kStatsBytes;
    launch(similarity_lse_backward_kernel<Math, kSlice>,
           {"similarity_lse_backward", grid, kThreads, static_cast<size_t>(shared_bytes), stream}, b);
    const char* finish = "similarity_lse_finish";
    if (side == 0 && p.key_sum != nullptr)
      launch_tile_finish<float>(finish, b.rows, q.dim, {nullptr, layout.gradient_scale, b.column_unit}, p.key_sum,
                                stream);
    void* out = side == 0 ? p.grad_queries : p.grad_keys;
    if (out != nullptr)
      launch_tile_finish<T>(finish, b.rows, q.dim, {q.scale, layout.gradient_scale, b.column_unit}, out, stream);
    if (side == 0 && p.grad_scale != nullptr)
      launch(similarity_lse_scale_gradient_kernel,
             {"similarity_lse_scale_gradient", 1, kThreads, kReduceBytes<kThreads>, stream},
             ScaleGradientParams{b.dots, int64_t{grid.x} * grid.z, symmetric, layout.gradient_scale, p.grad_scale});
  }
}

}  // namespace

int64_t similarity_lse_forward_workspace_bytes(const SimilarityLseForwardCudaParams& p) {
  return forward_layout(p).workspace_bytes;
}

int64_t similarity_lse_backward_workspace_bytes(const SimilarityLseBackwardCudaParams& p) {
  return with_math(p.problem.type, p.problem.dim,
                   [&]<typename Math, int kSlice>() { return backward_layout<Math, kSlice>(p).workspace_bytes; });
}

void launch_similarity_lse_forward_cuda(const SimilarityLseForwardCudaParams& p, cudaStream_t stream) {
  with_math(p.problem.type, p.problem.dim, [&]<typename Math, int>() { launch_forward<Math>(p, stream); });
}

void launch_similarity_lse_backward_cuda(const SimilarityLseBackwardCudaParams& p, cudaStream_t stream) {
  with_math(p.problem.type, p.problem.dim,
            [&]<typename Math, int kSlice>() { launch_backward<Math, kSlice>(p, stream); });
}

}  // namespace sslfast
