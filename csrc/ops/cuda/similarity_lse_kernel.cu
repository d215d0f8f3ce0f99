// The log-sum-exp of similarities on CUDA, forward and backward; csrc/ops/similarity_lse.h has the formulas. The tiles
// are those of csrc/common/tile.cuh.
//
//   pack      rows, as they are, padded with zeros to whole slots and tiles
//   forward   tiles of 128×128 of Q·Kᵀ; a block takes a run of them in one row of tiles and keeps the maximum and the
//             sum of each of its rows, and if wanted of each column of a tile. Without keys only tiles on and above the
//             diagonal: their columns are rows too
//   combine   the partial sums of every row, or column, in a fixed order → lse
//   backward  a block owns rows I (kRows of them) and kSlice columns of their gradient and visits 64 rows J after the
//             other: Q_I·K_Jᵀ → W_IJ → shared memory → dQ_I += W_IJ·K_J. The gradient of the keys is the same with the
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
};

Matrix matrix_of(ProductType type, int64_t count, int64_t dim) { return {packed_matrix(type, count, dim), nullptr}; }

template <typename T>
void launch_pack(const Matrix& m, const void* source, int64_t dim, cudaStream_t stream) {
  launch_tile_pack<T>("similarity_lse_pack", m, source, dim, stream);
}

/// The pairs of a tile that are left out, as bits of the accumulator's elements: of the sums of its rows, and of its
/// columns.
template <typename Bits>
struct Excluded {
  Bits by_rows = 0, by_columns = 0;
};

