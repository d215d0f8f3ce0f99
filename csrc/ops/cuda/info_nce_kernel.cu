// NT-Xent on CUDA, forward and backward; csrc/ops/info_nce.h has the formulas. N = 2·batch rows, D columns.
//
//   prepare   z → z' = z·2^-e (a row's norm in [1, 2)), padded with zeros. Scaling by a power of two is exact, so that
//             bfloat16 and float16 products are those of the input itself; ẑ = u·z' with a float u in (½, 1] that is
//             applied to the product. float32: norms in [64, 128), as two float16 numbers each.
//   forward   c = Ẑ·Ẑᵀ is symmetric: tiles of 128×128 on and below the diagonal only, one exp for both sides of a tile.
//             A block takes a run of tiles in one column of tiles, keeps that column's z' in shared memory and the sums
//             of its columns in registers.
//   combine   the partial sums of every row, in a fixed order → lse, loss
//   backward  csrc/common/weighted_rows.cuh: a block owns 128 rows I and kSlice columns of their gradient and visits 64
//             rows J after the other: c_IJ = Z'_I·Z'_Jᵀ → G_IJ → dẐ_I += G_IJ·Ẑ_J. c is recomputed, and G is in
//             registers alone.
//   finish    sums what several blocks found of a row, projects, divides by the norm, writes dz
//   sum       ΣG·c over the blocks: the gradient of the temperature, from G before it is rounded for the product
//
// Arithmetic (2·N²·D operations are one product). Forward ½ product and ½·N² exps. Backward 2 products and N² exps.
// Symmetry would save ½ product there, but then a tile of G serves two row blocks, and each pair of tiles has to leave
// 128·D floats of partial gradient in memory: 128 KB written and read for D = 128 against 6 Mi multiply-adds, more than
// the bandwidth of an A100 or H100 keeps up with. Every kSlice (128 or 256) columns beyond the first slice cost one
// more product.
//
// Traffic, elements of z' that blocks read: forward N²·D/256 (each tile one side; twice that once D is too large for
// shared memory), backward N²·D/128. Scratch besides z': two floats for 128 elements of c, D floats a row for each
// split of J.
//
// Softmax in base 2, of y = s·log₂e·(c − 1) ≤ 0 instead of s·c: computed as one fused multiply-add it keeps the
// accuracy of c near 1, where it counts. Up to s = kBoundedScale 2^y is safe in float32, and no row needs its maximum.
// Beyond that each row and each column of a tile follows its own running maximum, for several exps an element.
//
// Determinism: no atomics; the division of work depends on N, D and the type alone, and the steps in which float32
// products are added up on how much shared memory the device has.
#include "csrc/common/weighted_rows.cuh"
#include "csrc/ops/cuda/info_nce_kernel.h"

namespace sslfast {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int kBlock = kTileRows;  // rows and columns of a forward tile
constexpr float kNormEps = 1e-12f;
constexpr float kBoundedScale = 32.0f;  // backward's exp(s − lse)·2¹⁴ ≤ exp(2·32)·2¹⁴ stays far below the largest float

// ---- layout

/// z': the rows of both views.
struct Rows : PackedMatrix {
  int batch, dim;
};

/// What G takes of a row beside its products. All zero for padding.
struct RowStats {
  float unit;    // ẑ = unit · z'
  float factor;  // s·w·exp(s − lse), or s·w beyond kBoundedScale; times the gradient scale
  float weight;  // s·w; times the gradient scale
  float lse2;    // lse · log₂e − s · log₂e
};

Rows rows_of(ProductType type, int64_t batch, int64_t dim) {
  return {packed_matrix(type, 2 * batch, dim), static_cast<int>(batch), static_cast<int>(dim)};
}

// ---- pieces that kernels share

/// If kBounded, all maxima are the same, and sums just add up.
template <bool kBounded>
__device__ __forceinline__ MaxSum merge(MaxSum a, MaxSum b) {
  if constexpr (kBounded)
    return {a.max, a.sum + b.sum};
  else
    return merge(a, b);
}

/// y = scale2·(c − 1), scale2 = s·log₂e. The same roundings in forward and backward: softmax less one must be zero.
__device__ __forceinline__ float centred_logit(float cosine, float scale2) { return fmaf(cosine, scale2, -scale2); }

/// Where the temperature is in device memory the host does not wait for it. Of the forward and the backward kernel both
/// versions are launched then, and the one that is not needed returns at once.
__host__ __device__ __forceinline__ bool is_bounded(float scale2) { return scale2 <= kBoundedScale * kLog2E; }

bool may_be_bounded(const Number& t) { return t.pointer != nullptr || is_bounded(kLog2E / t.value); }
bool may_be_unbounded(const Number& t) { return t.pointer != nullptr || !is_bounded(kLog2E / t.value); }

/// G is rounded to operands, which may be float16: this scale keeps its elements below 2¹⁵ and near it, whatever the
/// incoming gradient.
struct GradientScale {
  const float* grad_loss;
  int64_t count;  // 1 or 2·batch
  float factor;
  Number temperature;
  float* found;  // for a count of 2·batch

