// Sums of rows with weights that a loss makes of their similarities, Σ_j W_ij·b_j with W_ij a function of ⟨a_i, b_j⟩,
// on the tiles of csrc/common/tile.cuh: what gradients of losses over pairs are. W is never in global memory.
//
// A block owns rows I (kRows of them) and kSlice columns of their sums and visits 64 rows J after the other:
// A_I·B_Jᵀ → W_IJ → shared memory → sums += W_IJ·B_J. Several blocks may share rows I (`splits`); their partial sums
// are added up in a fixed order by the kernel that finishes.
#pragma once

#include "csrc/common/tile.cuh"

namespace sslfast {

inline constexpr int kPackedRows = 128;      // packed rows are padded to a multiple of it
inline constexpr int kWeightedColumns = 64;  // rows J of one step

/// A matrix whose rows are whole slots, padded with zeros.
struct PackedMatrix {
  int count, padded, chunks, padded_dim;  // rows, rows with padding, slots and elements of a row
  void* data;                             // Element[padded][padded_dim]
};

inline PackedMatrix packed_matrix(ProductType type, int64_t count, int64_t dim) {
  const int64_t chunks = divide_up(dim * element_bytes(type), kSlotRowBytes);
  return {static_cast<int>(count), static_cast<int>(round_up(count, kPackedRows)), static_cast<int>(chunks),
          static_cast<int>(chunks * kSlotRowBytes / element_bytes(type)), nullptr};
}

inline int64_t packed_bytes(const PackedMatrix& m) { return int64_t{m.padded} * m.chunks * kSlotRowBytes; }

struct TilePackParams {
  PackedMatrix m;
  const void* source;
  int dim;
  bool aligned;  // rows of the source are multiples of 16 bytes
};

/// One warp a row. Traffic: each element read and written once.
template <typename T>
static __global__ void __launch_bounds__(kTileThreads) tile_pack_kernel(const TilePackParams p) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % 32, row = blockIdx.x * (kTileThreads / 32) + threadIdx.x / 32;
  const T* source = static_cast<const T*>(p.source) + int64_t{row} * p.dim;
  const int dim = row < p.m.count ? p.dim : 0;
  for (int d = lane * kSize; d < p.m.padded_dim; d += 32 * kSize)
    store_pack(static_cast<T*>(p.m.data) + int64_t{row} * p.m.padded_dim + d, load_row(source, d, dim, p.aligned));
}

template <typename T>
void launch_tile_pack(const char* name, const PackedMatrix& m, const void* source, int64_t dim, cudaStream_t stream) {
  const bool aligned = rows_are_aligned(source, source, dim * static_cast<int64_t>(sizeof(T)));
  const dim3 grid(static_cast<unsigned>(m.padded / (kTileThreads / 32)));
  launch(tile_pack_kernel<T>, {name, grid, kTileThreads, 0, stream},
         TilePackParams{m, source, static_cast<int>(dim), aligned});
}

struct WeightedRowsParams {
  PackedMatrix a, b;  // whose sums they are, and the others
  int splits, tiles;  // blocks that share a row block; steps of 64 rows J of each
  int slices;
  bool resident;   // all chunks of A_I stay in shared memory
  bool whole;      // all chunks of one B_J are in shared memory at once, for both products
  float* partial;  // [splits][a.padded][a.padded_dim]: Σ W·b; null: no sums, W alone
};

template <typename T, int kRows>
__host__ __device__ constexpr int64_t weighted_rows_bytes(int chunks, bool resident, bool whole) {
  const int64_t a = int64_t{resident ? chunks : 2} * kRows * kSlotRowBytes;
  const int64_t b = int64_t{whole ? chunks + 1 : 2} * kWeightedColumns * kSlotRowBytes;
  return a + b + int64_t{kRows} * kWeightedColumns * static_cast<int64_t>(sizeof(T));
}

/// Shared memory of weighted_rows(), from its start; what W is made of may come behind it.
template <typename T, int kRows>
__host__ __device__ constexpr int64_t weighted_rows_bytes(const WeightedRowsParams& p) {
  return weighted_rows_bytes<T, kRows>(p.a.chunks, p.resident, p.whole);
}

/// How the work is cut, without `partial`. more_bytes: of shared memory behind weighted_rows_bytes().
template <typename T, int kRows, int kSlice>
WeightedRowsParams cut_weighted_rows(const PackedMatrix& a, const PackedMatrix& b, int64_t more_bytes) {
  WeightedRowsParams p = {a, b, 0, 0, 0, false, false, nullptr};
  const auto fits = [&](bool resident, bool whole) {
    return weighted_rows_bytes<T, kRows>(a.chunks, resident, whole) + more_bytes <=
           static_cast<int64_t>(kMaxSharedBytes);
  };
  p.whole = fits(true, true) || (fits(false, true) && !fits(true, false));
  p.resident = fits(true, p.whole);
  p.slices = static_cast<int>(divide_up(a.chunks, kSlice / kSlotColumns<T>));
  // Enough blocks for a large GPU, but no block with less than two steps, nor more than 64 parts of one row's sums.
  const int64_t row_blocks = a.padded / kRows, tiles = b.padded / kWeightedColumns;
  int64_t splits = 256 / (row_blocks * p.slices);
  splits = splits > tiles / 2 ? tiles / 2 : splits;
  splits = splits > 64 ? 64 : splits < 1 ? 1 : splits;
  p.tiles = static_cast<int>(divide_up(tiles, splits));
  p.splits = static_cast<int>(divide_up(tiles, p.tiles));
  return p;
}