/// Between queries and keys a pair that a row leaves out is out of both sums; among queries it is out of the row's own.
template <int kM, int kN, int kTileRows, int kTileColumns, typename Bits>
__device__ __forceinline__ Excluded<Bits> find_excluded(const Matrix& a, const Matrix& b, int exclude_count,
                                                        int first_row, int first_column, int warp_row,
                                                        int warp_column) {
  Excluded<Bits> out;
  if (a.exclude != nullptr)
    for (int at = 0; at < 2 * kM; ++at) {
      const int row = warp_row + 16 * (at / 2) + tile_row(2 * (at % 2));
      for (int e = 0; e < exclude_count && first_row + row < a.count; ++e) {
        const int64_t column = load_global(a.exclude + int64_t{first_row + row} * exclude_count + e) - first_column;
        if (column < 0 || column >= kTileColumns) continue;
#pragma unroll
        for (int i = 0; i < kM * kN * 4; ++i)
          if (i / (4 * kN) * 2 + i % 4 / 2 == at && warp_column + i / 4 % kN * 8 + tile_column(i) == column)
            out.by_rows |= Bits{1} << i;
      }
    }
  if (b.exclude != nullptr)
    for (int at = 0; at < 2 * kN; ++at) {
      const int column = warp_column + 8 * (at / 2) + tile_column(at % 2);
      for (int e = 0; e < exclude_count && first_column + column < b.count; ++e) {
        const int64_t row = load_global(b.exclude + int64_t{first_column + column} * exclude_count + e) - first_row;
        if (row < 0 || row >= kTileRows) continue;
#pragma unroll
        for (int i = 0; i < kM * kN * 4; ++i)
          if (i / 4 % kN * 2 + i % 2 == at && warp_row + i / (4 * kN) * 16 + tile_row(i % 4) == row)
            out.by_columns |= Bits{1} << i;
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
  bool resident;                        // all chunks of Q_I stay in shared memory
  float *row_max, *row_sum;             // [slots][padded]; with symmetry slot k < I of row block I is from the columns
                                        // of tile (k, I)
  float *column_max, *column_sum;       // [row blocks][padded], or with symmetry those of the rows
};

constexpr int kForwardSlotBytes = kBlock * kSlotRowBytes;

int64_t forward_shared_bytes(int chunks, bool resident) {
  return ((resident ? chunks : 2) + 2) * kForwardSlotBytes + 3 * kBlock * int64_t{sizeof(float)};
}

/// So that one computes exponentials while the other multiplies; three products for one take more registers.
template <typename Math>
inline constexpr int kForwardBlocksPerSm = sizeof(typename Math::Element) == 2 ? 2 : 1;

__device__ __forceinline__ float log2_scale(const float* scale) { return load_global(scale) * kLog2E; }

/// Block (I, k): tiles (I, first + k·run …), first = I with symmetry. Eight warps as 4×2, a warp 32×64 elements of a
/// tile.
template <typename Math, bool kWithColumns>
__global__ void __launch_bounds__(kThreads, (kForwardBlocksPerSm<Math>))
    similarity_lse_forward_kernel(const ForwardParams p) {
  constexpr int kM = 2, kN = 8;
  const int blocks = p.b.padded / kBlock;
  const int block_i = blockIdx.x, first_j = (p.symmetric ? block_i : 0) + blockIdx.y * p.run;
  if (first_j >= blocks) return;
  const int tiles = min(p.run, blocks - first_j), chunks = p.a.chunks, steps = tiles * chunks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64, first_row = block_i * kBlock;
  const float scale2 = log2_scale(p.scale);

  unsigned char* a_slots = shared_memory();
  unsigned char* b_slots = a_slots + (p.resident ? chunks : 2) * kForwardSlotBytes;
  float* column_bias = reinterpret_cast<float*>(b_slots + 2 * kForwardSlotBytes);  // [2][kBlock]: of two tiles
  float* row_bias = column_bias + 2 * kBlock;                                      // [kBlock]
  MaxSum* row_sums = reinterpret_cast<MaxSum*>(b_slots);                           // [2][kBlock], after the last tile

  const auto a_slot = [&](int step) { return a_slots + (p.resident ? step % chunks : step % 2) * kForwardSlotBytes; };
  const auto b_slot = [&](int step) { return b_slots + step % 2 * kForwardSlotBytes; };
  const auto prefetch = [&](int step) {
    const int tile = step / chunks, chunk = step % chunks, first_column = (first_j + tile) * kBlock;
    if (!p.resident || tile == 0) load_slot<kBlock>(a_slot(step), p.a.data, chunks, first_row, chunk);
    load_slot<kBlock>(b_slot(step), p.b.data, chunks, first_column, chunk);
    const int at = 4 * threadIdx.x;
    if (chunk == 0 && at < kBlock) cp_async_16(column_bias + tile % 2 * kBlock + at, p.column_bias + first_column + at);
    if (step == 0 && at < kBlock) cp_async_16(row_bias + at, p.row_bias + first_row + at);
    cp_async_commit();
  };

  MaxSum row[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) row[m][0] = row[m][1] = {kMasked, 0.0f};

  prefetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int block_j = first_j + tile, first_column = block_j * kBlock;
    float x[kM][kN][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int step = tile * chunks + chunk;
      cp_async_wait_all();
      __syncthreads();
      if (step + 1 < steps) prefetch(step + 1);
      multiply_chunk<Math>(x, a_slot(step), warp_row, b_slot(step), warp_column);
    }

    auto out = find_excluded<kM, kN, kBlock, kBlock, uint64_t>(p.a, p.b, p.exclude_count, first_row, first_column,
                                                               warp_row, warp_column);
    const bool diagonal = p.symmetric && block_i == block_j;
    const float* bias = column_bias + tile % 2 * kBlock + warp_column;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = warp_row + 16 * m + tile_row(2 * h);
        float most = row[m][h].max, sum = 0.0f;
        float y[2 * kN];
#pragma unroll
        for (int k = 0; k < 2 * kN; ++k) {
          const int n = k / 2, e = k % 2, column = 8 * n + tile_column(e);
          x[m][n][2 * h + e] *= scale2;
          const bool left_out =
              out.by_rows >> ((m * kN + n) * 4 + 2 * h + e) & 1 || (diagonal && r == warp_column + column);
          y[k] = left_out ? kMasked : x[m][n][2 * h + e] + bias[column];
          most = fmaxf(most, y[k]);
        }
#pragma unroll
        for (int k = 0; k < 2 * kN; ++k) sum += fast_exp2(y[k] - most);
        row[m][h] = {most, row[m][h].sum * fast_exp2(row[m][h].max - most) + sum};
      }
    if (!kWithColumns || diagonal) continue;  // on the diagonal its rows are its columns

    // Four sums of each column take the place of the chunk of K_J that all have done with.
    MaxSum* column_sums = reinterpret_cast<MaxSum*>(b_slot(tile * chunks + chunks - 1));  // [4][kBlock]
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        MaxSum column = {kMasked, 0.0f};
        float y[2 * kM];
#pragma unroll
        for (int k = 0; k < 2 * kM; ++k) {
          const int m = k / 2, h = k % 2;
          const bool left_out = out.by_columns >> ((m * kN + n) * 4 + 2 * h + e) & 1;
          y[k] = left_out ? kMasked : x[m][n][2 * h + e] + row_bias[warp_row + 16 * m + tile_row(2 * h)];
          column.max = fmaxf(column.max, y[k]);
        }
#pragma unroll
        for (int k = 0; k < 2 * kM; ++k) column.sum += fast_exp2(y[k] - column.max);
#pragma unroll
        for (int other = 4; other < 32; other *= 2) column = merge(column, shuffle_xor(column, other));
        if (lane < 4) column_sums[warp / 2 * kBlock + warp_column + 8 * n + tile_column(e)] = column;
      }
    __syncthreads();
    if (threadIdx.x < kBlock) {
      MaxSum sum = column_sums[threadIdx.x];
      for (int w = 1; w < 4; ++w) sum = merge(sum, column_sums[w * kBlock + threadIdx.x]);
      const int64_t at = int64_t{block_i} * p.b.padded + first_column + threadIdx.x;
      store_global(p.column_max + at, sum.max);
      store_global(p.column_sum + at, sum.sum);
    }
  }

  __syncthreads();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      MaxSum sum = merge(row[m][h], shuffle_xor(row[m][h], 1));
      sum = merge(sum, shuffle_xor(sum, 2));
      if (lane % 4 == 0) row_sums[warp % 2 * kBlock + warp_row + 16 * m + tile_row(2 * h)] = sum;
    }
  __syncthreads();
  if (threadIdx.x < kBlock) {
    const MaxSum sum = merge(row_sums[threadIdx.x], row_sums[kBlock + threadIdx.x]);
    const int slot = (p.symmetric ? block_i : 0) + static_cast<int>(blockIdx.y);
    const int64_t at = int64_t{slot} * p.a.padded + first_row + threadIdx.x;
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

/// A thread a row. Traffic: the partial sums, once.
__global__ void __launch_bounds__(kThreads) similarity_lse_combine_kernel(const CombineParams p) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= p.count) return;
  const int block = row / kBlock, slots = p.blocks > 0 ? block + (p.blocks - block + p.run - 1) / p.run : p.slots;
  MaxSum sum = {kMasked, 0.0f};
  for (int slot = 0; slot < slots; ++slot) {
    const int64_t at = int64_t{slot} * p.padded + row;
    sum = merge(sum, {load_global(p.max + at), load_global(p.sum + at)});
  }
  const bool empty = sum.max <= kMasked / 2 && sum.sum == sum.sum;  // and no NaN in it
  const double own = p.bias == nullptr ? 0.0 : static_cast<double>(load_global(p.bias + row));
  const double lse2 = empty ? -HUGE_VAL : sum.max + log2(static_cast<double>(sum.sum)) + own;
  store_global(p.lse + row, lse2 * kLn2Double);
}