  /// 2^(13 − exponent of max |s·w|), 1 if that is zero or not finite.
  __device__ __forceinline__ float of(float largest) const {
    const unsigned exponent = __float_as_uint(largest * fabsf(factor / temperature.get())) >> 23;
    const bool usable = exponent > 14 && exponent < 254;
    return usable ? __uint_as_float((254 + 13 - exponent) << 23) : 1.0f;
  }
  __device__ __forceinline__ float get() const {
    return count == 1 ? of(fabsf(load_global(grad_loss))) : load_global(found);
  }
};

/// Blocks that shall fit on a multiprocessor together, so that one computes exponentials while the other multiplies;
/// mma.sync takes too many registers for it.
template <typename Math, bool kBounded>
inline constexpr int kForwardBlocksPerSm = SSLFAST_WGMMA && kBounded && Math::kParts == 1 ? 2 : 1;

// ---- prepare

struct PrepareParams {
  Rows z;
  const void* z1;
  const void* z2;
  bool aligned;  // rows of z1 and z2 are multiples of 16 bytes
  Number temperature;
  float* unit;  // forward, out: (padded)
  // Backward only (stats is nullptr otherwise):
  RowStats* stats;  // out: (padded)
  float* inv_norm;  // out: (padded)
  const double* lse;
  const float* grad_loss;
  int64_t grad_loss_stride;
  float grad_loss_factor;
  GradientScale gradient_scale;
};

/// One warp a row. Traffic: N·D read (and again, from L1), N·D written.
template <typename Math>
__global__ void __launch_bounds__(kThreads) info_nce_prepare_kernel(const PrepareParams p) {
  using T = typename Math::Element;
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const bool valid = row < p.z.count;
  const T* source = row < p.z.batch ? static_cast<const T*>(p.z1) + int64_t{row} * p.z.dim
                                    : static_cast<const T*>(p.z2) + int64_t{row - p.z.batch} * p.z.dim;
  const int dim = valid ? p.z.dim : 0;

  float squares = 0;
  for (int d = 8 * lane; d < dim; d += 8 * 32) {
    float x[8];
    load_eight(x, source, d, dim, p.aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += x[i] * x[i];
  }
  const float length = sqrtf(warp_sum(squares));
  const float norm = length < kNormEps ? kNormEps : length;  // NaN stays NaN
  const unsigned exponent = __float_as_uint(norm) >> 23;
  constexpr unsigned kShift = std::is_same_v<T, float> ? 6 : 0;
  const float power = exponent < 254 ? __uint_as_float((254 + kShift - exponent) << 23) : 1.0f;
  for (int d = 8 * lane; d < p.z.padded_dim; d += 8 * 32) {
    float x[8];
    load_eight(x, source, d, dim, p.aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= power;
    store_packed<Math>(p.z, row, d, x);
  }
  if (lane != 0) return;
  const float unit = valid ? 1.0f / (norm * power) : 0.0f;
  if (p.stats == nullptr) return store_global(p.unit + row, unit);

  RowStats stats = {};
  if (valid) {
    const float t = p.temperature.get(), scale2 = kLog2E / t;
    const float lse2 = static_cast<float>(load_global(p.lse + row) * kLog2EDouble - scale2);
    const float w = load_global(p.grad_loss + row * p.grad_loss_stride) * p.grad_loss_factor;
    const float weight = w / t * p.gradient_scale.get();
    stats = {unit, is_bounded(scale2) ? weight * fast_exp2(-lse2) : weight, weight, lse2};
  }
  store_global(p.stats + row, stats);
  store_global(p.inv_norm + row, valid ? 1.0f / norm : 0.0f);
}

template <typename Math>
void launch_prepare(const PrepareParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.z.padded / (kThreads / 32)));
  launch(info_nce_prepare_kernel<Math>, {"info_nce_prepare", grid, kThreads, 0, stream}, p);
}

// ---- sums in a fixed order

struct SumParams {
  const float* values;
  int64_t count;
  float factor;
  bool scaled;  // the values are multiplied by gradient_scale
  GradientScale gradient_scale;
  float* sum;
};

__global__ void __launch_bounds__(kThreads) info_nce_sum_kernel(const SumParams p) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) sum += load_global(p.values + i);
  sum = block_reduce<kThreads>(sum, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) store_global(p.sum, sum * p.factor / (p.scaled ? p.gradient_scale.get() : 1.0f));
}

