// Weights of the two separable filters of the augmentation: resampling (as torch.nn.functional.interpolate with
// align_corners=False defines it) and the Gaussian (as torchvision's gaussian_blur does).
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/macros.h"

namespace sslfast {

enum Interpolation : int { kBilinear = 0, kBicubic = 1 };

template <typename T>
SSLFAST_HOST_DEVICE T cubic(T x, T a) {
  x = x < 0 ? -x : x;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// Half the width of the resampling filter in input pixels.
SSLFAST_HOST_DEVICE double resample_support(int in_size, int out_size, Interpolation interpolation, bool antialias) {
  const double scale = static_cast<double>(in_size) / out_size;
  return (interpolation == kBicubic ? 2.0 : 1.0) * (antialias && scale > 1.0 ? scale : 1.0);
}

// No output pixel reads more input pixels than this.
SSLFAST_HOST_DEVICE int resample_max_taps(int in_size, int out_size, Interpolation interpolation, bool antialias) {
  return static_cast<int>(ceil(resample_support(in_size, out_size, interpolation, antialias))) * 2 + 1;
}

// out[i] = Σ_k weights[k] · in[*first + k], k < the returned number of taps. The antialiased filter is cut at the
// border and normalised (cubic a = -0.5); the plain one repeats the border pixel (a = -0.75), which here means that
// taps beyond the border add their weight to it.
SSLFAST_HOST_DEVICE int resample_weights(int i, int in_size, int out_size, Interpolation interpolation, bool antialias,
                                         int* first, float* weights) {
  const double scale = static_cast<double>(in_size) / out_size;
  const double center = scale * (i + 0.5);
  if (antialias) {
    const double support = resample_support(in_size, out_size, interpolation, true);
    const double stretch = scale > 1.0 ? 1.0 / scale : 1.0;
    const int begin = center - support + 0.5 > 0.0 ? static_cast<int>(center - support + 0.5) : 0;
    const int end = center + support + 0.5 < in_size ? static_cast<int>(center + support + 0.5) : in_size;
    double total = 0.0;
    for (int k = begin; k < end; ++k) {
      const double x = (k + 0.5 - center) * stretch;
      const double weight = interpolation == kBicubic ? cubic(x, -0.5) : fmax(0.0, 1.0 - fabs(x));
      weights[k - begin] = static_cast<float>(weight);
      total += weight;
    }
    for (int k = 0; k < end - begin; ++k) weights[k] = static_cast<float>(weights[k] / total);
    *first = begin;
    return end - begin;
  }
  const int reach = interpolation == kBicubic ? 2 : 1;  // pixels on either side of the centre
  const int left = static_cast<int>(floor(center - 0.5)) - (reach - 1);
  const int begin = left < 0 ? 0 : (left > in_size - 1 ? in_size - 1 : left);
  const int taps = (in_size - begin < 2 * reach) ? in_size - begin : 2 * reach;
  for (int k = 0; k < taps; ++k) weights[k] = 0.0f;
  for (int k = left; k < left + 2 * reach; ++k) {
    const double x = k + 0.5 - center;
    const double weight = interpolation == kBicubic ? cubic(x, -0.75) : fmax(0.0, 1.0 - fabs(x));
    const int inside = k < begin ? begin : (k > in_size - 1 ? in_size - 1 : k);
    weights[inside - begin] += static_cast<float>(weight);
  }
  *first = begin;
  return taps;
}

// The same without a table, for kernels that have little memory: where the taps of output pixel i start, and what gives
// their weights. The plain filter's taps may lie beyond the border, where resample_index() repeats the border pixel.
struct alignas(16) ResampleTaps {
  int first, taps;
  float start;  // distance of the first tap from the centre in input pixels
  float norm;   // one over the sum of all weights
};

// Weight of the tap at distance x from the centre, in units in which the filter has its own width, before `norm`.
template <typename T>
SSLFAST_HOST_DEVICE T resample_weight(T x, Interpolation interpolation, bool antialias) {
  if (interpolation == kBicubic) return cubic(x, static_cast<T>(antialias ? -0.5 : -0.75));
  x = 1 - (x < 0 ? -x : x);
  return x < 0 ? 0 : x;
}

// That unit is 1 / stretch input pixels.
SSLFAST_HOST_DEVICE double resample_stretch(int in_size, int out_size, bool antialias) {
  return antialias && in_size > out_size ? static_cast<double>(out_size) / in_size : 1.0;
}

SSLFAST_HOST_DEVICE int resample_index(int i, int in_size) { return i < 0 ? 0 : (i > in_size - 1 ? in_size - 1 : i); }

SSLFAST_HOST_DEVICE ResampleTaps resample_taps(int i, int in_size, int out_size, Interpolation interpolation,
                                               bool antialias) {
  const double scale = static_cast<double>(in_size) / out_size;
  const double center = scale * (i + 0.5);
  if (!antialias) {
    const int reach = interpolation == kBicubic ? 2 : 1;  // pixels on either side of the centre
    const int first = static_cast<int>(floor(center - 0.5)) - (reach - 1);
    return {first, 2 * reach, static_cast<float>(first + 0.5 - center), 1.0f};
  }
  const double support = resample_support(in_size, out_size, interpolation, true);
  const double stretch = resample_stretch(in_size, out_size, true);
  const int first = resample_index(static_cast<int>(center - support + 0.5), in_size);
  const int last = resample_index(static_cast<int>(center + support + 0.5) - 1, in_size);
  double total = 0.0;
  for (int k = first; k <= last; ++k) total += resample_weight((k + 0.5 - center) * stretch, interpolation, true);
  return {first, last - first + 1, static_cast<float>(first + 0.5 - center), static_cast<float>(1.0 / total)};
}

SSLFAST_HOST_DEVICE double gaussian_weight(int k, float sigma) {
  const double x = k / static_cast<double>(sigma);
  return exp(-0.5 * x * x);
}

// Weights of offsets 0 … radius of the normalised Gaussian, and the radius that matters: weights below a millionth of
// the centre's are left out.
SSLFAST_HOST_DEVICE int gaussian_weights(int radius, float sigma, float* weights) {
  double total = 0.0;
  int visible = 0;
  for (int k = 0; k <= radius; ++k) {
    const double weight = gaussian_weight(k, sigma);
    if (weight < 1e-6) break;
    weights[k] = static_cast<float>(weight);
    total += k == 0 ? weight : 2.0 * weight;
    visible = k;
  }
  for (int k = 0; k <= visible; ++k) weights[k] = static_cast<float>(weights[k] / total);
  return visible;
}

}  // namespace sslfast
