// Fused augmentation on the CPU: one task (one view of one sample) per loop iteration, threads over tasks.
//
//   source (H, W, C) uint8 or float32  ──crop, resize, flip──▶ image (C, h, w) float32 in scratch
//   image ──steps in the sample's order: brightness, contrast, saturation, hue, greyscale, blur, solarise──▶
//   (x - mean) / std ──▶ output (C, h, w) float32, bfloat16 or float16
//
// Almost every step looks at one pixel at a time, so rows are resized, recoloured and stored block by block while they
// lie in the first-level cache. Two things need the whole image first and end such a sweep: the mean grey that contrast
// blends with, and the blur. A task therefore sweeps over its image 1 + [contrast] + [blur] times.
//
// Least memory traffic per task: C·h'·w' source bytes in, C·h·w output elements out (h'×w' is the crop).
// Arithmetic per output pixel, C = 3, bilinear: resize 3·(2·2 + 2·2), jitter about 70 (hue 45 of it), blur
// 3·2·(2·taps), normalise 6.
#include <cstring>

#include "csrc/common/color.h"
#include "csrc/common/float16.h"
#include "csrc/common/vec.h"
#include "csrc/common/workers.h"
#include "csrc/ops/augment.h"

namespace sslfast {
namespace CPU_CAPABILITY {
namespace {

#define SSLFAST_INLINE inline __attribute__((always_inline))

// g++ turns a shuffle with run-time indices into one instruction; SSE2 has none, and clang no such builtin.
#if defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__)
#define SSLFAST_HAS_SHUFFLE 1
#else
#define SSLFAST_HAS_SHUFFLE 0
#endif

constexpr int64_t kBlockPixels = 1024;  // of a sweep: 12 KiB in three planes

// ---------------------------------------------------------------------------------------------------- resizing

struct Source {
  const AugmentImage* image;
  int top, left, height, width;
  int row_taps, column_taps;  // the most that any output row or column of this task needs
  int column_window;          // the most source columns that a vector of neighbouring outputs spans
  bool interleaved;           // HWC with C > 1
};

void build_tables(const AugmentForwardParams& p, const AugmentScratch& s, Source& source, bool flip) {
  const float unit = p.input_dtype == at::kByte ? 1.0f / 255.0f : 1.0f;
  source.row_taps = 0;
  for (int y = 0; y < p.height; ++y) {
    float* weights = s.row_weights + int64_t{y} * s.row_taps;
    const int taps =
        resample_weights(y, source.height, p.height, p.interpolation, p.antialias, &s.row_first[y], weights);
    for (int k = 0; k < taps; ++k) weights[k] *= unit;
    for (int k = taps; k < s.row_taps; ++k) weights[k] = 0.0f;
    source.row_taps = taps > source.row_taps ? taps : source.row_taps;
  }
  source.column_taps = 0;
  std::memset(s.column_weights, 0, sizeof(float) * s.padded_width * s.column_taps);
  float weights[64];
  float* column = s.column_taps <= 64 ? weights : s.line;  // line is free here and longer than the taps
  for (int x = 0; x < p.width; ++x) {
    int first;
    const int taps = resample_weights(x, source.width, p.width, p.interpolation, p.antialias, &first, column);
    const int at = flip ? p.width - 1 - x : x;
    s.column_first[at] = first;
    for (int k = 0; k < taps; ++k) s.column_weights[k * s.padded_width + at] = column[k];
    source.column_taps = taps > source.column_taps ? taps : source.column_taps;
  }
  for (int64_t x = p.width; x < s.padded_width; ++x) s.column_first[x] = s.column_first[p.width - 1];
  source.column_window = 0;
  constexpr int kLane = kLanes<float>;
  for (int64_t x = 0; x < s.padded_width; x += kLane) {
    int low = s.column_first[x], high = low;  // starts rise, or fall if flipped
    for (int i = 1; i < kLane; ++i) {
      low = s.column_first[x + i] < low ? s.column_first[x + i] : low;
      high = s.column_first[x + i] > high ? s.column_first[x + i] : high;
    }
    s.column_base[x / kLane] = low;
    for (int i = 0; i < kLane; ++i) s.column_offset[x + i] = s.column_first[x + i] - low;
    const int window = high - low + source.column_taps;
    source.column_window = window > source.column_window ? window : source.column_window;
  }
}

// out = wa·a + wb·b (+ out)
template <typename T, bool kAdd>
SSLFAST_INLINE void blend_rows(float* __restrict out, const T* __restrict a, const T* __restrict b, float wa, float wb,
                               int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float sum = wa * static_cast<float>(a[i]) + wb * static_cast<float>(b[i]);
    out[i] = kAdd ? out[i] + sum : sum;
  }
}

// One output row before its horizontal pass: the weighted sum of source rows, `n` elements from `offset` on.
template <typename T>
void blend_source_rows(float* out, const Source& source, int64_t offset, int64_t n, int first, const float* weights) {
  const T* data = static_cast<const T*>(source.image->data) + offset;
  const int64_t stride = source.image->row_stride;
  for (int k = 0; k < source.row_taps; k += 2) {
    // A row whose weight is zero may lie past the crop, and past the image: read its neighbour instead.
    const int a = weights[k] == 0.0f && k > 0 ? 0 : k;
    const bool pair = k + 1 < source.row_taps && weights[k + 1] != 0.0f;
    const int b = pair ? k + 1 : a;
    const T* row_a = data + (source.top + first + a) * stride;
    const T* row_b = data + (source.top + first + b) * stride;
    const float wb = pair ? weights[k + 1] : 0.0f;
    if (k == 0) {
      blend_rows<T, false>(out, row_a, row_b, weights[k], wb, n);
    } else {
      blend_rows<T, true>(out, row_a, row_b, weights[k], wb, n);
    }
  }
}

// out[x] = Σ_k weight[k][x] · line[first[x] + k] for a whole padded row.
void resample_columns(const AugmentScratch& s, const Source& source, const float* line, float* out) {
  const int taps = source.column_taps;
#if SSLFAST_HAS_SHUFFLE
  // A vector of neighbouring outputs reads inputs that lie close together: unless the image shrinks to less than about
  // half, one or two vectors of the line hold them all, and a permutation of these is much faster than a gather.
  using V = Vec<float>;
  constexpr int kLane = kLanes<float>;
  if (source.column_window <= 2 * kLane) {
    for (int64_t x = 0; x < s.padded_width; x += kLane) {
      const V low = load(line + s.column_base[x / kLane]), high = load(line + s.column_base[x / kLane] + kLane);
      IntVec<float> from;
      std::memcpy(&from, s.column_offset + x, sizeof from);
      V sum{};
      for (int k = 0; k < taps; ++k)
        sum += load(s.column_weights + k * s.padded_width + x) * __builtin_shuffle(low, high, from + k);
      store(out + x, sum);
    }
    return;
  }
#endif
  for (int64_t x0 = 0; x0 < s.padded_width; x0 += 16) {
    float sum[16] = {};
    for (int k = 0; k < taps; ++k) {
      const float* __restrict weights = s.column_weights + k * s.padded_width + x0;
#pragma omp simd
      for (int i = 0; i < 16; ++i) sum[i] += weights[i] * line[s.column_first[x0 + i] + k];
    }
    std::memcpy(out + x0, sum, sizeof sum);
  }
}

void resize_row(const AugmentForwardParams& p, const AugmentScratch& s, const Source& source, int y) {
  const int first = s.row_first[y];
  const float* weights = s.row_weights + int64_t{y} * s.row_taps;
  const AugmentImage& image = *source.image;
  const bool bytes = p.input_dtype == at::kByte;
  float* planar = s.planar_line;
  if (source.interleaved) {
    const int64_t n = int64_t{source.width} * 3, offset = int64_t{source.left} * 3;
    if (bytes) {
      blend_source_rows<uint8_t>(s.line, source, offset, n, first, weights);
    } else {
      blend_source_rows<float>(s.line, source, offset, n, first, weights);
    }
    const float* __restrict line = s.line;
    float* __restrict r = planar;
    float* __restrict g = planar + s.line_stride;
    float* __restrict b = planar + 2 * s.line_stride;
#pragma omp simd
    for (int x = 0; x < source.width; ++x) {
      r[x] = line[3 * x];
      g[x] = line[3 * x + 1];
      b[x] = line[3 * x + 2];
    }
  } else {
    for (int c = 0; c < p.channels; ++c) {
      const int64_t offset = c * image.channel_stride + source.left;
      float* out = planar + c * s.line_stride;
      if (bytes) {
        blend_source_rows<uint8_t>(out, source, offset, source.width, first, weights);
      } else {
        blend_source_rows<float>(out, source, offset, source.width, first, weights);
      }
    }
  }
  for (int c = 0; c < p.channels; ++c) {
    float* line = planar + c * s.line_stride;
    for (int k = 0; k < source.column_taps; ++k) line[source.width + k] = 0.0f;  // read with weight zero
    // The row is written in whole vectors; what hangs over is overwritten by the next row.
    resample_columns(s, source, line, s.image + c * s.plane + int64_t{y} * p.width);
  }
}

// ---------------------------------------------------------------------------------------------------- blur

int reflect(int i, int n) {
  i = i < 0 ? -i : i;
  return i >= n ? 2 * (n - 1) - i : i;
}

// kVecs vectors of Σ_k weights[|k|] · row_k, where row_k(-k) and row_k(k) point to the pixels on either side.
template <int kVecs, typename Before, typename After>
SSLFAST_INLINE void symmetric_sum(const float* center, const Before& before, const After& after, int radius,
                                  const float* weights, float* out) {
  constexpr int kLane = kLanes<float>;
  Vec<float> sum[kVecs];
  for (int i = 0; i < kVecs; ++i) sum[i] = weights[0] * load(center + i * kLane);
  for (int k = 1; k <= radius; ++k) {
    const float *a = before(k), *b = after(k), weight = weights[k];
    for (int i = 0; i < kVecs; ++i) sum[i] += weight * (load(a + i * kLane) + load(b + i * kLane));
  }
  for (int i = 0; i < kVecs; ++i) store(out + i * kLane, sum[i]);
}

// The above for a row of `width` pixels, in whole vectors.
template <typename Before, typename After>
SSLFAST_INLINE void symmetric_row(const float* center, const Before& before, const After& after, int radius,
                                  const float* weights, int width, float* out) {
  constexpr int kLane = kLanes<float>;
  int x = 0;
  for (; x + 4 * kLane <= width; x += 4 * kLane)
    symmetric_sum<4>(
        center + x, [&](int k) { return before(k) + x; }, [&](int k) { return after(k) + x; }, radius, weights,
        out + x);
  for (; x < width; x += kLane)
    symmetric_sum<1>(
        center + x, [&](int k) { return before(k) + x; }, [&](int k) { return after(k) + x; }, radius, weights,
        out + x);
}

// One row of one plane: the vertical pass goes into a line with mirrored ends, the horizontal one from there to `out`.
void blur_row(const float* plane, int height, int width, int y, int radius, const float* weights, float* line,
              float* out) {
  const float *above[kMaxBlurRadius + 1], *below[kMaxBlurRadius + 1];
  for (int k = 0; k <= radius; ++k) {
    above[k] = plane + int64_t{reflect(y - k, height)} * width;
    below[k] = plane + int64_t{reflect(y + k, height)} * width;
  }
  symmetric_row(
      above[0], [&](int k) { return above[k]; }, [&](int k) { return below[k]; }, radius, weights, width, line);
  for (int k = 1; k <= radius; ++k) {
    line[-k] = line[reflect(-k, width)];
    line[width - 1 + k] = line[reflect(width - 1 + k, width)];
  }
  symmetric_row(line, [&](int k) { return line - k; }, [&](int k) { return line + k; }, radius, weights, width, out);
}

// ---------------------------------------------------------------------------------------------------- colour

// Calls `each` for the pixels [begin, end) of one plane or of three, a vector at a time and then one at a time.
template <typename Each>
SSLFAST_INLINE void for_values(float* x, int64_t begin, int64_t end, const Each& each) {
  constexpr int kLane = kLanes<float>;
  int64_t i = begin;
  for (; i + kLane <= end; i += kLane) store(x + i, each(load(x + i)));
  for (; i < end; ++i) x[i] = each(x[i]);
}

template <typename Each>
SSLFAST_INLINE void for_pixels(float* r, float* g, float* b, int64_t begin, int64_t end, const Each& each) {
  constexpr int kLane = kLanes<float>;
  int64_t i = begin;
  for (; i + kLane <= end; i += kLane) {
    const Rgb<Vec<float>> out = each(Rgb<Vec<float>>{load(r + i), load(g + i), load(b + i)});
    store(r + i, out.r), store(g + i, out.g), store(b + i, out.b);
  }
  for (; i < end; ++i) {
    const Rgb<float> out = each(Rgb<float>{r[i], g[i], b[i]});
    r[i] = out.r, g[i] = out.g, b[i] = out.b;
  }
}

// Pixels [begin, end) of all planes, in place.
void recolor(const ActiveStep& step, int channels, float* image, int64_t plane, int64_t begin, int64_t end) {
  float *r = image, *g = image + plane, *b = image + 2 * plane;
  const float value = step.value, offset = step.offset;
  switch (step.kind) {
    case kBrightness:
    case kContrast:
      for (int c = 0; c < channels; ++c)
        for_values(image + c * plane, begin, end, [=](auto x) { return blend(x, value, offset); });
      break;
    case kSaturation:
      for_pixels(r, g, b, begin, end, [=](auto p) { return saturate(p, value); });
      break;
    case kHue:
      for_pixels(r, g, b, begin, end, [=](auto p) { return shift_hue(p, value); });
      break;
    case kGrayscale:
      for_pixels(r, g, b, begin, end, [](auto p) { return decltype(p){luma(p), luma(p), luma(p)}; });
      break;
    case kSolarize:
      for (int c = 0; c < channels; ++c)
        for_values(image + c * plane, begin, end, [=](auto x) { return solarize(x, value); });
      break;
    default:
      break;
  }
}

float sum_of_grey(int channels, const float* image, int64_t plane, int64_t begin, int64_t end) {
  const float *r = image, *g = image + plane, *b = image + 2 * plane;
  constexpr int kLane = kLanes<float>;
  Vec<float> sums{};
  float sum = 0.0f;
  int64_t i = begin;
  for (; i + kLane <= end; i += kLane)
    sums += channels == 1 ? load(r + i) : luma(Rgb<Vec<float>>{load(r + i), load(g + i), load(b + i)});
  for (; i < end; ++i) sum += channels == 1 ? r[i] : luma(Rgb<float>{r[i], g[i], b[i]});
  return sum + sum_lanes<float>(sums);
}

// ---------------------------------------------------------------------------------------------------- output

template <c10::ScalarType kDtype>
SSLFAST_INLINE auto convert(float x) {
  if constexpr (kDtype == at::kBFloat16) {
    return to_bfloat16(x);
  } else if constexpr (kDtype == at::kHalf) {
    return to_float16(x);
  } else {
    return x;
  }
}

template <c10::ScalarType kDtype>
void normalize_store(const AugmentForwardParams& p, const float* image, int64_t plane, int64_t task, int64_t begin,
                     int64_t end) {
  using T = decltype(convert<kDtype>(0.0f));
  const int64_t pixels = int64_t{p.height} * p.width;
  T* out = static_cast<T*>(p.output) + task * p.channels * pixels;
  if (p.channels_last && p.channels == 3) {
    const float* __restrict r = image, * __restrict g = image + plane, * __restrict b = image + 2 * plane;
    T* __restrict to = out;
    const float m0 = p.mean[0], m1 = p.mean[1], m2 = p.mean[2];
    const float s0 = p.inverse_std[0], s1 = p.inverse_std[1], s2 = p.inverse_std[2];
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      to[3 * i] = convert<kDtype>((r[i] - m0) * s0);
      to[3 * i + 1] = convert<kDtype>((g[i] - m1) * s1);
      to[3 * i + 2] = convert<kDtype>((b[i] - m2) * s2);
    }
    return;
  }
  for (int c = 0; c < p.channels; ++c) {
    const float* __restrict x = image + c * plane;
    T* __restrict to = out + c * pixels;
    const float mean = p.mean[c], scale = p.inverse_std[c];
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) to[i] = convert<kDtype>((x[i] - mean) * scale);
  }
}