void launch_sum(const SumParams& p, cudaStream_t stream) {
  launch(info_nce_sum_kernel, {"info_nce_sum", 1, kThreads, kReduceBytes<kThreads>, stream}, p);
}

// ---- forward

/// Tiles of one run: more where there are blocks enough to fill a GPU anyway, so that Z'_I is read less often.
int64_t run_length(int64_t blocks) { return blocks < 16 ? 1 : blocks > 128 ? 8 : blocks / 16; }

/// Row block b gets one partial sum from each column of tiles before it (slots 0…b−1) and one from each of its own
/// runs.
struct ForwardParams {
  Rows z;
  const float* unit;  // (padded)
  Number temperature;
  int blocks, run;  // row blocks; tiles of a run
  SlotPlan slots;
  float* partial_sum;  // [blocks][padded]
  float* partial_max;  // [blocks][padded], used beyond kBoundedScale
  float* positive;     // (padded): y of row i and its positive
  float* loss;
  double* lse;
};

/// Of units: of the rows of a tile, for the tiles that are under way, and of the columns.
constexpr int64_t kUnitsBytes = (kTileBuffers + 1) * kBlock * int64_t{sizeof(float)};

/// Σ 2^y of what a thread met of a row or a column; beyond kBoundedScale times 2^max, its running maximum.
template <bool kBounded>
struct Sum {
  float sum = 0.0f;
  __device__ __forceinline__ void add(float, float power) { sum += power; }
  __device__ __forceinline__ MaxSum value() const { return {0.0f, sum}; }
};
template <>
struct Sum<false> {
  float max = kMasked, sum = 0.0f;
  __device__ __forceinline__ void add(float y, float) {
    const MaxSum both = merge(MaxSum{max, sum}, MaxSum{y, 1.0f});
    max = both.max;
    sum = both.sum;
  }
  __device__ __forceinline__ MaxSum value() const { return {max, sum}; }
};

