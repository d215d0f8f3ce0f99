// Fused augmentation of a batch: crop + resize + flip, colour jitter, greyscale, blur, solarise, normalise.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/common/augment_steps.h"
#include "csrc/common/cpu_dispatch.h"
#include "csrc/common/filters.h"

namespace sslfast {

// One source image; strides count elements. Columns lie next to each other (CHW) or channels do (HWC).
struct AugmentImage {
  const void* data;
  int64_t row_stride, column_stride, channel_stride;
};

struct AugmentForwardParams {
  const AugmentImage* images;   // (samples)
  c10::ScalarType input_dtype;  // Byte (0 … 255) or Float (0 … 1)
  int channels;                 // 1 or 3

  // Drawn parameters, (views, samples) each; the two together are the tasks: task = view · samples + sample.
  int64_t views, samples;
  const int32_t* crop;      // (…, 4): top, left, height, width
  const bool* flip;         // left to right
  const int8_t* order;      // (…, kAugmentSteps): a permutation of AugmentStep
  const float* brightness;  // factor, 1 = off
  const float* contrast;    // factor, 1 = off
  const float* saturation;  // factor, 1 = off
  const float* hue;         // fraction of a turn, 0 = off
  const bool* grayscale;
  const float* sigma;     // of the blur in output pixels, 0 = off
  const float* solarize;  // threshold, infinity = off

  int height, width;  // of the output
  Interpolation interpolation;
  bool antialias;
  int blur_radius;  // kernel_size / 2
  float mean[3], inverse_std[3];

  void* output;                  // (views, samples, channels, height, width), planar or channels_last
  c10::ScalarType output_dtype;  // Float, BFloat16 or Half
  bool channels_last;

  int max_crop_height, max_crop_width;
  int64_t threads;
  std::byte* scratch;     // one slice per thread, 64-byte aligned
  int64_t scratch_bytes;  // of a slice: augment_scratch(params, nullptr).bytes
};

// The work areas of one thread, all of them small enough for the second-level cache at 224 pixels.
struct AugmentScratch {
  int *row_first, *column_first;        // first source row or column that an output row or column reads
  int *column_base, *column_offset;     // column_first as the least of each vector of outputs, and the rest
  float *row_weights, *column_weights;  // (height, row_taps) and (column_taps, padded_width)
  float *line, *planar_line;            // one source row blend: as it lies in memory, and a plane per channel
  float *image, *blurred;               // (channels, plane)
  float* blur_line;
  int row_taps, column_taps;  // at most
  int64_t padded_width, line_stride, plane;
  int64_t bytes;
};

constexpr int64_t kAugmentPad = 32;  // floats past the end that vector code may touch

static inline AugmentScratch augment_scratch(const AugmentForwardParams& p, std::byte* base) {
  AugmentScratch s;
  s.row_taps = resample_max_taps(p.max_crop_height, p.height, p.interpolation, p.antialias);
  s.column_taps = resample_max_taps(p.max_crop_width, p.width, p.interpolation, p.antialias);
  s.padded_width = (p.width + 15) / 16 * 16;
  s.line_stride = p.max_crop_width + s.column_taps + kAugmentPad;
  s.plane = (int64_t{p.height} * p.width + 15) / 16 * 16 + kAugmentPad;
  s.bytes = 0;
  const auto take = [&](int64_t words) {  // of four bytes
    std::byte* start = base + s.bytes;
    s.bytes += (words * 4 + 63) / 64 * 64;
    return static_cast<void*>(start);
  };
  s.row_first = static_cast<int*>(take(p.height));
  s.column_first = static_cast<int*>(take(s.padded_width));
  s.column_base = static_cast<int*>(take(s.padded_width));
  s.column_offset = static_cast<int*>(take(s.padded_width));
  s.row_weights = static_cast<float*>(take(int64_t{p.height} * s.row_taps));
  s.column_weights = static_cast<float*>(take(s.padded_width * s.column_taps));
  s.line = static_cast<float*>(take(s.line_stride * p.channels));
  s.planar_line = static_cast<float*>(take(s.line_stride * p.channels));
  s.image = static_cast<float*>(take(s.plane * p.channels));
  s.blurred = static_cast<float*>(take(s.plane * p.channels));
  s.blur_line = static_cast<float*>(take(s.padded_width + 2 * (p.blur_radius + kAugmentPad)));
  return s;
}

// The steps that change anything, in the order in which they are applied.
static inline int active_steps(const AugmentForwardParams& p, int64_t task, ActiveStep* steps) {
  int count = 0;
  for (int i = 0; i < kAugmentSteps; ++i) {
    const auto kind = static_cast<AugmentStep>(p.order[task * kAugmentSteps + i]);
    float value = 0.0f;
    bool active = false;
    switch (kind) {
      case kBrightness:
        value = p.brightness[task], active = value != 1.0f;
        break;
      case kContrast:
        value = p.contrast[task], active = value != 1.0f;
        break;
      case kSaturation:
        value = p.saturation[task], active = value != 1.0f && p.channels == 3;
        break;
      case kHue:
        value = p.hue[task], active = value != 0.0f && p.channels == 3;
        break;
      case kGrayscale:
        active = p.grayscale[task] && p.channels == 3;
        break;
      case kBlur:
        value = p.sigma[task], active = value > 0.0f && p.blur_radius > 0;
        break;
      case kSolarize:
        value = p.solarize[task], active = value < __builtin_inff();
        break;
      default:
        break;
    }
    if (active) steps[count++] = {kind, value, 0.0f};
  }
  return count;
}

SSLFAST_DECLARE_CPU_LAUNCHER(launch_augment_forward_cpu, AugmentForwardParams)

/// crop, flip, order, brightness, contrast, saturation, hue, grayscale, sigma, solarize: each (views, samples, …).
using AugmentDraws = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                at::Tensor, at::Tensor, at::Tensor>;

/// What one view is drawn from: numbers in the order of AugmentNumber (csrc/ops/augment.cpp), then the steps' order.
using AugmentDistribution = std::pair<std::vector<double>, std::vector<int64_t>>;

/// image_sizes: (samples, 2) int64, height and width; sample_ids: (samples) int64.
AugmentDraws augment_draw(const at::Tensor& image_sizes, const at::Tensor& sample_ids,
                          const std::vector<AugmentDistribution>& views, uint64_t seed, int64_t epoch);

/// Philox 4x32-10 as a function of four words of counter and two of key, for tests.
std::vector<uint32_t> philox4x32_words(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key);

/// → (views, samples, channels, height, width). images: one 4-D batch, or a 3-D tensor a sample.
at::Tensor augment_forward(const std::vector<at::Tensor>& images, const std::vector<at::Tensor>& draws,
                           bool channels_first, int64_t height, int64_t width, const std::string& interpolation,
                           bool antialias, int64_t kernel_size, const std::vector<double>& mean,
                           const std::vector<double>& std, c10::ScalarType dtype, bool channels_last);

}  // namespace sslfast