// ---------------------------------------------------------------------------------------------------- one task

void augment_task(const AugmentForwardParams& p, const AugmentScratch& scratch, int64_t task) {
  AugmentScratch s = scratch;
  const int32_t* crop = p.crop + task * 4;
  const AugmentImage& image = p.images[task % p.samples];
  Source source{&image, crop[0], crop[1], crop[2], crop[3], 0, 0, 0, p.channels == 3 && image.column_stride == 3};
  build_tables(p, s, source, p.flip[task]);

  ActiveStep steps[kAugmentSteps];
  const int count = active_steps(p, task, steps);
  const int rows_per_block = kBlockPixels > p.width ? static_cast<int>(kBlockPixels / p.width) : 1;
  float blur_weights[kMaxBlurRadius + 1];
  int blur_radius = 0;

  // Each sweep makes rows (by resizing, by blurring, or as they are), applies the steps that need no more than a pixel,
  // and ends where the next step needs the whole image.
  int next = 0;
  bool resized = false;
  do {
    const bool blurs = resized && next < count && steps[next].kind == kBlur;
    if (blurs) blur_radius = gaussian_weights(p.blur_radius, steps[next++].value, blur_weights);
    const int begin = next;
    const bool starts_with_contrast = resized && !blurs && next < count && steps[next].kind == kContrast;
    if (starts_with_contrast) ++next;
    while (next < count && steps[next].kind != kContrast && steps[next].kind != kBlur) ++next;
    const bool last = next == count, needs_mean = !last && steps[next].kind == kContrast;
    float* planes = blurs ? s.blurred : s.image;
    double grey = 0.0;
    for (int y = 0; y < p.height; y += rows_per_block) {
      const int y_end = y + rows_per_block < p.height ? y + rows_per_block : p.height;
      for (int row = y; row < y_end && !resized; ++row) resize_row(p, s, source, row);
      for (int c = 0; c < p.channels && blurs; ++c)
        for (int row = y; row < y_end; ++row)
          blur_row(s.image + c * s.plane, p.height, p.width, row, blur_radius, blur_weights,
                   s.blur_line + p.blur_radius + kAugmentPad, s.blurred + c * s.plane + int64_t{row} * p.width);
      const int64_t from = int64_t{y} * p.width, to = int64_t{y_end} * p.width;
      for (int i = begin; i < next; ++i) recolor(steps[i], p.channels, planes, s.plane, from, to);
      if (needs_mean) grey += sum_of_grey(p.channels, planes, s.plane, from, to);
      if (last) {
        switch (p.output_dtype) {
          case at::kBFloat16:
            normalize_store<at::kBFloat16>(p, planes, s.plane, task, from, to);
            break;
          case at::kHalf:
            normalize_store<at::kHalf>(p, planes, s.plane, task, from, to);
            break;
          default:
            normalize_store<at::kFloat>(p, planes, s.plane, task, from, to);
        }
      }
    }
    if (needs_mean) {
      const double mean = grey / (double(p.height) * p.width);
      steps[next].offset = static_cast<float>((1.0 - steps[next].value) * mean);
    }
    if (blurs) {
      float* swap = s.image;
      s.image = s.blurred, s.blurred = swap;
    }
    if (last) return;
    resized = true;
  } while (true);
}

}  // namespace

void launch_augment_forward_cpu(const AugmentForwardParams& params) {
  // Tasks differ in cost, so threads take the next one whenever they are free. Which thread takes a task does not
  // affect the result.
  const int64_t tasks = params.views * params.samples;
  int64_t next = 0;
  run_workers(params.threads, [&](const Worker& worker) {
    const AugmentScratch scratch = augment_scratch(params, params.scratch + worker.index * params.scratch_bytes);
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;)
      augment_task(params, scratch, task);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
