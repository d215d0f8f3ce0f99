// Fused augmentation on CUDA: crop, resize, flip → steps in the order of the task → normalise → store. A block of
// threads makes one tile of one view; between the source and the output nothing but sums goes through global memory.
//
//   source rows ──cp.async──▶ shared ──columns, then rows of the resampling──▶ image (C planes of float) in shared
//   image ──runs of steps that look at one pixel; blur, one plane at a time──▶ ──(x − mean) / std──▶ output, 16 bytes
//
// Two steps need more than a pixel. The blur reads `radius` pixels beyond the tile: they are made again here. Contrast
// blends with the mean grey of the whole image, as it is just before it. Hence three ways:
//
//   whole    the image is the tile (up to 64 × 64 pixels): one kernel
//   tiles    of 64 × 32. A first kernel makes the image up to the contrast and leaves a sum of grey for each tile; the
//            second makes it again, to the end. Reading the crop twice (3 bytes a source pixel, the second time mostly
//            from the L2 cache) is cheaper than writing floats and reading them (24 bytes a pixel)
//   scratch  the blur reaches too far for shared memory: as `whole`, with the image in global memory. No usual
//            augmentation comes here
//
// Least traffic of a task: C·h'·w' elements of the crop in, C·h·w elements out. Here, at 224 pixels: the crop once,
// (1 + 2·radius/64)·(1 + 2·radius/32) of it if it is blurred, once more if its contrast changes; and a float a tile.
//
// Determinism: each pixel is computed by one thread, in an order that depends on the task and the size alone; sums of
// grey are added in a fixed order. So the batch that a task is in leaves no trace.
#include "csrc/common/color.h"
#include "csrc/common/convert.cuh"
#include "csrc/common/cp_async.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/memory.cuh"
#include "csrc/common/warp.cuh"
#include "csrc/ops/cuda/augment_kernel.h"

namespace sslfast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileWidth = 64, kTileHeight = 32;
constexpr int kRun = 8;         // neighbouring pixels that one thread blurs
constexpr int kChunkRows = 16;  // source rows that are resampled together, at most
constexpr int kStageBytes = 6144;
constexpr size_t kWholeBytes = 76 * 1024;  // of shared memory: two blocks on a multiprocessor of an A100
constexpr int kScratchBlocks = 264;        // of the third way: two for each multiprocessor of an H100

// ---------------------------------------------------------------------------------------------------- layout

/// Work areas of a block, in bytes from the start of its shared memory, or, from `columns` on, of its scratch.
struct Layout {
  static constexpr int kSum = 0;                                    // kReduceBytes, then the result of a sum
  static constexpr int kTask = 64;                                  // AugmentCudaTask
  static constexpr int kWeights = kTask + sizeof(AugmentCudaTask);  // of the Gaussian: double, then float
  static constexpr int kShifts = kWeights + 12 * (kMaxBlurRadius + 1);
  static constexpr int kStage = kShifts + 4 * 3 * kChunkRows;
  static_assert(kTask % 16 == 0 && kWeights % 16 == 0 && kStage % 16 == 0);
  int64_t columns, rows;  // ResampleTaps of the region
  int64_t lines;          // [kChunkRows][C][region width]: resampled columns; or [region height][tile width | 1]: blur
  int64_t image;          // [C][region height][region width | 1]
  int64_t bytes;
};

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

Layout layout_of(int channels, int tile_width, int region_width, int region_height, int64_t base) {
  Layout l = {};
  l.bytes = base;
  const auto take = [&](int64_t bytes) {
    const int64_t start = l.bytes;
    l.bytes += round_up(bytes, 16);
    return start;
  };
  l.columns = take(int64_t{16} * region_width);
  l.rows = take(int64_t{16} * region_height);
  const int64_t resampled = int64_t{4} * kChunkRows * channels * region_width;
  const int64_t blurred = int64_t{4} * region_height * (tile_width | 1);
  l.lines = take(resampled > blurred ? resampled : blurred);
  l.image = take(int64_t{4} * channels * region_height * (region_width | 1));
  return l;
}