/// Block (J, k): tiles (J + k·run + …, J).
template <typename Math, bool kBounded>
__global__ void __launch_bounds__(kThreads, (kForwardBlocksPerSm<Math, kBounded>))
    info_nce_forward_kernel(const ForwardParams p) {
  constexpr int kN = kBlock / 8;
  const int block_j = blockIdx.x, first_i = block_j + blockIdx.y * p.run;
  const float scale2 = kLog2E / p.temperature.get();
  if (first_i >= p.blocks || is_bounded(scale2) != kBounded) return;
  const int tiles = min(p.run, p.blocks - first_i), first_column = block_j * kBlock;
  const int lane = threadIdx.x % 32;

  float* row_units = reinterpret_cast<float*>(shared_memory() + p.slots.bytes);  // [kTileBuffers][kBlock]
  float* column_units = row_units + kTileBuffers * kBlock;                       // [kBlock]
  const auto of_tile = [&](int tile) {
    const int at = 4 * threadIdx.x;
    if (at >= kBlock) return;
    cp_async_16(row_units + tile % kTileBuffers * kBlock + at, p.unit + (first_i + tile) * kBlock + at);
    if (tile == 0) cp_async_16(column_units + at, p.unit + first_column + at);
  };
  TilePipeline<kBlock, true> pipeline(p.z, p.z, p.slots, block_j, first_i, tiles);

  Sum<kBounded> columns[kN][2];
  pipeline.start(of_tile);
  for (int tile = 0; tile < tiles; ++tile) {
    const int block_i = first_i + tile, first_row = block_i * kBlock;
    float y[kN][4];
    pipeline.template products<Math>(y, of_tile);

    const float* units = row_units + tile % kTileBuffers * kBlock + warp_row();
    const float row_unit[2] = {units[tile_row(0)], units[tile_row(2)]};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 unit = reinterpret_cast<const float2*>(column_units + 8 * n)[lane % 4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        y[n][i] = centred_logit(y[n][i] * (row_unit[i / 2] * (i % 2 == 0 ? unit.x : unit.y)), scale2);
    }

    const int to_positive = first_row - p.z.batch - first_column;  // column − row of a positive, if |…| < kBlock
    if (block_i == block_j || first_row + kBlock > p.z.count || (to_positive > -kBlock && to_positive < kBlock)) {
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = warp_row() + tile_row(i), c = 8 * n + tile_column(i);
          if (c - r == to_positive && first_row + r < p.z.count) {
            store_global(p.positive + first_row + r, y[n][i]);
            store_global(p.positive + first_column + c, y[n][i]);
          }
          if (first_row + r == first_column + c || first_row + r >= p.z.count || first_column + c >= p.z.count)
            y[n][i] = kMasked;
        }
    }

    Sum<kBounded> rows[2];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float power = kBounded ? fast_exp2(y[n][i]) : 0.0f;
        rows[i / 2].add(y[n][i], power);
        columns[n][i % 2].add(y[n][i], power);
      }
    if (block_i == block_j) continue;  // its rows are its columns
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      MaxSum sum = rows[h].value();
      sum = merge<kBounded>(sum, shuffle_xor(sum, 1));
      sum = merge<kBounded>(sum, shuffle_xor(sum, 2));
      if (lane % 4 != 0) continue;
      const int64_t at = int64_t{block_j} * p.z.padded + first_row + warp_row() + tile_row(2 * h);
      store_global(p.partial_sum + at, sum.sum);
      if (!kBounded) store_global(p.partial_max + at, sum.max);
    }
  }

  __syncthreads();                                            // the slots are free
  MaxSum* sums = reinterpret_cast<MaxSum*>(shared_memory());  // [8][kBlock]
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      MaxSum sum = columns[n][e].value();
#pragma unroll
      for (int other = 4; other < 32; other *= 2) sum = merge<kBounded>(sum, shuffle_xor(sum, other));
      if (lane < 4) sums[threadIdx.x / 32 * kBlock + 8 * n + tile_column(e)] = sum;
    }
  __syncthreads();
  if (threadIdx.x < kBlock) {
    MaxSum sum = sums[threadIdx.x];
    for (int w = 1; w < kThreads / 32; ++w) sum = merge<kBounded>(sum, sums[w * kBlock + threadIdx.x]);
    const int64_t at = int64_t{block_j + static_cast<int>(blockIdx.y)} * p.z.padded + first_column + threadIdx.x;
    store_global(p.partial_sum + at, sum.sum);
    if (!kBounded) store_global(p.partial_max + at, sum.max);
  }
}

