// Colour arithmetic on pixels in float32, as torchvision's functional ops define it for float images in [0, 1].
//
// T is float, or in CPU kernels Vec<float>: a vector of neighbouring pixels. Nothing branches, there are only minima,
// maxima and selects, and `a < b ? a : b` on vectors selects lane by lane.
#pragma once

#include "csrc/common/macros.h"

#if defined(CPU_CAPABILITY)
#include "csrc/common/vec.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#endif

namespace sslfast {

// To [0, 1]; NaN stays NaN, because a comparison with it is false.
SSLFAST_HOST_DEVICE float clamp_unit(float x) {
  x = 0.0f > x ? 0.0f : x;
  return 1.0f < x ? 1.0f : x;
}

#if defined(CPU_CAPABILITY)
// In intrinsics, because compilers turn the text above into comparisons and blends. The second operand comes out for
// NaN.
SSLFAST_HOST_DEVICE CPU_CAPABILITY::Vec<float> clamp_unit(CPU_CAPABILITY::Vec<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  return (CPU_CAPABILITY::Vec<float>)_mm512_min_ps(_mm512_set1_ps(1.0f), _mm512_max_ps(_mm512_setzero_ps(), (__m512)x));
#elif defined(CPU_CAPABILITY_AVX2)
  return (CPU_CAPABILITY::Vec<float>)_mm256_min_ps(_mm256_set1_ps(1.0f), _mm256_max_ps(_mm256_setzero_ps(), (__m256)x));
#elif defined(__SSE2__)
  return (CPU_CAPABILITY::Vec<float>)_mm_min_ps(_mm_set1_ps(1.0f), _mm_max_ps(_mm_setzero_ps(), (__m128)x));
#else
  const CPU_CAPABILITY::Vec<float> zero{}, one = zero + 1.0f;
  x = zero > x ? zero : x;
  return one < x ? one : x;
#endif
}
#endif

template <typename T>
SSLFAST_HOST_DEVICE T lesser(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
SSLFAST_HOST_DEVICE T greater(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
SSLFAST_HOST_DEVICE T magnitude(T x) {
  return greater(x, -x);
}

template <typename T>
struct Rgb {
  T r, g, b;
};

template <typename T>
SSLFAST_HOST_DEVICE T luma(Rgb<T> p) {
  return 0.2989f * p.r + 0.587f * p.g + 0.114f * p.b;
}

// factor · x + offset, clamped: brightness has offset 0, contrast (1 - factor) · mean grey of the image,
// saturation (1 - factor) · grey of the pixel.
template <typename T, typename Offset>
SSLFAST_HOST_DEVICE T blend(T x, float factor, Offset offset) {
  return clamp_unit(factor * x + offset);
}

template <typename T>
SSLFAST_HOST_DEVICE Rgb<T> saturate(Rgb<T> p, float factor) {
  const T offset = (1.0f - factor) * luma(p);
  return {blend(p.r, factor, offset), blend(p.g, factor, offset), blend(p.b, factor, offset)};
}

// Turns the hue by `shift` in [-0.5, 0.5] (1 is a full turn) in HSV. Grey pixels have chroma 0 and stay as they are.
template <typename T>
SSLFAST_HOST_DEVICE Rgb<T> shift_hue(Rgb<T> p, float shift) {
  const T zero{}, one = zero + 1.0f;
  const T value = greater(p.r, greater(p.g, p.b));
  const T chroma = value - lesser(p.r, lesser(p.g, p.b));
  const T scale = 1.0f / (chroma == 0.0f ? one : chroma);
  // Six times the hue: the sextant of the largest channel, and how far the other two pull from it.
  T hue = value == p.g ? (p.b - p.r) * scale + 2.0f : (p.r - p.g) * scale + 4.0f;
  hue = value == p.r ? (p.g - p.b) * scale : hue;
  hue = hue + 6.0f * shift;  // in [-4, 8]
  hue = hue < 0.0f ? hue + 6.0f : hue;
  hue = hue >= 6.0f ? hue - 6.0f : hue;
  // How much of the chroma each channel lacks, as a function of the hue.
  const T r = clamp_unit(2.0f - magnitude(hue - 3.0f));
  const T g = clamp_unit(magnitude(hue - 2.0f) - 1.0f);
  const T b = clamp_unit(magnitude(hue - 4.0f) - 1.0f);
  return {r == 0.0f ? value : clamp_unit(value - chroma * r), g == 0.0f ? value : clamp_unit(value - chroma * g),
          b == 0.0f ? value : clamp_unit(value - chroma * b)};
}

template <typename T>
SSLFAST_HOST_DEVICE T solarize(T x, float threshold) {
  return x >= threshold ? 1.0f - x : x;
}

}  // namespace sslfast
