// Sums of rows with weights that a loss makes of their similarities, Σ_j W_ij·b_j with W_ij a function of ⟨a_i, b_j⟩,
// on the tiles of csrc/common/tile.cuh: what gradients of losses over pairs are. W is never in global memory.
//
// A block owns 128 rows I and kSlice columns of their sums and visits 64 rows J after the other: A_I·B_Jᵀ → W_IJ, in
// the registers of the threads that made the products → sums += W_IJ·B_J. Several blocks may share rows I (`splits`);
// their partial sums are added up in a fixed order by the kernel that finishes.
#pragma once

#include "csrc/common/tile_pipeline.cuh"

namespace sslfast {

inline constexpr int kWeightedColumns = 64;  // rows J of one step

struct TilePackParams {
  PackedMatrix m;
  const void* source;
  int dim;
  bool aligned;    // rows of the source are multiples of 16 bytes
  float* largest;  // float32: [kLargestBlocks], the largest |x| that each block found
  float* unit;     // float32: out, 1: x = unit · what is packed
};

constexpr int kLargestBlocks = 64;

/// Traffic: each element read once. NaN counts for nothing.
static __global__ void __launch_bounds__(kTileThreads) tile_largest_kernel(const TilePackParams p) {
  const float* source = static_cast<const float*>(p.source);
  const int64_t count = int64_t{p.m.count} * p.dim, first = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  float largest = 0.0f;
  for (int64_t i = first; i < count; i += kLargestBlocks * kTileThreads)
    largest = fmaxf(largest, fabsf(load_global(source + i)));
  largest = block_reduce<kTileThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x == 0) store_global(p.largest + blockIdx.x, largest);
}

/// 2^(6 − exponent of the largest), with which it is below 2⁷; and 2^… of what is not finite or tiny is 1.
__device__ __forceinline__ float packing_power(float largest) {
  const unsigned exponent = __float_as_uint(largest) >> 23;
  return exponent > 7 && exponent < 254 ? __uint_as_float((254 + 6 - exponent) << 23) : 1.0f;
}

/// One warp a row. Traffic: each element read and written once.
template <typename Math>
static __global__ void __launch_bounds__(kTileThreads) tile_pack_kernel(const TilePackParams p) {
  using T = typename Math::Element;
  const int lane = threadIdx.x % 32, row = blockIdx.x * (kTileThreads / 32) + threadIdx.x / 32;
  const T* source = static_cast<const T*>(p.source) + int64_t{row} * p.dim;
  const int dim = row < p.m.count ? p.dim : 0;
  float power = 1.0f;
  if constexpr (std::is_same_v<T, float>) {
    float largest = fmaxf(load_global(p.largest + lane), load_global(p.largest + lane + 32));
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, mask));
    power = packing_power(largest);
    if (row == 0 && lane == 0) store_global(p.unit, 1.0f / power);
  }
  for (int d = 8 * lane; d < p.m.padded_dim; d += 8 * 32) {
    float x[8];
    load_eight(x, source, d, dim, p.aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= power;
    store_packed<Math>(p.m, row, d, x);
  }
}

/// scratch: kLargestBlocks + 1 floats for float32, of which the last is the matrix's unit afterwards.
template <typename Math>
void launch_tile_pack(const char* name, const PackedMatrix& m, const void* source, int64_t dim, float* scratch,
                      cudaStream_t stream) {
  using T = typename Math::Element;
  const bool aligned = rows_are_aligned(source, source, dim * static_cast<int64_t>(sizeof(T)));
  const TilePackParams p = {m, source, static_cast<int>(dim), aligned, scratch, scratch + kLargestBlocks};
  if (std::is_same_v<T, float>)
    launch(tile_largest_kernel, {"tile_largest", kLargestBlocks, kTileThreads, kReduceBytes<kTileThreads>, stream}, p);
  const dim3 grid(static_cast<unsigned>(m.padded / (kTileThreads / 32)));
  launch(tile_pack_kernel<Math>, {name, grid, kTileThreads, 0, stream}, p);
}