/// 32 rows a block; each warp takes every eighth partial sum of them. Traffic: N²/128 floats read.
__global__ void __launch_bounds__(kThreads) info_nce_combine_kernel(const ForwardParams p) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.x * 32 + lane, block = row / kBlock;
  const int slots = block + (p.blocks - block + p.run - 1) / p.run;
  const float scale2 = kLog2E / p.temperature.get();
  const bool bounded = is_bounded(scale2);

  MaxSum sum = {bounded ? 0.0f : kMasked, 0.0f};
  for (int slot = warp; slot < slots; slot += kWarps) {
    const int64_t at = int64_t{slot} * p.z.padded + row;
    sum = merge(sum, {bounded ? 0.0f : load_global(p.partial_max + at), load_global(p.partial_sum + at)});
  }
  MaxSum* sums = reinterpret_cast<MaxSum*>(shared_memory());  // [kWarps][32]
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || row >= p.z.count) return;
  for (int w = 1; w < kWarps; ++w) sum = merge(sum, sums[w * 32 + lane]);
  const float log2_sum = log2f(sum.sum);
  store_global(p.lse + row, (static_cast<double>(sum.max) + log2_sum + scale2) * kLn2Double);
  store_global(p.loss + row, (sum.max - load_global(p.positive + row) + log2_sum) * kLn2);  // the large terms first
}

ForwardParams forward_layout(const InfoNceForwardCudaParams& p, int64_t* bytes) {
  ForwardParams f = {};
  f.z = rows_of(p.type, p.batch, p.dim);
  f.blocks = f.z.padded / kBlock;
  f.run = static_cast<int>(run_length(f.blocks));
  f.slots = plan_slots(f.z.chunks, 0, kBlock, kUnitsBytes, p.type != ProductType::float32);
  Workspace workspace{static_cast<char*>(p.workspace)};
  float* unit = workspace.take<float>(f.z.padded);
  f.z.data = workspace.take<char>(packed_bytes(f.z));
  f.unit = unit;
  f.positive = workspace.take<float>(f.z.padded);
  f.partial_sum = workspace.take<float>(int64_t{f.blocks} * f.z.padded);
  f.partial_max = workspace.take<float>(int64_t{f.blocks} * f.z.padded);
  f.temperature = {p.temperature, p.known_temperature};
  f.loss = p.loss;
  f.lse = p.lse;
  *bytes = workspace.used;
  return f;
}

template <typename Math>
void launch_forward(const InfoNceForwardCudaParams& p, cudaStream_t stream) {
  using T = typename Math::Element;
  int64_t bytes;
  const ForwardParams f = forward_layout(p, &bytes);
  PrepareParams prepare = {};
  prepare.z = f.z;
  prepare.z1 = p.z1;
  prepare.z2 = p.z2;
  prepare.aligned = rows_are_aligned(p.z1, p.z2, p.dim * static_cast<int64_t>(sizeof(T)));
  prepare.unit = const_cast<float*>(f.unit);
  launch_prepare<Math>(prepare, stream);

  const dim3 grid(static_cast<unsigned>(f.blocks), static_cast<unsigned>(divide_up(f.blocks, f.run)));
  const LaunchConfig config = {"info_nce_forward", grid, kThreads, static_cast<size_t>(f.slots.bytes + kUnitsBytes),
                               stream};
  if (may_be_bounded(f.temperature)) launch(info_nce_forward_kernel<Math, true>, config, f);
  if (may_be_unbounded(f.temperature)) launch(info_nce_forward_kernel<Math, false>, config, f);
  const dim3 combine_grid(static_cast<unsigned>(f.z.padded / 32));
  launch(info_nce_combine_kernel, {"info_nce_combine", combine_grid, kThreads, kThreads * sizeof(MaxSum), stream}, f);
  if (p.total != nullptr) launch_sum({p.loss, f.z.count, p.total_factor, false, {}, p.total}, stream);
}

// ---- backward

__global__ void __launch_bounds__(kThreads) info_nce_gradient_scale_kernel(const GradientScale p) {
  float largest = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads)
    largest = fmaxf(largest, fabsf(load_global(p.grad_loss + i)));
  largest = block_reduce<kThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x == 0) store_global(p.found, p.of(largest));
}

