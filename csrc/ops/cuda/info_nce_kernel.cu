// NT-Xent on CUDA, forward and backward; csrc/ops/info_nce.h has the formulas. N = 2·batch rows, D columns.
//
//   prepare   z → z' = z·2^-e (a row's norm in [1, 2)), padded with zeros. Scaling by a power of two is exact, so that
//             bfloat16 and float16 products are those of the input itself; ẑ = u·z' with a float u in (½, 1] that is
//             applied to the product.
//   forward   c = Ẑ·Ẑᵀ is symmetric: tiles of 128×128 on and above the diagonal only, one exp for both sides of a tile.
//             A block takes a run of tiles in one row of tiles and keeps that row's z' in shared memory.
//   combine   the partial sums of every row, in a fixed order → lse, loss
//   backward  a block owns rows I (kRows of them) and kSlice columns of their gradient and visits 64 rows J after the
//             other: c_IJ = Z'_I·Z'_Jᵀ → G_IJ → shared memory → dẐ_I += G_IJ·Ẑ_J. c is recomputed, and G is never in
//             global memory.
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
// shared memory), backward N²·D/kRows. Scratch besides z': two floats for 128 elements of c, D floats a row for each
// split of J.
//
// Softmax in base 2, of y = s·log₂e·(c − 1) ≤ 0 instead of s·c: computed as one fused multiply-add it keeps the
// accuracy of c near 1, where it counts. Up to s = kBoundedScale 2^y is safe in float32, and no row needs its maximum.
// Beyond that each row and each column of a tile follows its own running maximum, for several exps an element.
//
// Determinism: no atomics; the division of work depends on N, D and the type alone.
#include "csrc/common/convert.cuh"
#include "csrc/common/cp_async.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/memory.cuh"
#include "csrc/common/mma.cuh"
#include "csrc/common/tile.cuh"
#include "csrc/common/warp.cuh"
#include "csrc/ops/cuda/info_nce_kernel.h"

namespace sslfast {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int kBlock = 128;   // rows and columns of a forward tile; rows of z' are padded to a multiple of it
constexpr int kColumns = 64;  // rows J of one step of the backward kernel
constexpr float kNormEps = 1e-12f;
constexpr float kBoundedScale = 32.0f;  // backward's exp(s − lse)·2¹⁴ ≤ exp(2·32)·2¹⁴ stays far below the largest float

// ---- layout

/// z' and how its rows are cut.
struct Rows {
  int batch, count, padded;  // rows; count = 2·batch. Places of elements are int64_t
  int dim, chunks;           // a chunk: 128 bytes of a row
  void* data;                // Element[padded][chunks · kSlotColumns]
};

/// What G takes of a row beside its products. All zero for padding.
struct RowStats {
  float unit;    // ẑ = unit · z'
  float factor;  // s·w·exp(s − lse), or s·w beyond kBoundedScale; times the gradient scale
  float weight;  // s·w; times the gradient scale
  float lse2;    // lse · log₂e − s · log₂e
};

Rows rows_of(ProductType type, int64_t batch, int64_t dim) {
  const int64_t chunks = divide_up(dim * element_bytes(type), kSlotRowBytes);
  return {static_cast<int>(batch), static_cast<int>(2 * batch), static_cast<int>(round_up(2 * batch, kBlock)),
          static_cast<int>(dim),   static_cast<int>(chunks),    nullptr};
}

int64_t rows_bytes(const Rows& z) { return int64_t{z.padded} * z.chunks * kSlotRowBytes; }

// ---- pieces that kernels share

/// If kBounded, all maxima are the same, and sums just add up.
template <bool kBounded>
__device__ __forceinline__ MaxSum merge(MaxSum a, MaxSum b) {
  if constexpr (kBounded)
    return {a.max, a.sum + b.sum};
  else
    return merge(a, b);
}

/// y = scale2·(c − 1), scale2 = s·log₂e.
__device__ __forceinline__ float centred_logit(float cosine, float scale2) { return fmaf(cosine, scale2, -scale2); }

/// The temperature is in device memory and the host does not wait for it, so of the forward and the backward kernel
/// both versions are launched, and the one that is not needed returns at once.
__device__ __forceinline__ bool is_bounded(float scale2) { return scale2 <= kBoundedScale * kLog2E; }

/// Blocks that shall fit on a multiprocessor together, so that one computes exponentials while the other multiplies.
template <typename Math, bool kBounded>
inline constexpr int kBlocksPerSm = kBounded && sizeof(typename Math::Element) == 2 ? 2 : 1;

// ---- prepare

struct PrepareParams {
  Rows z;
  const void* z1;
  const void* z2;
  bool aligned;  // rows of z1 and z2 are multiples of 16 bytes
  const float* temperature;
  float* unit;  // forward, out: (padded)
  // Backward only (stats is nullptr otherwise):
  RowStats* stats;  // out: (padded)
  float* inv_norm;  // out: (padded)
  const double* lse;
  const float* grad_loss;
  int64_t grad_loss_stride;
  float grad_loss_factor;
  const float* gradient_scale;  // 1
};

/// One warp a row. Traffic: N·D read (and again, from L1), N·D written.
template <typename T>
__global__ void __launch_bounds__(kThreads) info_nce_prepare_kernel(const PrepareParams p) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const bool valid = row < p.z.count;
  const T* source = row < p.z.batch ? static_cast<const T*>(p.z1) + int64_t{row} * p.z.dim
                                    : static_cast<const T*>(p.z2) + int64_t{row - p.z.batch} * p.z.dim;
  const int dim = valid ? p.z.dim : 0;
  const int padded_dim = p.z.chunks * kSlotColumns<T>;