Layout whole_layout(const AugmentForwardCudaParams& p, int64_t base) {
  return layout_of(p.channels, p.width, p.width, p.height, base);
}

Layout tile_layout(const AugmentForwardCudaParams& p, int radius) {
  const auto side = [&](int tile, int all) { return tile + 2 * radius < all ? tile + 2 * radius : all; };
  return layout_of(p.channels, kTileWidth, side(kTileWidth, p.width), side(kTileHeight, p.height),
                   Layout::kStage + kStageBytes);
}

struct KernelParams {
  AugmentForwardCudaParams op;
  const AugmentCudaTask* tasks;
  int64_t count;
  int tile_width, tile_height, tiles_across, tiles;
  Layout layout;
  bool aligned;         // rows of the output, or whole planes if a tile is as wide as they are, start at 16 bytes
  float* sums_of_grey;  // [task][tile]; tiles only
  char* scratch;        // [block][layout.bytes]; scratch only
};

/// The part of a view that a block makes, and the part that it needs for that: coordinates of the output.
struct Region {
  int tile_x, tile_y, tile_width, tile_height;
  int x, y, width, height, pitch;
};

// Work areas are in shared memory or, the third way, in global memory.
template <bool kInShared, typename T>
__device__ __forceinline__ T get(const T* p) {
  if constexpr (kInShared) return *p;
  return load_global(p);
}
template <bool kInShared, typename T>
__device__ __forceinline__ void put(T* p, T value) {
  if constexpr (kInShared)
    *p = value;
  else
    store_global(p, value);
}

struct Work {
  const AugmentCudaTask* task;
  double* gaussian;
  float* weights;
  int* shifts;
  unsigned char* stage;
  float* result;
  ResampleTaps* columns;
  ResampleTaps* rows;
  float* lines;
  float* image;
};

// ---------------------------------------------------------------------------------------------------- resizing

/// Copies source rows [row, row + count) between two columns to shared memory, as they lie in memory: one segment a
/// row, or one for each of its planes, each in a slot of its own. shifts: where in its slot a segment begins.
struct Source {
  const char* data;   // element (0, 0) of the crop
  const char* begin;  // of the image's memory
  const char* end;
  int64_t row_stride, channel_stride;  // in bytes
  int column_stride;                   // in bytes
  int first_column, columns;           // of the crop, that the region needs
  int segments, slot_bytes;            // of a row
};