struct BackwardParams {
  WeightedRowsParams rows;
  const RowStats* stats;  // (padded)
  Number temperature;
  int batch;
  float* dots;  // [splits][row blocks]: Σ G_ij·s·c_ij of the block, times the gradient scale
};

constexpr int64_t kStatsBytes = (kTileRows + kTileBuffers * kWeightedColumns) * int64_t{sizeof(RowStats)};

/// Products → G times the unit of its column, and Σ G·c.
template <bool kBounded>
struct NtXentWeights {
  static constexpr int kColumns = kWeightedColumns;
  const BackwardParams& p;
  RowStats *row_stats, *column_stats;  // shared: [kTileRows], [kTileBuffers][kColumns]
  float scale2, dot = 0.0f;

  __device__ __forceinline__ explicit NtXentWeights(const BackwardParams& params, float log2_scale)
      : p(params),
        row_stats(reinterpret_cast<RowStats*>(shared_memory() + params.rows.slots.bytes)),
        column_stats(row_stats + kTileRows),
        scale2(log2_scale) {}

  __device__ __forceinline__ void prefetch(int tile, int first_row, int first_column) const {
    if (threadIdx.x < kColumns)
      cp_async_16(column_stats + tile % kTileBuffers * kColumns + threadIdx.x, p.stats + first_column + threadIdx.x);
    if (tile == 0 && threadIdx.x < kTileRows) cp_async_16(row_stats + threadIdx.x, p.stats + first_row + threadIdx.x);
  }

  template <int kN>
  __device__ __forceinline__ void operator()(float (&x)[kN][4], int tile, int first_row, int first_column) {
    const int count = p.rows.a.count;
    const bool edge = (first_column < first_row + kTileRows && first_column + kColumns > first_row) ||
                      first_row + kTileRows > count || first_column + kColumns > count;
    const int ahead = first_column - first_row - p.batch, behind = first_column - first_row + p.batch;
    const bool special = edge || (ahead > -kColumns && ahead < kTileRows) || (behind > -kColumns && behind < kTileRows);
    if (special)
      weigh<true>(x, tile, first_row, first_column);
    else
      weigh<false>(x, tile, first_row, first_column);
  }

  template <bool kSpecial, int kN>
  __device__ __forceinline__ void weigh(float (&x)[kN][4], int tile, int first_row, int first_column) {
    const RowStats* columns = column_stats + tile % kTileBuffers * kColumns;
    const RowStats* rows = row_stats + warp_row();
    float row_unit[2], row_factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_unit[h] = rows[tile_row(2 * h)].unit;
      row_factor[h] = rows[tile_row(2 * h)].factor;
    }
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const RowStats column = columns[8 * n + tile_column(e)];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float cosine = x[n][2 * h + e] * (row_unit[h] * column.unit), y = centred_logit(cosine, scale2);
          float g = kBounded ? fast_exp2(y) * (row_factor[h] + column.factor)
                             : fast_exp2(y - rows[tile_row(2 * h)].lse2) * row_factor[h] +
                                   fast_exp2(y - column.lse2) * column.factor;
          if (kSpecial) {
            const int r = first_row + warp_row() + tile_row(2 * h), c = first_column + 8 * n + tile_column(e);
            const int count = p.rows.a.count;
            if (r + p.batch == c || c + p.batch == r) g -= rows[tile_row(2 * h)].weight + column.weight;
            if (r == c || r >= count || c >= count) g = 0.0f;
          }
          dot = fmaf(g, cosine, dot);
          x[n][2 * h + e] = g * column.unit;
        }
      }
  }
};

template <typename Math, int kSlice, bool kBounded>
__global__ void __launch_bounds__(kThreads, (kBounded ? kWeightedBlocksPerSm<Math, kSlice> : 1))
    info_nce_backward_kernel(const BackwardParams p) {
  const float scale2 = kLog2E / p.temperature.get();
  if (is_bounded(scale2) != kBounded) return;
  NtXentWeights<kBounded> weights(p, scale2);
  weighted_rows<Math, kSlice>(p.rows, weights);
  __syncthreads();  // block_reduce() writes where the last chunks were
  const float dot = block_reduce<kThreads>(weights.dot, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0 && blockIdx.y == 0)
    store_global(p.dots + blockIdx.z * gridDim.x + blockIdx.x, dot * scale2 * kLn2);
}