  float squares = 0;
  for (int d = lane * kSize; d < dim; d += 32 * kSize) {
    const Pack<T> pack = load_row(source, d, dim, p.aligned);
#pragma unroll
    for (int i = 0; i < kSize; ++i) squares += to_float(pack.at[i]) * to_float(pack.at[i]);
  }
  const float length = sqrtf(warp_sum(squares));
  const float norm = length < kNormEps ? kNormEps : length;  // NaN stays NaN
  const unsigned exponent = __float_as_uint(norm) >> 23;
  const float power = exponent < 254 ? __uint_as_float((254 - exponent) << 23) : 1.0f;  // norm · power in [1, 2)
  for (int d = lane * kSize; d < padded_dim; d += 32 * kSize) {
    Pack<T> pack = load_row(source, d, dim, p.aligned);
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.at[i] = from_float<T>(to_float(pack.at[i]) * power);
    store_pack(static_cast<T*>(p.z.data) + int64_t{row} * padded_dim + d, pack);
  }
  if (lane != 0) return;
  const float unit = valid ? 1.0f / (norm * power) : 0.0f;
  if (p.stats == nullptr) return store_global(p.unit + row, unit);

  RowStats stats = {};
  if (valid) {
    const float t = load_global(p.temperature), scale2 = kLog2E / t;
    const float lse2 = static_cast<float>(load_global(p.lse + row) * kLog2EDouble - scale2);
    const float w = load_global(p.grad_loss + row * p.grad_loss_stride) * p.grad_loss_factor;
    const float weight = w / t * load_global(p.gradient_scale);
    stats = {unit, is_bounded(scale2) ? weight * fast_exp2(-lse2) : weight, weight, lse2};
  }
  store_global(p.stats + row, stats);
  store_global(p.inv_norm + row, valid ? 1.0f / norm : 0.0f);
}

template <typename T>
void launch_prepare(const PrepareParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.z.padded / (kThreads / 32)));
  launch(info_nce_prepare_kernel<T>, {"info_nce_prepare", grid, kThreads, 0, stream}, p);
}

// ---- sums in a fixed order

struct SumParams {
  const float* values;
  int64_t count;
  float factor;
  const float* divisor;  // 1; or nullptr
  float* sum;
};

__global__ void __launch_bounds__(kThreads) info_nce_sum_kernel(const SumParams p) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) sum += load_global(p.values + i);
  sum = block_reduce<kThreads>(sum, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) store_global(p.sum, sum * p.factor / (p.divisor ? load_global(p.divisor) : 1.0f));
}

void launch_sum(const SumParams& p, cudaStream_t stream) {
  launch(info_nce_sum_kernel, {"info_nce_sum", 1, kThreads, kReduceBytes<kThreads>, stream}, p);
}

// ---- forward