/// The scratch of launch_tile_pack(), and where the matrix's unit is: null where it is 1.
struct MatrixUnit {
  float *scratch, *unit;
  MatrixUnit(ProductType type, Workspace& workspace)
      : scratch(type == ProductType::float32 || type == ProductType::float32_as_tf32
                    ? workspace.take<float>(kLargestBlocks + 1)
                    : nullptr),
        unit(scratch == nullptr ? nullptr : scratch + kLargestBlocks) {}
};

__device__ __forceinline__ float unit_of(const float* unit) { return unit == nullptr ? 1.0f : load_global(unit); }

struct WeightedRowsParams {
  PackedMatrix a, b;  // whose sums they are, and the others
  int splits, tiles;  // blocks that share a row block; steps of 64 rows J of each
  int slices;
  SlotPlan slots;
  float* partial;  // [splits][a.padded][a.padded_dim]: Σ W·b; null: no sums, W alone
};

/// Two blocks are to share a multiprocessor, so that one makes weights while the other multiplies, where the
/// accumulators leave registers for it: mma.sync takes more of them than wgmma.
template <typename Math, int kSlice>
inline constexpr bool kTwoBlocks = Math::kParts == 1 && kSlice <= 128;
template <typename Math, int kSlice>
inline constexpr int kWeightedBlocksPerSm = SSLFAST_WGMMA && kTwoBlocks<Math, kSlice> ? 2 : 1;

/// How the work is cut, without `partial`. more_bytes: of shared memory behind the slots. gradients: whether sums are
/// wanted.
template <typename Math, int kSlice>
WeightedRowsParams cut_weighted_rows(const PackedMatrix& a, const PackedMatrix& b, int64_t more_bytes, bool sums,
                                     int most_splits) {
  constexpr int kChunks = kSlice / kSlotColumns<Math>;
  WeightedRowsParams p = {a, b, 0, 0, 0, {}, nullptr};
  p.slots = plan_slots(a.chunks, sums ? kChunks : 0, kWeightedColumns, more_bytes, kTwoBlocks<Math, kSlice>);
  p.slices = sums ? static_cast<int>(divide_up(a.chunks, kChunks)) : 1;
  // Enough blocks for a large GPU, but no block with less than two steps.
  const int64_t row_blocks = a.padded / kTileRows, tiles = b.padded / kWeightedColumns;
  int64_t splits = 256 / (row_blocks * p.slices);
  splits = splits > tiles / 2 ? tiles / 2 : splits;
  splits = splits > most_splits ? most_splits : splits < 1 ? 1 : splits;
  p.tiles = static_cast<int>(divide_up(tiles, splits));
  p.splits = static_cast<int>(divide_up(tiles, p.tiles));
  return p;
}

inline int64_t partial_floats(const WeightedRowsParams& p) { return int64_t{p.splits} * p.a.padded * p.a.padded_dim; }

inline dim3 weighted_rows_grid(const WeightedRowsParams& p) {
  return dim3(static_cast<unsigned>(p.a.padded / kTileRows), p.slices, p.splits);
}

/// Block (I, slice, split).
///
/// weigh.prefetch(tile, first_row, first_column) may start asynchronous copies of what the tile's weights take, into
/// the buffer tile % kTileBuffers; weigh(x, tile, first_row, first_column) turns the products of a tile into weights.
template <typename Math, int kSlice, typename Weigh>
__device__ __forceinline__ void weighted_rows(const WeightedRowsParams& p, Weigh& weigh) {
  constexpr int kN = kWeightedColumns / 8, kChunks = kSlice / kSlotColumns<Math>, kWidth = kSlotColumns<Math> / 8;

  const int first_row = blockIdx.x * kTileRows, first_tile = blockIdx.z * p.tiles;
  const int first_chunk = blockIdx.y * kChunks;
  const int slice_chunks = p.partial == nullptr ? 0 : min(kChunks, p.a.chunks - first_chunk);
  const int tiles = min(p.tiles, p.b.padded / kWeightedColumns - first_tile);
  TilePipeline<kWeightedColumns, false> pipeline(p.a, p.b, p.slots, blockIdx.x, first_tile, tiles, first_chunk,
                                                 slice_chunks);
  const auto of_tile = [&](int tile) { weigh.prefetch(tile, first_row, (first_tile + tile) * kWeightedColumns); };
  float sums[kChunks][kWidth][4] = {};
  pipeline.start(of_tile);
  for (int tile = 0; tile < tiles; ++tile) {
    float x[kN][4];
    pipeline.template products<Math>(x, of_tile);
    weigh(x, tile, first_row, (first_tile + tile) * kWeightedColumns);
    if (p.partial == nullptr) continue;
    Weights<Math, kN> w;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) w.set(n, i, x[n][i], x[n][i + 1]);
    pipeline.weighted_sums(sums, w, of_tile);
  }
  if (p.partial == nullptr) return;

  float* partial = p.partial + (int64_t{blockIdx.z} * p.a.padded + first_row) * p.a.padded_dim;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk >= slice_chunks) continue;