struct ForwardLayout {
  ForwardParams forward;
  CombineParams rows, columns;
  float *row_bias, *column_bias;
  int64_t workspace_bytes;
};

ForwardLayout forward_layout(const SimilarityLseForwardCudaParams& p) {
  const Problem& q = p.problem;
  ForwardLayout layout = {};
  ForwardParams& f = layout.forward;
  f.symmetric = q.key_data == nullptr;
  f.a = matrix_of(q.type, q.rows, q.dim);
  f.b = matrix_of(q.type, q.keys, q.dim);
  f.a.exclude = q.exclude;
  f.b.exclude = f.symmetric ? q.exclude : nullptr;
  f.exclude_count = q.exclude_count;
  f.scale = q.scale;
  f.resident = forward_shared_bytes(f.a.chunks, true) <= static_cast<int64_t>(kMaxSharedBytes);
  // Longer runs where there are blocks enough to fill a GPU anyway, so that Q_I is read less often.
  const int64_t row_blocks = f.a.padded / kBlock, blocks = f.b.padded / kBlock, tiles = row_blocks * blocks;
  f.run = static_cast<int>(tiles < 2048 ? 1 : tiles < 16384 ? tiles / 2048 : 8);
  const int64_t slots = f.symmetric ? blocks : divide_up(blocks, f.run);

  Workspace workspace{static_cast<char*>(q.workspace)};
  f.a.data = workspace.take<char>(packed_bytes(f.a));
  f.b.data = f.symmetric ? f.a.data : workspace.take<char>(packed_bytes(f.b));
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
  const dim3 grid(static_cast<unsigned>(divide_up(p.count, kThreads)));
  launch(similarity_lse_combine_kernel, {"similarity_lse_combine", grid, kThreads, 0, stream}, p);
}