/// Tiles of one run: more where there are blocks enough to fill a GPU anyway, so that Z'_I is read less often.
int64_t run_length(int64_t blocks) { return blocks < 16 ? 1 : blocks > 128 ? 8 : blocks / 16; }

/// Row block b gets one partial sum from each row of tiles above it (slots 0…b−1) and one from each of its own runs.
struct ForwardParams {
  Rows z;
  const float* unit;  // (padded)
  const float* temperature;
  int blocks, run;     // row blocks; tiles of a run
  bool resident;       // all chunks of Z'_I stay in shared memory
  float* partial_sum;  // [blocks][padded]
  float* partial_max;  // [blocks][padded], used beyond kBoundedScale
  float* positive;     // (padded): y of row i and its positive
  float* loss;
  double* lse;
};

constexpr int kForwardSlotBytes = kBlock * kSlotRowBytes;
constexpr int kForwardExtraBytes = 3 * kBlock * 4;  // units of one row block and two column blocks

int64_t forward_shared_bytes(int chunks, bool resident) {
  return ((resident ? chunks : 2) + 2) * kForwardSlotBytes + kForwardExtraBytes;
}

/// Block (I, k): tiles (I, I + k·run + …). Eight warps as 4×2, a warp 32×64 elements of the tile.
template <typename Math, bool kBounded>
__global__ void __launch_bounds__(kThreads, (kBlocksPerSm<Math, kBounded>))
    info_nce_forward_kernel(const ForwardParams p) {
  constexpr int kM = 2, kN = 8;
  const int block_i = blockIdx.x, first_j = block_i + blockIdx.y * p.run;
  const float scale2 = kLog2E / load_global(p.temperature);
  if (first_j >= p.blocks || is_bounded(scale2) != kBounded) return;
  const int tiles = min(p.run, p.blocks - first_j), chunks = p.z.chunks, steps = tiles * chunks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;

  unsigned char* a_slots = shared_memory();
  unsigned char* b_slots = a_slots + (p.resident ? chunks : 2) * kForwardSlotBytes;
  float* column_units = reinterpret_cast<float*>(b_slots + 2 * kForwardSlotBytes);  // [2][kBlock]: of two tiles
  float* row_units = column_units + 2 * kBlock;                                     // [kBlock]
  MaxSum* row_sums = reinterpret_cast<MaxSum*>(b_slots);                            // [2][kBlock], after the last tile

  const auto a_slot = [&](int step) { return a_slots + (p.resident ? step % chunks : step % 2) * kForwardSlotBytes; };
  const auto b_slot = [&](int step) { return b_slots + step % 2 * kForwardSlotBytes; };
  const auto prefetch = [&](int step) {
    const int tile = step / chunks, chunk = step % chunks;
    const int first_row = block_i * kBlock, first_column = (first_j + tile) * kBlock;
    if (!p.resident || tile == 0) load_slot<kBlock>(a_slot(step), p.z.data, p.z.chunks, first_row, chunk);
    load_slot<kBlock>(b_slot(step), p.z.data, p.z.chunks, first_column, chunk);
    const int at = 4 * threadIdx.x;
    if (chunk == 0 && at < kBlock) cp_async_16(column_units + tile % 2 * kBlock + at, p.unit + first_column + at);
    if (step == 0 && at < kBlock) cp_async_16(row_units + at, p.unit + first_row + at);
    cp_async_commit();
  };

  constexpr MaxSum none = {kBounded ? 0.0f : kMasked, 0.0f};
  MaxSum row[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) row[m][0] = row[m][1] = none;

  prefetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int block_j = first_j + tile;
    float x[kM][kN][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int step = tile * chunks + chunk;
      cp_async_wait_all();
      __syncthreads();
      if (step + 1 < steps) prefetch(step + 1);
      multiply_chunk<Math>(x, a_slot(step), warp_row, b_slot(step), warp_column);
    }

    // Logits and their sums; row and column of x[m][n][i] in the tile:
    const auto row_of = [&](int m, int i) { return warp_row + 16 * m + tile_row(i); };
    const auto column_of = [&](int n, int i) { return warp_column + 8 * n + tile_column(i); };
    const int first_row = block_i * kBlock, first_column = block_j * kBlock;
    const int to_positive = first_row + p.z.batch - first_column;  // column − row of a positive, if |…| < kBlock
    const bool edge =
        block_i == block_j || first_column + kBlock > p.z.count || (to_positive > -kBlock && to_positive < kBlock);
    // Four sums of each column take the place of the chunk of Z'_J that all have done with.
    MaxSum* column_sums = reinterpret_cast<MaxSum*>(b_slot(tile * chunks + chunks - 1));  // [4][kBlock]
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      MaxSum column[2] = {none, none};
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = row_of(m, i), c = column_of(n, i);
          float y = centred_logit(x[m][n][i] * (row_units[r] * column_units[tile % 2 * kBlock + c]), scale2);
          if (edge) {
            if (c - r == to_positive && first_column + c < p.z.count) {
              store_global(p.positive + first_row + r, y);
              store_global(p.positive + first_column + c, y);
            }
            if (first_row + r == first_column + c || first_row + r >= p.z.count || first_column + c >= p.z.count)
              y = kMasked;
          }
          if constexpr (kBounded) {
            const float e = fast_exp2(y);
            row[m][i / 2].sum += e;
            column[i % 2].sum += e;
          } else {
            row[m][i / 2] = merge(row[m][i / 2], {y, 1.0f});
            column[i % 2] = merge(column[i % 2], {y, 1.0f});
          }
        }
      if (block_i == block_j) continue;  // its rows are its columns
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int other = 4; other < 32; other *= 2)
          column[e] = merge<kBounded>(column[e], shuffle_xor(column[e], other));
        if (lane < 4) column_sums[warp / 2 * kBlock + column_of(n, e)] = column[e];
      }
    }
    __syncthreads();
    if (block_i != block_j && threadIdx.x < kBlock) {
      MaxSum sum = column_sums[threadIdx.x];
      for (int w = 1; w < 4; ++w) sum = merge<kBounded>(sum, column_sums[w * kBlock + threadIdx.x]);
      const int64_t at = int64_t{block_i} * p.z.padded + first_column + threadIdx.x;
      store_global(p.partial_sum + at, sum.sum);
      if (!kBounded) store_global(p.partial_max + at, sum.max);
    }
  }

  __syncthreads();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      MaxSum sum = merge<kBounded>(row[m][h], shuffle_xor(row[m][h], 1));
      sum = merge<kBounded>(sum, shuffle_xor(sum, 2));
      if (lane % 4 == 0) row_sums[warp % 2 * kBlock + warp_row + 16 * m + tile_row(2 * h)] = sum;
    }
  __syncthreads();
  if (threadIdx.x < kBlock) {
    const MaxSum sum = merge<kBounded>(row_sums[threadIdx.x], row_sums[kBlock + threadIdx.x]);
    const int64_t at = int64_t{block_i + static_cast<int>(blockIdx.y)} * p.z.padded + block_i * kBlock + threadIdx.x;
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
  const float scale2 = kLog2E / load_global(p.temperature);
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
  f.resident = forward_shared_bytes(f.z.chunks, true) <= static_cast<int64_t>(kMaxSharedBytes);
  Workspace workspace{static_cast<char*>(p.workspace)};
  float* unit = workspace.take<float>(f.z.padded);
  f.z.data = workspace.take<char>(rows_bytes(f.z));
  f.unit = unit;
  f.positive = workspace.take<float>(f.z.padded);
  f.partial_sum = workspace.take<float>(int64_t{f.blocks} * f.z.padded);
  f.partial_max = workspace.take<float>(int64_t{f.blocks} * f.z.padded);
  f.temperature = p.temperature;
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
  launch_prepare<T>(prepare, stream);

  const dim3 grid(static_cast<unsigned>(f.blocks), static_cast<unsigned>(divide_up(f.blocks, f.run)));
  const size_t shared_bytes = static_cast<size_t>(forward_shared_bytes(f.z.chunks, f.resident));
  const LaunchConfig config = {"info_nce_forward", grid, kThreads, shared_bytes, stream};
  launch(info_nce_forward_kernel<Math, true>, config, f);
  launch(info_nce_forward_kernel<Math, false>, config, f);
  const dim3 combine_grid(static_cast<unsigned>(f.z.padded / 32));
  launch(info_nce_combine_kernel, {"info_nce_combine", combine_grid, kThreads, kThreads * sizeof(MaxSum), stream}, f);
  if (p.total != nullptr) launch_sum({p.loss, f.z.count, p.total_factor, nullptr, p.total}, stream);
}