#pragma unroll
    for (int n = 0; n < kWidth; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = warp_row() + tile_row(i);
        const int column = (first_chunk + chunk) * kSlotColumns<Math> + 8 * n + tile_column(0);
        store_global(reinterpret_cast<float2*>(partial + int64_t{row} * p.a.padded_dim + column),
                     float2{sums[chunk][n][i], sums[chunk][n][i + 1]});
      }
  }
}

/// run<Math, kSlice>() with the arithmetic of a type and the columns of gradient that a block has.
template <typename Run>
auto with_math(ProductType type, int64_t dim, const Run& run) {
  const bool narrow = dim <= 128;
  switch (type) {
    case ProductType::bfloat16:
      return narrow ? run.template operator()<BFloat16Math, 128>() : run.template operator()<BFloat16Math, 256>();
    case ProductType::float16:
      return narrow ? run.template operator()<Float16Math, 128>() : run.template operator()<Float16Math, 256>();
    case ProductType::float32_as_tf32:
      return narrow ? run.template operator()<RoundedFloat32Math, 128>()
                    : run.template operator()<RoundedFloat32Math, 256>();
    default:  // twice as many operands
      return run.template operator()<Float32Math, 128>();
  }
}

/// What sums of rows are multiplied by: numbers on the device, 1 where null, and one that the host knows. unit: of the
/// matrix that was summed.
struct TileFactor {
  const float *times, *divided_by, *unit;
  float constant = 1.0f;
};

struct TileFinishParams {
  int count, padded, dim, padded_dim, splits;
  const float* partial;
  TileFactor factor;
  bool aligned;  // rows of `out` are multiples of 16 bytes
  void* out;     // (count, dim)
};

/// A warp a row. Traffic: splits·count·dim floats read, count·dim elements written.
template <typename T>
static __global__ void __launch_bounds__(kTileThreads) tile_finish_kernel(const TileFinishParams p) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % 32, row = blockIdx.x * (kTileThreads / 32) + threadIdx.x / 32;
  if (row >= p.count) return;
  float factor = p.factor.constant * unit_of(p.factor.unit);
  if (p.factor.times != nullptr) factor *= load_global(p.factor.times);
  if (p.factor.divided_by != nullptr) factor /= load_global(p.factor.divided_by);
  for (int d = lane * kSize; d < p.dim; d += 32 * kSize) {
    float sum[kSize] = {};
    for (int split = 0; split < p.splits; ++split) {
      const float* partial = p.partial + (int64_t{split} * p.padded + row) * p.padded_dim + d;
#pragma unroll
      for (int i = 0; i < kSize; i += 4) {
        const Pack<float> pack = load_pack(partial + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[i + k] += pack.at[k];
      }
    }
    Pack<T> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) result.at[i] = from_float<T>(sum[i] * factor);
    store_row(static_cast<T*>(p.out) + int64_t{row} * p.dim, d, p.dim, p.aligned, result);
  }
}

/// The sums of weighted_rows() → out (rows, dim).
template <typename Out>
void launch_tile_finish(const char* name, const WeightedRowsParams& p, int64_t dim, TileFactor factor, void* out,
                        cudaStream_t stream) {
  const bool aligned = rows_are_aligned(out, out, dim * static_cast<int64_t>(sizeof(Out)));
  const dim3 grid(static_cast<unsigned>(divide_up(p.a.count, kTileThreads / 32)));
  launch(tile_finish_kernel<Out>, {name, grid, kTileThreads, 0, stream},
         TileFinishParams{p.a.count, p.a.padded, static_cast<int>(dim), p.a.padded_dim, p.splits, p.partial, factor,
                          aligned, out});
}

}  // namespace sslfast
