// Feeds tiles of products: a block keeps 128 rows of one packed matrix and visits rows of another, tile after tile.
// cp.async fills slots (csrc/common/mma.cuh) of later steps while those of this one are multiplied.
//
// A step is one or two chunks of a tile. Steps go through a ring of stages in shared memory. Losses that multiply by
// the visited rows once more (csrc/common/weighted_rows.cuh) keep a tile's stages until it is done, or load a slice of
// its chunks again where there is no room.
#pragma once

#include "csrc/common/tile.cuh"

namespace sslfast {

static_assert(kPackedRows == kTileRows);

inline constexpr int kKeptSlotBytes = kTileRows * kSlotRowBytes;
inline constexpr int kTileBuffers = 5;  // for what comes once a tile: no more tiles are in use and under way

/// What shared memory holds.
struct SlotPlan {
  int group, ahead, stages;  // chunks of a step; steps that are under way, at most 3; of the ring
  bool resident;             // the kept rows are in shared memory from the first tile on; otherwise with each step
  bool whole;                // a tile's stages stay until it is done
  int bytes;                 // of all slots
};

/// The plan that waits least. slice_chunks: of the second use of visited rows, or 0. more_bytes: of shared memory
/// behind the slots. two_blocks: if two blocks can be on a multiprocessor, they shall.
inline SlotPlan plan_slots(int chunks, int slice_chunks, int visited_rows, int64_t more_bytes, bool two_blocks) {
  const SharedLimits limits = shared_limits();
  const int64_t half = limits.multiprocessor / 2 - limits.reserved;
  for (const int64_t limit : {two_blocks ? half : int64_t{0}, int64_t{limits.block}})
    for (const auto& [resident, whole] : {std::pair{true, true}, {true, false}, {false, true}, {false, false}})
      for (const auto& [group, ahead] : {std::pair{2, 3}, {2, 2}, {2, 1}, {1, 3}, {1, 2}, {1, 1}}) {
        const int64_t steps = slice_chunks > 0 && whole ? divide_up(chunks, group) : 1, stages = steps + ahead;
        const int64_t stage = group * (int64_t{visited_rows} * kSlotRowBytes + (resident ? 0 : kKeptSlotBytes));
        const int64_t bytes = (resident ? int64_t{chunks} * kKeptSlotBytes : 0) + stages * stage;
        if (group <= chunks && bytes + more_bytes <= limit && (resident || limit != half))
          return {group, ahead, static_cast<int>(stages), resident, whole, static_cast<int>(bytes)};
      }
  throw std::runtime_error("CUDA: the device has too little shared memory");
}

/// kVisitedFirst: products are of visited and kept rows, otherwise of kept and visited rows.
template <int kVisitedRows, bool kVisitedFirst>
struct TilePipeline {
  static constexpr int kVisitedSlotBytes = kVisitedRows * kSlotRowBytes;

  const PackedMatrix &kept, &visited;
  const SlotPlan& plan;
  int kept_tile, first_tile, tiles;     // the kept rows are kTileRows·kept_tile…, those of a tile kVisitedRows·tile…
  int first_chunk, slice_chunks;        // of the second use
  int stage = 0;                        // of the step that next() makes ready
  int fetch_tile = 0, fetch_chunk = 0;  // what is copied next
  bool fetch_again = false;             // for the second use

  __device__ __forceinline__ TilePipeline(const PackedMatrix& kept_rows, const PackedMatrix& visited_rows,
                                          const SlotPlan& slots, int tile_of_kept, int first, int count,
                                          int first_slice_chunk = 0, int chunks_of_slice = 0)
      : kept(kept_rows),
        visited(visited_rows),
        plan(slots),
        kept_tile(tile_of_kept),
        first_tile(first),
        tiles(count),
        first_chunk(first_slice_chunk),
        slice_chunks(chunks_of_slice) {}

  /// The stage `steps` steps after one; steps is less than the number of stages.
  __device__ __forceinline__ int later(int of, int steps) const {
    return of + steps < plan.stages ? of + steps : of + steps - plan.stages;
  }
  __device__ __forceinline__ unsigned char* stage_slots(int of) const {
    const int stage_bytes = plan.group * (kVisitedSlotBytes + (plan.resident ? 0 : kKeptSlotBytes));
    return shared_memory() + (plan.resident ? kept.chunks * kKeptSlotBytes : 0) + of * stage_bytes;
  }
  /// Chunk `at` of the step of a stage.
  __device__ __forceinline__ unsigned char* visited_slot(int of, int at) const {
    return stage_slots(of) + at * kVisitedSlotBytes;
  }
  __device__ __forceinline__ unsigned char* kept_slot(int of, int chunk, int at) const {
    return plan.resident ? shared_memory() + chunk * kKeptSlotBytes
                         : stage_slots(of) + plan.group * kVisitedSlotBytes + at * kKeptSlotBytes;
  }