__device__ __forceinline__ void stage_rows(const Source& s, const Work& work, int row, int count) {
  const int packs = s.slot_bytes / 16;
  for (int i = threadIdx.x; i < count * s.segments * packs; i += kThreads) {
    const int segment = i / packs, pack = i % packs;
    const char* start = s.data + (row + segment / s.segments) * s.row_stride + segment % s.segments * s.channel_stride +
                        int64_t{s.first_column} * s.column_stride;
    const char* stop = start + s.columns * s.column_stride;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(start) % 16);
    const char* from = start - shift + 16 * pack;
    unsigned char* to = work.stage + segment * s.slot_bytes + 16 * pack;
    if (pack == 0) work.shifts[segment] = shift;
    if (from >= s.begin && from + 16 <= s.end) {
      if (from < stop) cp_async_16(to, from);
    } else {  // the pack hangs over the image's memory
      for (int b = 0; b < 16; ++b)
        if (from + b >= start && from + b < stop) to[b] = load_global(reinterpret_cast<const unsigned char*>(from) + b);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

/// The crop, resized and flipped, for the pixels of the region.
template <typename Pixel, int kChannels, bool kInShared>
__device__ __forceinline__ void resize(const KernelParams& p, const Region& region, const Work& work) {
  const AugmentCudaTask& task = *work.task;
  const Interpolation interpolation = p.op.interpolation;
  const bool antialias = p.op.antialias;
  for (int i = threadIdx.x; i < region.width; i += kThreads) {
    const int x = task.flip ? p.op.width - 1 - (region.x + i) : region.x + i;
    put<kInShared>(work.columns + i, resample_taps(x, task.crop_width, p.op.width, interpolation, antialias));
  }
  for (int i = threadIdx.x; i < region.height; i += kThreads)
    put<kInShared>(work.rows + i, resample_taps(region.y + i, task.crop_height, p.op.height, interpolation, antialias));
  __syncthreads();

  const auto index_in = [](int size) { return [size](int i) { return resample_index(i, size); }; };
  const auto row_index = index_in(task.crop_height), column_index = index_in(task.crop_width);
  const float row_stretch = static_cast<float>(resample_stretch(task.crop_height, p.op.height, antialias));
  const float column_stretch = static_cast<float>(resample_stretch(task.crop_width, p.op.width, antialias));
  const float unit = sizeof(Pixel) == 1 ? 1.0f / 255.0f : 1.0f;

  const ResampleTaps left = get<kInShared>(work.columns + (task.flip ? region.width - 1 : 0));
  const ResampleTaps right = get<kInShared>(work.columns + (task.flip ? 0 : region.width - 1));
  const ResampleTaps bottom = get<kInShared>(work.rows + region.height - 1);
  const int first_row = row_index(get<kInShared>(work.rows).first);
  const int end_row = row_index(bottom.first + bottom.taps - 1) + 1;

  Source s;
  s.begin = static_cast<const char*>(task.image);
  s.end = static_cast<const char*>(task.image_end);
  s.row_stride = task.row_stride * static_cast<int64_t>(sizeof(Pixel));
  s.column_stride = static_cast<int>(task.column_stride) * static_cast<int>(sizeof(Pixel));
  s.channel_stride = task.channel_stride * static_cast<int64_t>(sizeof(Pixel));
  s.data = s.begin + task.crop_top * s.row_stride + int64_t{task.crop_left} * s.column_stride;
  s.first_column = column_index(left.first);
  s.columns = column_index(right.first + right.taps - 1) + 1 - s.first_column;
  const bool interleaved = kChannels == 3 && task.column_stride == 3;
  s.segments = interleaved ? 1 : kChannels;
  const int64_t slot_bytes = int64_t{s.columns} * s.column_stride / 16 * 16 + 32;
  const bool staged = kInShared && slot_bytes * s.segments <= kStageBytes;
  s.slot_bytes = static_cast<int>(slot_bytes);
  const int fitting = staged ? kStageBytes / (s.slot_bytes * s.segments) : kChunkRows;
  const int chunk_rows = fitting < kChunkRows ? fitting : kChunkRows;

  const int column_step = static_cast<int>(task.column_stride);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int chunk = first_row; chunk < end_row; chunk += chunk_rows) {
    const int rows = min(chunk_rows, end_row - chunk);
    if (staged) {
      stage_rows(s, work, chunk, rows);
      __syncthreads();
    }
    // lines[row][channel][x] = Σ_k weight(k) · source[row][channel][first(x) + k]
    for (int r = warp; r < rows; r += kWarps) {
      const auto resample = [&](const auto& value) {
        for (int x = lane; x < region.width; x += 32) {
          const ResampleTaps taps = get<kInShared>(work.columns + x);
          const float start = taps.start * column_stretch;
          float sum[kChannels] = {};
          for (int k = 0; k < taps.taps; ++k) {
            const float weight = resample_weight(k * column_stretch + start, interpolation, antialias);
            const int at = (column_index(taps.first + k) - s.first_column) * column_step;
#pragma unroll
            for (int c = 0; c < kChannels; ++c) sum[c] += weight * static_cast<float>(value(c, at));
          }
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            put<kInShared>(work.lines + (r * kChannels + c) * region.width + x, sum[c] * taps.norm);
        }
      };
      const Pixel* source[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const int segment = interleaved ? r : r * kChannels + c;
        source[c] = staged
                        ? reinterpret_cast<const Pixel*>(work.stage + segment * s.slot_bytes + work.shifts[segment]) +
                              (interleaved ? c : 0)
                        : reinterpret_cast<const Pixel*>(s.data + (chunk + r) * s.row_stride + c * s.channel_stride +
                                                         int64_t{s.first_column} * s.column_stride);
      }
      if (staged)
        resample([&](int c, int at) { return source[c][at]; });
      else
        resample([&](int c, int at) { return load_global(source[c] + at); });
    }
    __syncthreads();
    // image[channel][y][x] += Σ_k weight(k) · lines[first(y) + k][channel][x], for the rows that are there
    for (int y = warp; y < region.height; y += kWarps) {
      const ResampleTaps taps = get<kInShared>(work.rows + y);
      if (row_index(taps.first) >= chunk + rows || row_index(taps.first + taps.taps - 1) < chunk) continue;
      const bool starts = row_index(taps.first) >= chunk;
      const bool ends = row_index(taps.first + taps.taps - 1) < chunk + rows;
      const int from = antialias && !starts ? chunk - taps.first : 0;
      const int to = antialias && !ends ? chunk + rows - taps.first : taps.taps;
      const float start = taps.start * row_stretch;
      for (int x = lane; x < region.width; x += 32) {
        float* pixel = work.image + y * region.pitch + x;
        const int plane = region.height * region.pitch;
        float sum[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[c] = starts ? 0.0f : get<kInShared>(pixel + c * plane);
        for (int k = from; k < to; ++k) {
          const int row = row_index(taps.first + k) - chunk;
          if (row < 0 || row >= rows) continue;
          const float weight = resample_weight(k * row_stretch + start, interpolation, antialias);
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            sum[c] += weight * get<kInShared>(work.lines + (row * kChannels + c) * region.width + x);
        }
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          put<kInShared>(pixel + c * plane, ends ? sum[c] * (taps.norm * unit) : sum[c]);
      }
    }
    if (!staged) __syncthreads();  // before `lines` is written again
  }
  __syncthreads();
}

// ---------------------------------------------------------------------------------------------------- steps

/// Applies steps [begin, end), none of them a blur, to kCount pixels. One channel: r.
template <int kChannels, int kCount>
__device__ __forceinline__ void recolor(const AugmentCudaTask& task, int begin, int end, float contrast_offset,
                                        Rgb<float> (&pixels)[kCount]) {
  const auto each = [&](const auto& change) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      pixels[i].r = change(pixels[i].r);
      if constexpr (kChannels == 3) pixels[i].g = change(pixels[i].g), pixels[i].b = change(pixels[i].b);
    }
  };
  for (int step = begin; step < end; ++step) {
    const float value = task.steps[step].value;
    switch (task.steps[step].kind) {
      case kBrightness:
        each([=](float x) { return blend(x, value, 0.0f); });
        break;
      case kContrast:
        each([=](float x) { return blend(x, value, contrast_offset); });
        break;
      case kSolarize:
        each([=](float x) { return solarize(x, value); });
        break;
      default:
        if constexpr (kChannels == 3) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            if (task.steps[step].kind == kSaturation) {
              pixels[i] = saturate(pixels[i], value);
            } else if (task.steps[step].kind == kHue) {
              pixels[i] = shift_hue(pixels[i], value);
            } else {
              const float grey = luma(pixels[i]);
              pixels[i] = {grey, grey, grey};
            }
          }
        }
    }
  }
}