// ---- backward

/// G is rounded to the type of z, which may be float16: this scale keeps its elements below 2¹⁵ and near it, whatever
/// the incoming gradient.
struct GradientScaleParams {
  const float* grad_loss;
  int64_t count;  // 1 or 2·batch
  float factor;
  const float* temperature;
  float* gradient_scale;  // out: 2^(13 − exponent of max |s·w|), 1 if that is zero or not finite
};

__global__ void __launch_bounds__(kThreads) info_nce_gradient_scale_kernel(const GradientScaleParams p) {
  float largest = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads)
    largest = fmaxf(largest, fabsf(load_global(p.grad_loss + i)));
  largest = block_reduce<kThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x != 0) return;
  const unsigned exponent = __float_as_uint(largest * fabsf(p.factor / load_global(p.temperature))) >> 23;
  const bool usable = exponent > 14 && exponent < 254;
  store_global(p.gradient_scale, usable ? __uint_as_float((254 + 13 - exponent) << 23) : 1.0f);
}

struct BackwardParams {
  Rows z;
  const RowStats* stats;  // (padded)
  const float* temperature;
  int splits, tiles;  // blocks that share a row block; steps of 64 rows J of each
  int slices;
  bool resident;   // all chunks of Z'_I stay in shared memory
  bool whole;      // all chunks of one Z'_J are in shared memory at once, for both products
  float* partial;  // [splits][padded][chunks · kSlotColumns]: dẐ times the gradient scale
  float* dots;     // [splits][row blocks]: Σ G_ij·s·c_ij of the block, times the gradient scale
};