struct FinishParams {
  Rows z;
  const void* z1;
  const void* z2;
  const float* inv_norm;
  const float* partial;
  int splits;
  GradientScale gradient_scale;
  bool aligned;  // rows of z1, z2, grad_z1 and grad_z2 are multiples of 16 bytes
  void* grad_z1;
  void* grad_z2;
};

constexpr int kFinishThreads = 128;  // a warp a row

/// Traffic: splits·N·D floats and twice N·D elements of z read (the second time from L1), N·D elements written.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads, 8) info_nce_finish_kernel(const FinishParams p) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * (kFinishThreads / 32) + threadIdx.x / 32;
  if (row >= p.z.count) return;
  const int padded_dim = p.z.padded_dim;
  float* gradient = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / 32 * padded_dim;  // of this warp's row
  const int64_t place = int64_t{row < p.z.batch ? row : row - p.z.batch} * p.z.dim;
  const T* z = static_cast<const T*>(row < p.z.batch ? p.z1 : p.z2) + place;
  const float inv_norm = load_global(p.inv_norm + row), inv_scale = 1.0f / p.gradient_scale.get();

  float dot = 0;
  for (int d = lane * kSize; d < padded_dim; d += 32 * kSize) {
    float sum[kSize] = {};
    for (int split = 0; split < p.splits; ++split) {
      const float* partial = p.partial + (int64_t{split} * p.z.padded + row) * padded_dim + d;
#pragma unroll
      for (int i = 0; i < kSize; i += 4) {
        const Pack<float> pack = load_pack(partial + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[i + k] += pack.at[k];
      }
    }
    const Pack<T> pack = load_row(z, d, p.z.dim, p.aligned);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      gradient[d + i] = sum[i] * inv_scale;
      dot += gradient[d + i] * (to_float(pack.at[i]) * inv_norm);
    }
  }
  dot = warp_sum(dot);

  // A row shorter than eps was divided by eps, a constant: nothing to project out. As torch.nn.functional.normalize.
  const bool tiny = inv_norm >= 1.0f / kNormEps;
  const float along = tiny ? 0.0f : dot;
  T* out = static_cast<T*>(row < p.z.batch ? p.grad_z1 : p.grad_z2) + place;
  for (int d = lane * kSize; d < p.z.dim; d += 32 * kSize) {
    const Pack<T> pack = load_row(z, d, p.z.dim, p.aligned);
    Pack<T> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float value = (gradient[d + i] - along * (to_float(pack.at[i]) * inv_norm)) * inv_norm;
      if (tiny && std::is_same_v<T, __half>) value = fminf(fmaxf(value, -65504.0f), 65504.0f);
      result.at[i] = from_float<T>(value);
    }
    store_row(out, d, p.z.dim, p.aligned, result);
  }
}

struct BackwardLayout {
  BackwardParams backward;
  PrepareParams prepare;
  FinishParams finish;
  GradientScale gradient_scale;
  int64_t workspace_bytes;
};