  /// Starts the copies of one more step to a stage, and of_tile(tile)'s if it is the first of its tile.
  template <typename OfTile>
  __device__ __forceinline__ void fetch(int to, const OfTile& of_tile) {
    if (fetch_tile < tiles) {
      const int end = fetch_again ? first_chunk + slice_chunks : kept.chunks;
#pragma unroll
      for (int at = 0; at < 2; ++at) {
        const int chunk = fetch_chunk + at;
        if (at >= plan.group || chunk >= end) break;
        load_slot<kVisitedRows>(visited_slot(to, at), visited, first_tile + fetch_tile, chunk);
        if (!fetch_again && (!plan.resident || fetch_tile == 0))
          load_slot<kTileRows>(kept_slot(to, chunk, at), kept, kept_tile, chunk);
      }
      if (fetch_chunk == 0 && !fetch_again) of_tile(fetch_tile);
      fetch_chunk += plan.group;
      if (fetch_chunk >= end) {
        fetch_again = !fetch_again && !plan.whole && slice_chunks > 0;
        fetch_chunk = fetch_again ? first_chunk : 0;
        fetch_tile += !fetch_again;
      }
    }
    cp_async_commit();
  }

  template <typename OfTile>
  __device__ __forceinline__ void start(const OfTile& of_tile) {
    for (int i = 0; i < plan.ahead; ++i) fetch(i, of_tile);
  }

  /// Waits for the copies of `stage` and starts those of a later one, where all threads have done with what is there.
  template <typename OfTile>
  __device__ __forceinline__ void next(const OfTile& of_tile) {
    if (plan.ahead == 3)
      cp_async_wait<2>();
    else if (plan.ahead == 2)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    fence_for_wgmma();
    __syncthreads();
    fetch(later(stage, plan.ahead), of_tile);
  }

  /// acc = the products of the next tile.
  ///
  /// Tensor cores round their sums towards zero. With kParts == 2, where that would be the largest error, they add up
  /// one step, and steps are added here.
  template <typename Math, int kN, typename OfTile>
  __device__ __forceinline__ void products(float (&acc)[kN][4], const OfTile& of_tile) {
    clear(acc);
    for (int chunk = 0; chunk < kept.chunks; chunk += plan.group, stage = later(stage, 1)) {
      next(of_tile);
      const auto multiply = [&](float (&sum)[kN][4]) {
        begin_products(sum);
        multiply_step<Math>(sum, chunk);
        end_products(sum);
      };
      if constexpr (Math::kParts == 1) {
        multiply(acc);
      } else {
        float part[kN][4];
        clear(part);
        multiply(part);
        add(acc, part);
      }
    }
  }

  /// sums += W·(the visited rows of the tile whose products were the last), for chunks first_chunk….
  template <typename Math, int kN, int kChunks, int kWidth, typename OfTile>
  __device__ __forceinline__ void weighted_sums(float (&sums)[kChunks][kWidth][4], const Weights<Math, kN>& w,
                                                const OfTile& of_tile) {
    static_assert(8 * kN == kVisitedRows);
    const int group_shift = plan.group - 1, tile_steps = (kept.chunks + group_shift) >> group_shift;
    // With `whole` the tile's first stage is as many steps back.
    const int tile_stage = stage >= tile_steps ? stage - tile_steps : stage - tile_steps + plan.stages;
    const auto slot = [&](int chunk) {
      const int at = first_chunk + chunk;
      return visited_slot(plan.whole ? later(tile_stage, at >> group_shift) : stage, at & group_shift);
    };
    if constexpr (Math::kParts == 1) {
      if (plan.whole && slice_chunks == kChunks) {
        begin_products(sums);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) multiply_weights(sums[chunk], w, slot(chunk));
        end_products(sums, w);
        return;
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk >= slice_chunks) break;
      if (!plan.whole && (chunk & group_shift) == 0) next(of_tile);
      const auto multiply = [&](float (&sum)[kWidth][4]) {
        begin_products(sum);
        multiply_weights(sum, w, slot(chunk));
        end_products(sum, w);
      };
      if constexpr (Math::kParts == 1) {
        multiply(sums[chunk]);
      } else {
        float part[kWidth][4];
        clear(part);
        multiply(part);
        add(sums[chunk], part);
      }
      if (!plan.whole && ((chunk & group_shift) == group_shift || chunk + 1 == slice_chunks)) stage = later(stage, 1);
    }
  }

 private:
  /// acc += the products of the step that begins with `chunk`.
  template <typename Math, int kN>
  __device__ __forceinline__ void multiply_step(float (&acc)[kN][4], int chunk) {
    static_assert(8 * kN == (kVisitedFirst ? kTileRows : kVisitedRows));
#pragma unroll
    for (int at = 0; at < 2; ++at) {
      if (at >= plan.group || chunk + at >= kept.chunks) break;
      const unsigned char *own = kept_slot(stage, chunk + at, at), *other = visited_slot(stage, at);
      multiply_chunk<Math>(acc, kVisitedFirst ? other : own, kVisitedFirst ? own : other);
    }
  }
  template <int kN>
  static __device__ __forceinline__ void add(float (&acc)[kN][4], const float (&part)[kN][4]) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] += part[n][i];
  }
};

}  // namespace sslfast