template <typename T, int kRows>
int64_t backward_shared_bytes(int chunks, bool resident, bool whole) {
  const int64_t a = int64_t{resident ? chunks : 2} * kRows * kSlotRowBytes;
  const int64_t b = int64_t{whole ? chunks + 1 : 2} * kColumns * kSlotRowBytes;
  const int64_t g = int64_t{kRows} * kColumns * static_cast<int64_t>(sizeof(T));
  return a + b + g + (kRows + 2 * kColumns) * static_cast<int64_t>(sizeof(RowStats));
}

/// Block (I, slice, split). A "step" of the pipeline loads one chunk: those of Z'_I and Z'_J for c first, then, unless
/// `whole`, those of Z'_J in the slice once more for G·Ẑ_J. While a step is computed, the next one is under way.
template <typename Math, int kRows, int kSlice, bool kBounded>
__global__ void __launch_bounds__(kThreads, (kBlocksPerSm<Math, kBounded>))
    info_nce_backward_kernel(const BackwardParams p) {
  const float scale2 = kLog2E / load_global(p.temperature);
  if (is_bounded(scale2) != kBounded) return;
  using T = typename Math::Element;
  constexpr int kSlotBytes = kColumns * kSlotRowBytes;
  constexpr int kM = kRows / 64, kN = 4;                                 // c: eight warps as 4×2, a warp (kRows/4)×32
  constexpr int kWarpsDown = kRows / 32, kWarpsAcross = 8 / kWarpsDown;  // dẐ: a warp 32 × kWidth of every chunk
  constexpr int kChunks = kSlice / kSlotColumns<T>, kWidth = kSlotColumns<T> / kWarpsAcross;

  const int first_row = blockIdx.x * kRows;
  const int chunks = p.z.chunks, first_chunk = blockIdx.y * kChunks, slice_chunks = min(kChunks, chunks - first_chunk);
  const int first_tile = blockIdx.z * p.tiles;
  const int tiles = min(p.tiles, p.z.padded / kColumns - first_tile);
  const int tile_steps = chunks + (p.whole ? 0 : slice_chunks), steps = tiles * tile_steps;
  const int slots = p.whole ? chunks + 1 : 2;
  const int warp = threadIdx.x / 32;

  unsigned char* a_slots = shared_memory();
  unsigned char* b_slots = a_slots + (p.resident ? chunks : 2) * kRows * kSlotRowBytes;
  unsigned char* g_slots = b_slots + slots * kSlotBytes;
  RowStats* row_stats = reinterpret_cast<RowStats*>(g_slots + kRows * kColumns * sizeof(T));  // [kRows]
  RowStats* column_stats = row_stats + kRows;                                                 // [2][kColumns]

  const auto a_slot = [&](int step) {
    return a_slots + (p.resident ? step % tile_steps : step % 2) * kRows * kSlotRowBytes;
  };
  const auto b_slot = [&](int step) { return b_slots + step % slots * kSlotBytes; };
  const auto prefetch = [&](int step) {
    const int tile = step / tile_steps, at = step % tile_steps;
    const int first_column = (first_tile + tile) * kColumns;
    if (at < chunks && (!p.resident || tile == 0)) load_slot<kRows>(a_slot(step), p.z.data, p.z.chunks, first_row, at);
    load_slot<kColumns>(b_slot(step), p.z.data, p.z.chunks, first_column, at < chunks ? at : first_chunk + at - chunks);
    if (at == 0 && threadIdx.x < kColumns)
      cp_async_16(column_stats + tile % 2 * kColumns + threadIdx.x, p.stats + first_column + threadIdx.x);
    if (step == 0 && threadIdx.x < kRows) cp_async_16(row_stats + threadIdx.x, p.stats + first_row + threadIdx.x);
    cp_async_commit();
  };
  int step = 0;
  const auto next_step = [&] {  // data of `step` is there; that of step + 1 is under way
    cp_async_wait_all();
    __syncthreads();
    if (step + 1 < steps) prefetch(step + 1);
  };

  float acc[kChunks][2][kWidth / 8][4] = {};
  float dot = 0.0f;
  const int a_start = a_offset(warp / kWarpsAcross * 32);
  prefetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int warp_row = warp / 2 * (kRows / 4), warp_column = warp % 2 * 32;
    float x[kM][kN][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk, ++step) {
      next_step();
      multiply_chunk<Math>(x, a_slot(step), warp_row, b_slot(step), warp_column);
    }

    const int first_column = (first_tile + tile) * kColumns;
    const bool edge = (first_column < first_row + kRows && first_column + kColumns > first_row) ||
                      first_row + kRows > p.z.count || first_column + kColumns > p.z.count;
    const int ahead = first_column - first_row - p.z.batch, behind = first_column - first_row + p.z.batch;
    const bool has_positive = (ahead > -kColumns && ahead < kRows) || (behind > -kColumns && behind < kRows);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int local_row = warp_row + 16 * m + tile_row(2 * h);
        const RowStats row = row_stats[local_row];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          T pair[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int local_column = warp_column + 8 * n + tile_column(e);
            const RowStats column = column_stats[tile % 2 * kColumns + local_column];
            const float cosine = x[m][n][2 * h + e] * (row.unit * column.unit), y = centred_logit(cosine, scale2);
            float g = kBounded ? fast_exp2(y) * (row.factor + column.factor)
                               : fast_exp2(y - row.lse2) * row.factor + fast_exp2(y - column.lse2) * column.factor;
            if (edge || has_positive) {
              const int r = first_row + local_row, c = first_column + local_column;
              if (r + p.z.batch == c || c + p.z.batch == r) g -= row.weight + column.weight;
              if (r == c || r >= p.z.count || c >= p.z.count) g = 0.0f;
            }
            dot += g * cosine;
            pair[e] = from_float<T>(g * column.unit);
          }
          const int column = warp_column + 8 * n + tile_column(0);
          unsigned char* g_slot = g_slots + column / kSlotColumns<T> * kRows * kSlotRowBytes;
          const int in_slot = column % kSlotColumns<T>;
          T* target = reinterpret_cast<T*>(g_slot + chunk_offset(local_row, in_slot / Pack<T>::kSize));
          target[in_slot % Pack<T>::kSize] = pair[0];
          target[in_slot % Pack<T>::kSize + 1] = pair[1];
        }
      }

    if (p.whole) __syncthreads();  // G is written; otherwise next_step() sees to it
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk >= slice_chunks) continue;
      if (!p.whole) next_step();
      multiply_weights<Math, kRows, kColumns>(acc[chunk], g_slots, a_start,
                                              b_slot(p.whole ? tile * tile_steps + first_chunk + chunk : step),
                                              warp % kWarpsAcross * kWidth);
      if (!p.whole) ++step;
    }
  }

  __syncthreads();  // block_reduce() writes where the last chunks were
  dot = block_reduce<kThreads>(dot, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0 && blockIdx.y == 0)
    store_global(p.dots + blockIdx.z * gridDim.x + blockIdx.x, dot * scale2 * kLn2);
  const int64_t padded_dim = int64_t{chunks} * kSlotColumns<T>;
  float* out = p.partial + (int64_t{blockIdx.z} * p.z.padded + first_row) * padded_dim;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk >= slice_chunks) continue;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp / kWarpsAcross * 32 + 16 * m + tile_row(2 * h);
          const int column =
              (first_chunk + chunk) * kSlotColumns<T> + warp % kWarpsAcross * kWidth + 8 * n + tile_column(0);
          store_global(reinterpret_cast<float2*>(out + row * padded_dim + column),
                       float2{acc[chunk][m][n][2 * h], acc[chunk][m][n][2 * h + 1]});
        }
  }
}

