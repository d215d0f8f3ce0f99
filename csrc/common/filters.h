// Weights of the two separable filters of the augmentation: resampling (as torch.nn.functional.interpolate with
// align_corners=False defines it) and the Gaussian (as torchvision's gaussian_blur does).
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/macros.h"

namespace sslfast {

enum Interpolation : int { kBilinear = 0, kBicubic = 1 };

SSLFAST_HOST_DEVICE double cubic(double x, double a) {
  x = fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
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

// Weights of offsets 0 … radius of the normalised Gaussian, and the radius that matters: weights below a millionth of
// the centre's are left out.
SSLFAST_HOST_DEVICE int gaussian_weights(int radius, float sigma, float* weights) {
  double total = 0.0;
  int visible = 0;
  for (int k = 0; k <= radius; ++k) {
    const double x = k / static_cast<double>(sigma);
    const double weight = exp(-0.5 * x * x);
    if (weight < 1e-6) break;
    weights[k] = static_cast<float>(weight);
    total += k == 0 ? weight : 2.0 * weight;
    visible = k;
  }
  for (int k = 0; k <= visible; ++k) weights[k] = static_cast<float>(weights[k] / total);
  return visible;
}

}  // namespace sslfast