template <typename Math>
void launch_forward(const SimilarityLseForwardCudaParams& p, cudaStream_t stream) {
  using T = typename Math::Element;
  const Problem& q = p.problem;
  const ForwardLayout layout = forward_layout(p);
  const ForwardParams& f = layout.forward;
  launch_pack<T>(f.a, q.query_data, q.dim, stream);
  if (!f.symmetric) launch_pack<T>(f.b, q.key_data, q.dim, stream);
  launch_bias(f.symmetric ? q.key_bias : nullptr, f.a, layout.row_bias, stream);
  if (!f.symmetric) launch_bias(q.key_bias, f.b, layout.column_bias, stream);

  const dim3 grid(static_cast<unsigned>(f.a.padded / kBlock),
                  static_cast<unsigned>(divide_up(f.b.padded / kBlock, f.run)));
  const size_t shared_bytes = static_cast<size_t>(forward_shared_bytes(f.a.chunks, f.resident));
  const LaunchConfig config = {"similarity_lse_forward", grid, kThreads, shared_bytes, stream};
  if (f.symmetric || p.lse_columns != nullptr)
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
  bool symmetric;
  int exclude_count;
  const float* scale;
  const RowStats *row_stats, *column_stats;  // (padded)
  float* dots;                               // [splits][row blocks]: Σ W·⟨a, b⟩ of the block, times the gradient scale
};

template <int kRows>
constexpr int64_t kStatsBytes = (kRows + 2 * kWeightedColumns) * static_cast<int64_t>(sizeof(RowStats));

/// Products → W, and the sum of W·products.
template <int kRows>
struct SoftmaxWeights {
  static constexpr int kColumns = kWeightedColumns;
  const BackwardParams& p;
  RowStats *row_stats, *column_stats;  // shared: [kRows], [2][kColumns]: of two tiles
  float scale2, dot = 0.0f;

  __device__ __forceinline__ SoftmaxWeights(const BackwardParams& params, unsigned char* shared)
      : p(params),
        row_stats(reinterpret_cast<RowStats*>(shared)),
        column_stats(row_stats + kRows),
        scale2(log2_scale(params.scale)) {}

  __device__ __forceinline__ void prefetch(int tile, int first_row, int first_column) const {
    if (threadIdx.x < kColumns)
      cp_async_16(column_stats + tile % 2 * kColumns + threadIdx.x, p.column_stats + first_column + threadIdx.x);
    if (tile == 0 && threadIdx.x < kRows) cp_async_16(row_stats + threadIdx.x, p.row_stats + first_row + threadIdx.x);
  }