inline int64_t partial_floats(const WeightedRowsParams& p) { return int64_t{p.splits} * p.a.padded * p.a.padded_dim; }

template <int kRows>
dim3 weighted_rows_grid(const WeightedRowsParams& p) {
  return dim3(static_cast<unsigned>(p.a.padded / kRows), p.slices, p.splits);
}

/// Block (I, slice, split). A "step" of the pipeline loads one chunk: those of A_I and B_J for the products first,
/// then, unless `whole`, those of B_J in the slice once more for W·B_J. While a step is computed, the next one is under
/// way.
///
/// weigh.prefetch(tile, first_row, first_column) may start asynchronous copies of what the tile's weights take;
/// weigh(x, tile, first_row, first_column, warp_row, warp_column) turns the products of a warp, kM·16 × kN·8 of them,
/// into weights.
template <typename Math, int kRows, int kSlice, typename Weigh>
__device__ __forceinline__ void weighted_rows(const WeightedRowsParams& p, Weigh& weigh) {
  using T = typename Math::Element;
  constexpr int kColumns = kWeightedColumns, kSlotBytes = kColumns * kSlotRowBytes;
  constexpr int kM = kRows / 64, kN = 4;                                 // W: eight warps as 4×2, a warp (kRows/4)×32
  constexpr int kWarpsDown = kRows / 32, kWarpsAcross = 8 / kWarpsDown;  // sums: a warp 32 × kWidth of every chunk
  constexpr int kChunks = kSlice / kSlotColumns<T>, kWidth = kSlotColumns<T> / kWarpsAcross;

  const int first_row = blockIdx.x * kRows;
  const int chunks = p.a.chunks, first_chunk = blockIdx.y * kChunks;
  const int slice_chunks = p.partial == nullptr ? 0 : min(kChunks, chunks - first_chunk);
  const int first_tile = blockIdx.z * p.tiles;
  const int tiles = min(p.tiles, p.b.padded / kColumns - first_tile);
  const int tile_steps = chunks + (p.whole ? 0 : slice_chunks), steps = tiles * tile_steps;
  const int slots = p.whole ? chunks + 1 : 2;
  const int warp = threadIdx.x / 32;

  unsigned char* a_slots = shared_memory();
  unsigned char* b_slots = a_slots + (p.resident ? chunks : 2) * kRows * kSlotRowBytes;
  unsigned char* w_slots = b_slots + slots * kSlotBytes;

  const auto a_slot = [&](int step) {
    return a_slots + (p.resident ? step % tile_steps : step % 2) * kRows * kSlotRowBytes;
  };
  const auto b_slot = [&](int step) { return b_slots + step % slots * kSlotBytes; };
  const auto prefetch = [&](int step) {
    const int tile = step / tile_steps, at = step % tile_steps;
    const int first_column = (first_tile + tile) * kColumns;
    if (at < chunks && (!p.resident || tile == 0)) load_slot<kRows>(a_slot(step), p.a.data, chunks, first_row, at);
    load_slot<kColumns>(b_slot(step), p.b.data, chunks, first_column, at < chunks ? at : first_chunk + at - chunks);
    if (at == 0) weigh.prefetch(tile, first_row, first_column);
    cp_async_commit();
  };
  int step = 0;
  const auto next_step = [&] {  // data of `step` is there; that of step + 1 is under way
    cp_async_wait_all();
    __syncthreads();
    if (step + 1 < steps) prefetch(step + 1);
  };

  float sums[kChunks][2][kWidth / 8][4] = {};
  const int a_start = a_offset(warp / kWarpsAcross * 32);

  prefetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int warp_row = warp / 2 * (kRows / 4), warp_column = warp % 2 * 32;
    float x[kM][kN][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk, ++step) {
      next_step();
      multiply_chunk<Math>(x, a_slot(step), warp_row, b_slot(step), warp_column);
    }
    weigh(x, tile, first_row, (first_tile + tile) * kColumns, warp_row, warp_column);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const int row = warp_row + 16 * m + tile_row(2 * h), column = warp_column + 8 * n + tile_column(0);
          unsigned char* w_slot = w_slots + column / kSlotColumns<T> * kRows * kSlotRowBytes;
          const int in_slot = column % kSlotColumns<T>;
          T* target = reinterpret_cast<T*>(w_slot + chunk_offset(row, in_slot / Pack<T>::kSize));
          target[in_slot % Pack<T>::kSize] = from_float<T>(x[m][n][2 * h]);
          target[in_slot % Pack<T>::kSize + 1] = from_float<T>(x[m][n][2 * h + 1]);
        }

    if (p.whole) __syncthreads();  // W is written; otherwise next_step() sees to it
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk >= slice_chunks) continue;
      if (!p.whole) next_step();
      multiply_weights<Math, kRows, kColumns>(sums[chunk], w_slots, a_start,
                                              b_slot(p.whole ? tile * tile_steps + first_chunk + chunk : step),
                                              warp % kWarpsAcross * kWidth);
      if (!p.whole) ++step;
    }
  }

  float* partial = p.partial + (int64_t{blockIdx.z} * p.a.padded + first_row) * p.a.padded_dim;
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
          store_global(reinterpret_cast<float2*>(partial + int64_t{row} * p.a.padded_dim + column),
                       float2{sums[chunk][m][n][2 * h], sums[chunk][m][n][2 * h + 1]});
        }
  }
}

/// What sums of rows are multiplied by: numbers on the device, 1 where null, and one that the host knows.
struct TileFactor {
  const float *times, *divided_by;
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
  float factor = p.factor.constant;
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