struct FinishParams {
  Rows z;
  const RowStats* stats;
  const float* inv_norm;
  const float* partial;
  int splits;
  const float* gradient_scale;
  bool aligned;  // rows of grad_z1 and grad_z2 are multiples of 16 bytes
  void* grad_z1;
  void* grad_z2;
};

constexpr int kFinishThreads = 128;  // a warp a row

/// Traffic: splits·N·D floats and twice N·D elements of z' read (the second time from L1), N·D elements written.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads, 8) info_nce_finish_kernel(const FinishParams p) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * (kFinishThreads / 32) + threadIdx.x / 32;
  if (row >= p.z.count) return;
  const int padded_dim = p.z.chunks * kSlotColumns<T>;
  float* gradient = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / 32 * padded_dim;  // of this warp's row
  const T* z = static_cast<const T*>(p.z.data) + int64_t{row} * padded_dim;
  const float unit = load_global(p.stats + row).unit, inv_norm = load_global(p.inv_norm + row);
  const float inv_scale = 1.0f / load_global(p.gradient_scale);

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
    const Pack<T> pack = load_pack(z + d);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      gradient[d + i] = sum[i] * inv_scale;
      dot += gradient[d + i] * to_float(pack.at[i]);
    }
  }
  dot = warp_sum(dot) * unit;

  // A row shorter than eps was divided by eps, a constant: nothing to project out. As torch.nn.functional.normalize.
  const bool tiny = inv_norm >= 1.0f / kNormEps;
  const float along = tiny ? 0.0f : dot * unit;
  T* out = row < p.z.batch ? static_cast<T*>(p.grad_z1) + int64_t{row} * p.z.dim
                           : static_cast<T*>(p.grad_z2) + int64_t{row - p.z.batch} * p.z.dim;
  for (int d = lane * kSize; d < p.z.dim; d += 32 * kSize) {
    const Pack<T> pack = load_pack(z + d);
    Pack<T> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float value = (gradient[d + i] - along * to_float(pack.at[i])) * inv_norm;
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
  float* gradient_scale;
  int64_t workspace_bytes;
};