template <typename Math, int kSlice>
BackwardLayout backward_layout(const InfoNceBackwardCudaParams& p) {
  using T = typename Math::Element;
  Rows z = rows_of(p.type, p.batch, p.dim);
  BackwardParams b = {};
  b.rows = cut_weighted_rows<Math, kSlice>(z, z, kStatsBytes, true, 8);
  b.batch = z.batch;
  BackwardLayout layout = {};
  Workspace workspace{static_cast<char*>(p.workspace)};
  z.data = b.rows.a.data = b.rows.b.data = workspace.take<char>(packed_bytes(z));
  RowStats* stats = workspace.take<RowStats>(z.padded);
  float* inv_norm = workspace.take<float>(z.padded);
  const Number temperature = {p.temperature, p.known_temperature};
  layout.gradient_scale = {p.grad_loss, p.grad_loss_stride == 0 ? 1 : z.count, p.grad_loss_factor, temperature,
                           workspace.take<float>(1)};
  b.rows.partial = workspace.take<float>(partial_floats(b.rows));
  b.dots = workspace.take<float>(int64_t{b.rows.splits} * (z.padded / kTileRows));
  b.stats = stats;
  b.temperature = temperature;
  layout.workspace_bytes = workspace.used;
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  layout.backward = b;
  layout.prepare = {z,
                    p.z1,
                    p.z2,
                    rows_are_aligned(p.z1, p.z2, row_bytes),
                    temperature,
                    nullptr,
                    stats,
                    inv_norm,
                    p.lse,
                    p.grad_loss,
                    p.grad_loss_stride,
                    p.grad_loss_factor,
                    layout.gradient_scale};
  layout.finish = {z,
                   p.z1,
                   p.z2,
                   inv_norm,
                   b.rows.partial,
                   b.rows.splits,
                   layout.gradient_scale,
                   rows_are_aligned(p.grad_z1, p.grad_z2, row_bytes) && rows_are_aligned(p.z1, p.z2, row_bytes),
                   p.grad_z1,
                   p.grad_z2};
  return layout;
}

template <typename Math, int kSlice>
void launch_backward(const InfoNceBackwardCudaParams& p, cudaStream_t stream) {
  using T = typename Math::Element;
  const BackwardLayout layout = backward_layout<Math, kSlice>(p);
  const BackwardParams& b = layout.backward;
  const Rows& z = layout.prepare.z;
  if (layout.gradient_scale.count > 1)
    launch(info_nce_gradient_scale_kernel, {"info_nce_gradient_scale", 1, kThreads, kReduceBytes<kThreads>, stream},
           layout.gradient_scale);
  launch_prepare<Math>(layout.prepare, stream);
  const dim3 grid = weighted_rows_grid(b.rows);
  const LaunchConfig config = {"info_nce_backward", grid, kThreads,
                               static_cast<size_t>(b.rows.slots.bytes + kStatsBytes), stream};
  if (may_be_bounded(b.temperature)) launch(info_nce_backward_kernel<Math, kSlice, true>, config, b);
  if (may_be_unbounded(b.temperature)) launch(info_nce_backward_kernel<Math, kSlice, false>, config, b);
  const dim3 finish_grid(static_cast<unsigned>(divide_up(z.count, kFinishThreads / 32)));
  const size_t finish_bytes = sizeof(float) * kFinishThreads / 32 * z.padded_dim;
  launch(info_nce_finish_kernel<T>, {"info_nce_finish", finish_grid, kFinishThreads, finish_bytes, stream},
         layout.finish);
  const int64_t dots = int64_t{grid.x} * grid.z;
  if (p.grad_temperature != nullptr)
    launch_sum({b.dots, dots, -0.5f, true, layout.gradient_scale, p.grad_temperature}, stream);
}

}  // namespace

int64_t info_nce_forward_workspace_bytes(ProductType type, int64_t batch, int64_t dim) {
  InfoNceForwardCudaParams p = {};
  p.type = type;
  p.batch = batch;
  p.dim = dim;
  int64_t bytes;
  forward_layout(p, &bytes);
  return bytes;
}

int64_t info_nce_backward_workspace_bytes(ProductType type, int64_t batch, int64_t dim) {
  InfoNceBackwardCudaParams p = {};
  p.type = type;
  p.batch = batch;
  p.dim = dim;
  return with_math(type, dim,
                   [&]<typename Math, int kSlice>() { return backward_layout<Math, kSlice>(p).workspace_bytes; });
}

void launch_info_nce_forward_cuda(const InfoNceForwardCudaParams& p, cudaStream_t stream) {
  with_math(p.type, p.dim, [&]<typename Math, int>() { launch_forward<Math>(p, stream); });
}

void launch_info_nce_backward_cuda(const InfoNceBackwardCudaParams& p, cudaStream_t stream) {
  with_math(p.type, p.dim, [&]<typename Math, int kSlice>() { launch_backward<Math, kSlice>(p, stream); });
}

}  // namespace sslfast