  template <int kM, int kN>
  __device__ __forceinline__ void operator()(float (&x)[kM][kN][4], int tile, int first_row, int first_column,
                                             int warp_row, int warp_column) {
    const Matrix a = {p.rows.a, p.row_exclude}, b = {p.rows.b, p.column_exclude};
    const auto out = find_excluded<kM, kN, kRows, kColumns, uint32_t>(a, b, p.exclude_count, first_row, first_column,
                                                                      warp_row, warp_column);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int local_row = warp_row + 16 * m + tile_row(2 * h);
        const RowStats row = row_stats[local_row];
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int local_column = warp_column + 8 * n + tile_column(e), bit = (m * kN + n) * 4 + 2 * h + e;
            const RowStats column = column_stats[tile % 2 * kColumns + local_column];
            const float product = x[m][n][2 * h + e];
            float w = 0.0f;
            if (!(p.symmetric && first_row + local_row == first_column + local_column)) {
              if (!(out.by_rows >> bit & 1)) w += fast_exp2(fmaf(product, scale2, column.bias - row.lse2)) * row.factor;
              if (!(out.by_columns >> bit & 1))
                w += fast_exp2(fmaf(product, scale2, row.bias - column.lse2)) * column.factor;
            }
            dot += w * product;
            x[m][n][2 * h + e] = w;
          }
      }
  }
};

