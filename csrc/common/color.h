// Colour arithmetic on one pixel in float32, as torchvision's functional ops define it for float images in [0, 1].
// No function branches: minima, maxima and selects only, so that loops over pixels turn into vector code.
#pragma once

#include <cmath>

#include "csrc/common/macros.h"

namespace sslfast {

struct Rgb {
  float r, g, b;
};

SSLFAST_HOST_DEVICE float lesser(float a, float b) { return a < b ? a : b; }
SSLFAST_HOST_DEVICE float greater(float a, float b) { return a > b ? a : b; }

// To [0, 1]; NaN stays NaN (the comparison is false and the second operand, x, comes out).
SSLFAST_HOST_DEVICE float clamp_unit(float x) {
  x = 0.0f > x ? 0.0f : x;
  return 1.0f < x ? 1.0f : x;
}

SSLFAST_HOST_DEVICE float luma(Rgb p) { return 0.2989f * p.r + 0.587f * p.g + 0.114f * p.b; }

// factor · x + offset, clamped: brightness has offset 0, contrast (1 - factor) · mean grey of the image,
// saturation (1 - factor) · grey of the pixel.
SSLFAST_HOST_DEVICE float blend(float x, float factor, float offset) { return clamp_unit(factor * x + offset); }

SSLFAST_HOST_DEVICE Rgb saturate(Rgb p, float factor) {
  const float offset = (1.0f - factor) * luma(p);
  return {blend(p.r, factor, offset), blend(p.g, factor, offset), blend(p.b, factor, offset)};
}

// One channel of HSV -> RGB: `phase` is 6·hue + (5, 3, 1 for r, g, b) in [0, 12). The channel is `value` where the
// ramp is 0 and falls to value - chroma, clamped, elsewhere.
SSLFAST_HOST_DEVICE float hue_channel(float value, float chroma, float phase) {
  phase = phase >= 6.0f ? phase - 6.0f : phase;
  const float ramp = clamp_unit(lesser(phase, 4.0f - phase));
  const float below = clamp_unit(value - chroma * ramp);
  return ramp == 0.0f ? value : below;
}

// Turns the hue by `shift` (1 is a full turn) in HSV. Grey pixels have chroma 0 and stay as they are.
SSLFAST_HOST_DEVICE Rgb shift_hue(Rgb p, float shift) {
  const float value = greater(p.r, greater(p.g, p.b));
  const float chroma = value - lesser(p.r, lesser(p.g, p.b));
  const float scale = 1.0f / (chroma == 0.0f ? 1.0f : chroma);
  // Sextant of the largest channel plus the signed distance within it: 6·hue in [-1, 5].
  const float from_r = (p.g - p.b) * scale;
  const float from_g = (p.b - p.r) * scale + 2.0f;
  const float from_b = (p.r - p.g) * scale + 4.0f;
  float hue = value == p.g ? from_g : from_b;
  hue = value == p.r ? from_r : hue;
  hue += 6.0f * shift;  // shift is in [-0.5, 0.5]: hue is in [-4, 8]
  hue = hue < 0.0f ? hue + 6.0f : hue;
  hue = hue >= 6.0f ? hue - 6.0f : hue;
  return {hue_channel(value, chroma, hue + 5.0f), hue_channel(value, chroma, hue + 3.0f),
          hue_channel(value, chroma, hue + 1.0f)};
}

SSLFAST_HOST_DEVICE float solarize(float x, float threshold) { return x >= threshold ? 1.0f - x : x; }

}  // namespace sslfast