template <typename T, int kRows, int kSlice>
BackwardLayout backward_layout(const InfoNceBackwardCudaParams& p) {
  constexpr auto fits = [](int chunks, bool resident, bool whole) {
    return backward_shared_bytes<T, kRows>(chunks, resident, whole) <= static_cast<int64_t>(kMaxSharedBytes);
  };
  BackwardParams b = {};
  b.z = rows_of(p.type, p.batch, p.dim);
  const int chunks = b.z.chunks;
  b.whole = fits(chunks, true, true) || (fits(chunks, false, true) && !fits(chunks, true, false));
  b.resident = fits(chunks, true, b.whole);
  b.slices = static_cast<int>(divide_up(chunks, kSlice / kSlotColumns<T>));
  // Enough blocks for a large GPU, but no block with less than two steps, nor more than eight parts of one row's
  // gradient.
  const int64_t row_blocks = b.z.padded / kRows, tiles = b.z.padded / kColumns;
  int64_t splits = 256 / (row_blocks * b.slices);
  splits = splits > tiles / 2 ? tiles / 2 : splits;
  splits = splits > 8 ? 8 : splits < 1 ? 1 : splits;
  b.tiles = static_cast<int>(divide_up(tiles, splits));
  b.splits = static_cast<int>(divide_up(tiles, b.tiles));

  BackwardLayout layout = {};
  Workspace workspace{static_cast<char*>(p.workspace)};
  b.z.data = workspace.take<char>(rows_bytes(b.z));
  RowStats* stats = workspace.take<RowStats>(b.z.padded);
  float* inv_norm = workspace.take<float>(b.z.padded);
  layout.gradient_scale = workspace.take<float>(1);
  b.partial = workspace.take<float>(int64_t{b.splits} * b.z.padded * chunks * kSlotColumns<T>);
  b.dots = workspace.take<float>(b.splits * row_blocks);
  b.stats = stats;
  b.temperature = p.temperature;
  layout.workspace_bytes = workspace.used;
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  layout.backward = b;
  layout.prepare = {b.z,
                    p.z1,
                    p.z2,
                    rows_are_aligned(p.z1, p.z2, row_bytes),
                    p.temperature,
                    nullptr,
                    stats,
                    inv_norm,
                    p.lse,
                    p.grad_loss,
                    p.grad_loss_stride,
                    p.grad_loss_factor,
                    layout.gradient_scale};
  layout.finish = {b.z,
                   stats,
                   inv_norm,
                   b.partial,
                   b.splits,
                   layout.gradient_scale,
                   rows_are_aligned(p.grad_z1, p.grad_z2, row_bytes),
                   p.grad_z1,
                   p.grad_z2};
  return layout;
}