template <int kChannels, bool kInShared>
__device__ __forceinline__ Rgb<float> get_pixel(const float* pixel, int plane) {
  const float r = get<kInShared>(pixel);
  if constexpr (kChannels == 1) return {r, r, r};
  return {r, get<kInShared>(pixel + plane), get<kInShared>(pixel + 2 * plane)};
}

/// Applies steps [begin, end) in place, to the whole region or to the tile in it; returns this thread's part of the sum
/// of grey over the tile.
template <int kChannels, bool kInShared>
__device__ __forceinline__ float sweep(const Region& region, const Work& work, int begin, int end,
                                       float contrast_offset, bool only_tile) {
  const int plane = region.height * region.pitch;
  const int border_x = region.tile_x - region.x, border_y = region.tile_y - region.y;
  float grey = 0.0f;
  for (int y = threadIdx.x / 32; y < region.height; y += kWarps) {
    const bool row_in_tile = y >= border_y && y < border_y + region.tile_height;
    if (only_tile && !row_in_tile) continue;
    for (int x = threadIdx.x % 32; x < region.width; x += 32) {
      const bool in_tile = row_in_tile && x >= border_x && x < border_x + region.tile_width;
      if (only_tile && !in_tile) continue;
      float* pixel = work.image + y * region.pitch + x;
      Rgb<float> rgb[1] = {get_pixel<kChannels, kInShared>(pixel, plane)};
      recolor<kChannels>(*work.task, begin, end, contrast_offset, rgb);
      put<kInShared>(pixel, rgb[0].r);
      if constexpr (kChannels == 3) {
        put<kInShared>(pixel + plane, rgb[0].g);
        put<kInShared>(pixel + 2 * plane, rgb[0].b);
      }
      if (in_tile) grey += kChannels == 1 ? rgb[0].r : luma(rgb[0]);
    }
  }
  return grey;
}