template <typename Math, int kRows, int kSlice>
__global__ void __launch_bounds__(kThreads) similarity_lse_backward_kernel(const BackwardParams p) {
  SoftmaxWeights<kRows> weights(p, shared_memory() + weighted_rows_bytes<typename Math::Element, kRows>(p.rows));
  weighted_rows<Math, kRows, kSlice>(p.rows, weights);
  __syncthreads();  // block_reduce() writes where the last chunks were
  const float dot = block_reduce<kThreads>(weights.dot, [](float a, float b) { return a + b; });
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

template <typename T, int kRows, int kSlice>
BackwardLayout backward_layout(const SimilarityLseBackwardCudaParams& p) {
  const Problem& q = p.problem;
  const bool symmetric = q.key_data == nullptr;
  BackwardLayout layout = {};
  Workspace workspace{static_cast<char*>(q.workspace)};
  layout.queries = matrix_of(q.type, q.rows, q.dim);
  layout.queries.exclude = q.exclude;
  layout.queries.data = workspace.take<char>(packed_bytes(layout.queries));
  layout.query_stats = workspace.take<RowStats>(layout.queries.padded);
  layout.keys = layout.queries;
  layout.key_stats = layout.query_stats;
  if (!symmetric) {
    layout.keys = matrix_of(q.type, q.keys, q.dim);
    layout.keys.data = workspace.take<char>(packed_bytes(layout.keys));
    layout.key_stats = workspace.take<RowStats>(layout.keys.padded);
  }
  layout.gradient_scale = workspace.take<float>(1);
  int64_t partial_count = 0, dots = 0;
  for (int side = 0; side < (p.grad_keys == nullptr ? 1 : 2); ++side) {
    BackwardParams& b = layout.sides[side];
    const Matrix &own = side == 0 ? layout.queries : layout.keys, &others = side == 0 ? layout.keys : layout.queries;
    b.row_exclude = own.exclude;
    b.column_exclude = others.exclude;
    b.symmetric = symmetric;
    b.exclude_count = q.exclude_count;
    b.scale = q.scale;
    b.row_stats = side == 0 ? layout.query_stats : layout.key_stats;
    b.column_stats = side == 0 ? layout.key_stats : layout.query_stats;
    b.rows = cut_weighted_rows<T, kRows, kSlice>(own, others, kStatsBytes<kRows>);
    const int64_t count = partial_floats(b.rows), blocks = int64_t{b.rows.splits} * (own.padded / kRows);
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

template <typename Math, int kRows, int kSlice>
void launch_backward(const SimilarityLseBackwardCudaParams& p, cudaStream_t stream) {
  using T = typename Math::Element;
  const Problem& q = p.problem;
  const bool symmetric = q.key_data == nullptr;
  const BackwardLayout layout = backward_layout<T, kRows, kSlice>(p);
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
  launch_pack<T>(layout.queries, q.query_data, q.dim, stream);
  launch_stats(layout.queries, symmetric ? q.key_bias : nullptr, false, p.lse, p.grad_lse, layout.query_stats);
  if (!symmetric) {
    launch_pack<T>(layout.keys, q.key_data, q.dim, stream);
    launch_stats(layout.keys, q.key_bias, true, p.lse_columns, p.grad_columns, layout.key_stats);
  }
  for (int side = 0; side < (p.grad_keys == nullptr ? 1 : 2); ++side) {
    const BackwardParams& b = layout.sides[side];
    const dim3 grid = weighted_rows_grid<kRows>(b.rows);
    const int64_t shared_bytes = weighted_rows_bytes<T, kRows>(b.rows) + kStatsBytes<kRows>;
    launch(similarity_lse_backward_kernel<Math, kRows, kSlice>,
           {"similarity_lse_backward", grid, kThreads, static_cast<size_t>(shared_bytes), stream}, b);
    const char* finish = "similarity_lse_finish";
    if (side == 0 && p.key_sum != nullptr)
      launch_tile_finish<float>(finish, b.rows, q.dim, {nullptr, layout.gradient_scale}, p.key_sum, stream);
    void* out = side == 0 ? p.grad_queries : p.grad_keys;
    if (out != nullptr) launch_tile_finish<T>(finish, b.rows, q.dim, {q.scale, layout.gradient_scale}, out, stream);
    if (side == 0 && p.grad_scale != nullptr)
      launch(similarity_lse_scale_gradient_kernel,
             {"similarity_lse_scale_gradient", 1, kThreads, kReduceBytes<kThreads>, stream},
             ScaleGradientParams{b.dots, int64_t{grid.x} * grid.z, symmetric, layout.gradient_scale, p.grad_scale});
  }
}

// For two-byte types, two shapes of block: 128 columns of gradient for 128 rows, or 256 for 64. Floats take twice the
// space.
constexpr int64_t kNarrowDim = 128;

}  // namespace

int64_t similarity_lse_forward_workspace_bytes(const SimilarityLseForwardCudaParams& p) {
  return forward_layout(p).workspace_bytes;
}

int64_t similarity_lse_backward_workspace_bytes(const SimilarityLseBackwardCudaParams& p) {
  if (element_bytes(p.problem.type) == 4) return backward_layout<float, 64, 256>(p).workspace_bytes;
  return p.problem.dim <= kNarrowDim ? backward_layout<__half, 128, 128>(p).workspace_bytes
                                     : backward_layout<__half, 64, 256>(p).workspace_bytes;
}

void launch_similarity_lse_forward_cuda(const SimilarityLseForwardCudaParams& p, cudaStream_t stream) {
  switch (p.problem.type) {
    case ProductType::bfloat16:
      return launch_forward<BFloat16Math>(p, stream);
    case ProductType::float16:
      return launch_forward<Float16Math>(p, stream);
    case ProductType::float32:
      return launch_forward<Tf32x3Math>(p, stream);
    case ProductType::float32_as_tf32:
      return launch_forward<Tf32Math>(p, stream);
  }
}

void launch_similarity_lse_backward_cuda(const SimilarityLseBackwardCudaParams& p, cudaStream_t stream) {
  const bool narrow = p.problem.dim <= kNarrowDim;
  switch (p.problem.type) {
    case ProductType::bfloat16:
      return narrow ? launch_backward<BFloat16Math, 128, 128>(p, stream)
                    : launch_backward<BFloat16Math, 64, 256>(p, stream);
    case ProductType::float16:
      return narrow ? launch_backward<Float16Math, 128, 128>(p, stream)
                    : launch_backward<Float16Math, 64, 256>(p, stream);
    case ProductType::float32:
      return launch_backward<Tf32x3Math, 64, 256>(p, stream);
    case ProductType::float32_as_tf32:
      return launch_backward<Tf32Math, 64, 256>(p, stream);
  }
}

}  // namespace sslfast