template <typename Math, int kRows, int kSlice>
void launch_backward(const InfoNceBackwardCudaParams& p, cudaStream_t stream) {
  using T = typename Math::Element;
  const BackwardLayout layout = backward_layout<T, kRows, kSlice>(p);
  const BackwardParams& b = layout.backward;
  const GradientScaleParams scale = {p.grad_loss, p.grad_loss_stride == 0 ? 1 : b.z.count, p.grad_loss_factor,
                                     p.temperature, layout.gradient_scale};
  launch(info_nce_gradient_scale_kernel, {"info_nce_gradient_scale", 1, kThreads, kReduceBytes<kThreads>, stream},
         scale);
  launch_prepare<T>(layout.prepare, stream);
  const dim3 grid(static_cast<unsigned>(b.z.padded / kRows), b.slices, b.splits);
  const size_t shared_bytes = static_cast<size_t>(backward_shared_bytes<T, kRows>(b.z.chunks, b.resident, b.whole));
  const LaunchConfig config = {"info_nce_backward", grid, kThreads, shared_bytes, stream};
  launch(info_nce_backward_kernel<Math, kRows, kSlice, true>, config, b);
  launch(info_nce_backward_kernel<Math, kRows, kSlice, false>, config, b);
  const dim3 finish_grid(static_cast<unsigned>(divide_up(b.z.count, kFinishThreads / 32)));
  const size_t finish_bytes = sizeof(float) * kFinishThreads / 32 * b.z.chunks * kSlotColumns<T>;
  launch(info_nce_finish_kernel<T>, {"info_nce_finish", finish_grid, kFinishThreads, finish_bytes, stream},
         layout.finish);
  const int64_t dots = int64_t{grid.x} * grid.z;
  launch_sum({b.dots, dots, -0.5f, layout.gradient_scale, p.grad_temperature}, stream);
}

// For two-byte types, two shapes of block: 128 columns of gradient for 128 rows, or 256 for 64. Floats take twice the
// space.
constexpr int64_t kNarrowDim = 128;

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
  if (element_bytes(type) == 4) return backward_layout<float, 64, 256>(p).workspace_bytes;
  return dim <= kNarrowDim ? backward_layout<__half, 128, 128>(p).workspace_bytes
                           : backward_layout<__half, 64, 256>(p).workspace_bytes;
}

void launch_info_nce_forward_cuda(const InfoNceForwardCudaParams& p, cudaStream_t stream) {
  switch (p.type) {
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

void launch_info_nce_backward_cuda(const InfoNceBackwardCudaParams& p, cudaStream_t stream) {
  const bool narrow = p.dim <= kNarrowDim;
  switch (p.type) {
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