/// The sum over the block, in all its threads.
__device__ __forceinline__ float block_sum(float value, const Work& work) {
  value = block_reduce<kThreads>(value, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) *work.result = value;
  __syncthreads();
  return *work.result;
}

// ---------------------------------------------------------------------------------------------------- blur

__device__ __forceinline__ int reflect(int i, int n) {
  i = i < 0 ? -i : i;
  return i >= n ? 2 * (n - 1) - i : i;
}

/// out(i) = Σ_k weights[|k|] · in(i + k) for i < kRun. Each value is read once and passes through a window of
/// registers.
template <typename In, typename Out>
__device__ __forceinline__ void blur_run(int radius, const float* weights, const In& in, const Out& out) {
  float window[kRun], sum[kRun] = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) window[i] = in(i - radius);
  for (int first = -radius; first <= radius; first += kRun) {
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      const int k = first + u;
      if (k > radius) break;
      const float weight = weights[k < 0 ? -k : k];
#pragma unroll
      for (int i = 0; i < kRun; ++i) sum[i] += weight * window[(i + u) % kRun];
      if (k < radius) window[u] = in(k + kRun);
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) out(i, sum[i]);
}

/// Blurs the tile, plane by plane: along rows into `lines`, then along columns back into the image. The barriers of the
/// weights also end what came before.
template <int kChannels, bool kInShared>
__device__ __forceinline__ void blur(const KernelParams& p, const Region& region, const Work& work, float sigma) {
  const int radius = work.task->blur_radius, own = threadIdx.x;
  if (own <= radius) work.gaussian[own] = gaussian_weight(own, sigma);
  __syncthreads();
  if (own <= radius) {
    double total = work.gaussian[0];
    for (int k = 1; k <= radius; ++k) total += 2.0 * work.gaussian[k];
    work.weights[own] = static_cast<float>(static_cast<float>(work.gaussian[own]) / total);
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pitch = region.tile_width | 1;
  // Where pixel i of a row (of a column) of the view lies in the region; beyond the region's edge the result is not
  // used.
  const auto place = [](int i, int all, int start, int length) {
    const int at = reflect(i, all) - start;
    return at < 0 ? 0 : min(at, length - 1);
  };
  for (int c = 0; c < kChannels; ++c) {
    float* plane = work.image + c * region.height * region.pitch;
    for (int y = lane; y < region.height; y += 32) {  // neighbouring lanes: rows, in different banks
      const float* row = plane + y * region.pitch;
      for (int x = kRun * warp; x < region.tile_width; x += kRun * kWarps)
        blur_run(
            radius, work.weights,
            [&](int i) {
              return get<kInShared>(row + place(region.tile_x + x + i, p.op.width, region.x, region.width));
            },
            [&](int i, float value) {
              if (x + i < region.tile_width) put<kInShared>(work.lines + y * pitch + x + i, value);
            });
    }
    __syncthreads();
    float* target = plane + (region.tile_y - region.y) * region.pitch + region.tile_x - region.x;
    for (int x = lane; x < region.tile_width; x += 32)
      for (int y = kRun * warp; y < region.tile_height; y += kRun * kWarps)
        blur_run(
            radius, work.weights,
            [&](int i) {
              return get<kInShared>(work.lines +
                                    place(region.tile_y + y + i, p.op.height, region.y, region.height) * pitch + x);
            },
            [&](int i, float value) {
              if (y + i < region.tile_height) put<kInShared>(target + (y + i) * region.pitch + x, value);
            });
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------------- output

/// Applies the last steps, normalises and stores the tile, 16 bytes of each plane, or three times 16 bytes of pixels,
/// at once.
template <typename T, int kChannels, bool kInShared>
__device__ __forceinline__ void store_tile(const KernelParams& p, const Region& region, const Work& work, int begin,
                                           int end, float contrast_offset) {
  constexpr int kSize = Pack<T>::kSize;
  const int plane = region.height * region.pitch;
  const float* tile = work.image + (region.tile_y - region.y) * region.pitch + region.tile_x - region.x;
  const int pixels = p.op.height * p.op.width;
  T* view = static_cast<T*>(p.op.output) + work.task->output * (int64_t{kChannels} * pixels);
  // Groups of kSize pixels: of a row, or of the whole view if it is one tile.
  const bool one_row = region.tile_width == p.op.width && p.tiles == 1;
  const int rows = one_row ? 1 : region.tile_height, length = one_row ? pixels : region.tile_width;
  const int groups = (length + kSize - 1) / kSize;
  for (int i = threadIdx.x; i < rows * groups; i += kThreads) {
    const int first = i % groups * kSize, count = min(kSize, length - first);
    int y = i / groups, x = first;
    if (one_row) y = first / region.tile_width, x = first % region.tile_width;
    const int64_t at = int64_t{region.tile_y + y} * p.op.width + region.tile_x + x;
    Rgb<float> rgb[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      rgb[k] = get_pixel<kChannels, kInShared>(tile + y * region.pitch + x, plane);
      if (k + 1 < count && ++x == region.tile_width) x = 0, ++y;
    }
    recolor<kChannels>(*work.task, begin, end, contrast_offset, rgb);
    T values[kChannels][kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float value = c == 0 ? rgb[k].r : c == 1 ? rgb[k].g : rgb[k].b;
        values[c][k] = from_float<T>((value - p.op.mean[c]) * p.op.inverse_std[c]);
      }
    const bool wide = p.aligned && count == kSize;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      // Pack c: plane c, or the c-th part of the interleaved pixels.
      Pack<T> pack;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const int element = c * kSize + k;
        pack.at[k] = p.op.channels_last ? values[element % kChannels][element / kChannels] : values[c][k];
      }
      T* target = p.op.channels_last ? view + at * kChannels + c * kSize : view + c * pixels + at;
      if (wide) {
        store_pack(target, pack);
      } else {
        const int left = p.op.channels_last ? count * kChannels - c * kSize : count;
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          if (k < left) store_global(target + k, pack.at[k]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- kernels

/// One tile of one view; or, if kOnlyGrey, the sum of its grey at the contrast.
template <typename T, int kChannels, bool kInShared, bool kOnlyGrey>
__device__ __forceinline__ void make_tile(const KernelParams& p, int64_t index) {
  unsigned char* shared = shared_memory();
  char* areas = kInShared ? reinterpret_cast<char*>(shared) : p.scratch + blockIdx.x * p.layout.bytes;
  AugmentCudaTask* task = reinterpret_cast<AugmentCudaTask*>(shared + Layout::kTask);
  Work work;
  work.task = task;
  work.gaussian = reinterpret_cast<double*>(shared + Layout::kWeights);
  work.weights = reinterpret_cast<float*>(work.gaussian + kMaxBlurRadius + 1);
  work.shifts = reinterpret_cast<int*>(shared + Layout::kShifts);
  work.stage = shared + Layout::kStage;
  work.result = reinterpret_cast<float*>(shared + Layout::kSum + kReduceBytes<kThreads>);
  work.columns = reinterpret_cast<ResampleTaps*>(areas + p.layout.columns);
  work.rows = reinterpret_cast<ResampleTaps*>(areas + p.layout.rows);
  work.lines = reinterpret_cast<float*>(areas + p.layout.lines);
  work.image = reinterpret_cast<float*>(areas + p.layout.image);

  const int64_t task_index = index / p.tiles;
  const int tile = static_cast<int>(index % p.tiles);
  constexpr int kTaskPacks = sizeof(AugmentCudaTask) / 16;
  if (threadIdx.x < kTaskPacks) {
    using Words = Pack<uint32_t>;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(p.tasks + task_index) + 4 * threadIdx.x;
    reinterpret_cast<Words*>(task)[threadIdx.x] = load_pack(from);
  }
  __syncthreads();

  int contrast = 0, blur_step = 0;  // their places, or the number of steps
  while (contrast < task->step_count && task->steps[contrast].kind != kContrast) ++contrast;
  while (blur_step < task->step_count && task->steps[blur_step].kind != kBlur) ++blur_step;
  if (kOnlyGrey && contrast == task->step_count) return;
  const int count = kOnlyGrey ? contrast : task->step_count;

  Region region;
  region.tile_x = tile % p.tiles_across * p.tile_width;
  region.tile_y = tile / p.tiles_across * p.tile_height;
  region.tile_width = min(p.tile_width, p.op.width - region.tile_x);
  region.tile_height = min(p.tile_height, p.op.height - region.tile_y);
  const int border = blur_step < count ? task->blur_radius : 0;
  const auto clip = [](int from, int to, int all, int* start, int* length) {
    *start = from > 0 ? from : 0;
    *length = min(to, all) - *start;
  };
  clip(region.tile_x - border, region.tile_x + region.tile_width + border, p.op.width, &region.x, &region.width);
  clip(region.tile_y - border, region.tile_y + region.tile_height + border, p.op.height, &region.y, &region.height);
  region.pitch = region.width | 1;

  float contrast_offset = 0.0f;
  const auto set_mean = [&](float sum) {
    const float mean = sum / (static_cast<float>(p.op.height) * static_cast<float>(p.op.width));
    contrast_offset = (1.0f - task->steps[contrast].value) * mean;
  };
  if (p.sums_of_grey != nullptr && !kOnlyGrey && contrast < count) {
    float sum = 0.0f;
    if (threadIdx.x < 32)
      for (int i = threadIdx.x; i < p.tiles; i += 32) sum += load_global(p.sums_of_grey + task_index * p.tiles + i);
    set_mean(block_sum(sum, work));
  }

  if (p.op.bytes)
    resize<uint8_t, kChannels, kInShared>(p, region, work);
  else
    resize<float, kChannels, kInShared>(p, region, work);

  // Runs of steps, each up to the blur or to a contrast whose mean is not known yet. That contrast begins the next run.
  bool mean_is_known = p.sums_of_grey != nullptr, only_tile = border == 0;
  for (int begin = 0;;) {
    int end = count;
    if (blur_step >= begin && blur_step < end) end = blur_step;
    if (!mean_is_known && contrast < end) end = contrast;
    if (end == count && !kOnlyGrey)
      return store_tile<T, kChannels, kInShared>(p, region, work, begin, end, contrast_offset);

    const float grey = sweep<kChannels, kInShared>(region, work, begin, end, contrast_offset, only_tile);
    if (end == blur_step) {
      blur<kChannels, kInShared>(p, region, work, task->steps[blur_step].value);
      only_tile = true;
      begin = end + 1;
      continue;
    }
    const float sum = block_sum(grey, work);
    if (kOnlyGrey) {
      if (threadIdx.x == 0) store_global(p.sums_of_grey + index, sum);
      return;
    }
    set_mean(sum);
    mean_is_known = true;
    begin = end;
  }
}

template <typename T, int kChannels, bool kInShared>
__global__ void __launch_bounds__(kThreads, 2) augment_forward_kernel(const KernelParams p) {
  for (int64_t index = blockIdx.x; index < p.count * p.tiles; index += gridDim.x) {
    make_tile<T, kChannels, kInShared, false>(p, index);
    __syncthreads();
  }
}

template <int kChannels>
__global__ void __launch_bounds__(kThreads, 2) augment_grey_kernel(const KernelParams p) {
  for (int64_t index = blockIdx.x; index < p.count * p.tiles; index += gridDim.x) {
    make_tile<float, kChannels, true, true>(p, index);
    __syncthreads();
  }
}

template <int kChannels>
void launch_kernels(const KernelParams& p, const LaunchConfig& config) {
  constexpr auto launch_as = [](auto kernel, const LaunchConfig& c, const KernelParams& params) {
    launch<KernelParams>(kernel, c, params);
  };
  const bool in_shared = p.scratch == nullptr;
  switch (p.op.output_type) {
    case AugmentCudaOutput::float32:
      return in_shared ? launch_as(augment_forward_kernel<float, kChannels, true>, config, p)
                       : launch_as(augment_forward_kernel<float, kChannels, false>, config, p);
    case AugmentCudaOutput::bfloat16:
      return in_shared ? launch_as(augment_forward_kernel<__nv_bfloat16, kChannels, true>, config, p)
                       : launch_as(augment_forward_kernel<__nv_bfloat16, kChannels, false>, config, p);
    case AugmentCudaOutput::float16:
      return in_shared ? launch_as(augment_forward_kernel<__half, kChannels, true>, config, p)
                       : launch_as(augment_forward_kernel<__half, kChannels, false>, config, p);
  }
}

int64_t tile_count(const AugmentForwardCudaParams& p) {
  return divide_up(p.width, kTileWidth) * divide_up(p.height, kTileHeight);
}

}  // namespace

AugmentCudaWay augment_cuda_way(const AugmentForwardCudaParams& p, int blur_radius) {
  if (whole_layout(p, Layout::kStage + kStageBytes).bytes <= static_cast<int64_t>(kWholeBytes))
    return AugmentCudaWay::whole;
  return tile_layout(p, blur_radius).bytes <= static_cast<int64_t>(kMaxSharedBytes) ? AugmentCudaWay::tiles
                                                                                    : AugmentCudaWay::scratch;
}

int64_t augment_cuda_workspace_bytes(const AugmentForwardCudaParams& p, AugmentCudaWay way, int64_t count) {
  if (way == AugmentCudaWay::tiles) return 4 * count * tile_count(p);
  if (way == AugmentCudaWay::whole) return 0;
  return (count < kScratchBlocks ? count : kScratchBlocks) * whole_layout(p, 0).bytes;
}

void launch_augment_forward_cuda(const AugmentForwardCudaParams& op, AugmentCudaWay way, const AugmentCudaTask* tasks,
                                 int64_t count, int max_blur_radius, void* workspace, cudaStream_t stream) {
  KernelParams p = {};
  p.op = op;
  p.tasks = tasks;
  p.count = count;
  const bool tiled = way == AugmentCudaWay::tiles;
  p.tile_width = tiled ? kTileWidth : op.width;
  p.tile_height = tiled ? kTileHeight : op.height;
  p.tiles_across = static_cast<int>(divide_up(op.width, p.tile_width));
  p.tiles = p.tiles_across * static_cast<int>(divide_up(op.height, p.tile_height));
  const int pack = op.output_type == AugmentCudaOutput::float32 ? 4 : 8;
  p.aligned =
      (p.tiles == 1 ? op.height * op.width : op.width) % pack == 0 && reinterpret_cast<uintptr_t>(op.output) % 16 == 0;
  size_t shared_bytes = Layout::kStage;
  int64_t blocks = count * p.tiles;
  if (way == AugmentCudaWay::scratch) {
    p.layout = whole_layout(op, 0);
    p.scratch = static_cast<char*>(workspace);
    blocks = blocks < kScratchBlocks ? blocks : kScratchBlocks;
  } else {
    p.layout = tiled ? tile_layout(op, max_blur_radius) : whole_layout(op, Layout::kStage + kStageBytes);
    p.sums_of_grey = tiled ? static_cast<float*>(workspace) : nullptr;
    shared_bytes = static_cast<size_t>(p.layout.bytes);
  }
  constexpr int64_t kMostBlocks = 0x7FFFFFFF;
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
  if (tiled) {
    const LaunchConfig config = {"augment_grey", grid, kThreads, shared_bytes, stream};
    op.channels == 3 ? launch(augment_grey_kernel<3>, config, p) : launch(augment_grey_kernel<1>, config, p);
  }
  const LaunchConfig config = {"augment_forward", grid, kThreads, shared_bytes, stream};
  op.channels == 3 ? launch_kernels<3>(p, config) : launch_kernels<1>(p, config);
}

}  // namespace sslfast
