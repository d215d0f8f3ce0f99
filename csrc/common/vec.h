// A SIMD vector as the compiler's own vector type: + - * / work on it, and a * b + c contracts to a fused multiply-add.
// Its width is the instruction set's that the file is compiled for. A kernel that is written with it gets SSE, AVX2 or
// AVX-512 code from one text, for float and double alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sslfast {
namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kVecBytes = 64;
#elif defined(CPU_CAPABILITY_AVX2)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif

template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVecBytes)));
  typedef int32_t ints __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVecBytes)));
  typedef int64_t ints __attribute__((vector_size(kVecBytes)));
};

template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
using IntVec = typename VecOf<T>::ints;
template <typename T>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

template <typename T>
inline __attribute__((always_inline)) Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
inline __attribute__((always_inline)) void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename T>
inline __attribute__((always_inline)) Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

/// Sum of the lanes in a fixed order (halving), the same on every run.
template <typename T>
inline __attribute__((always_inline)) T sum_lanes(Vec<T> v) {
  T lane[kLanes<T>];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

/// exp(x) for x up to about 80 (the losses call it with x ≤ 0), to about 1 ulp; NaN stays NaN. Where exp(x) would be
/// smaller than the smallest normal number, that number is the result.
///
/// x = n·ln2 + r with an integer n and |r| ≤ ln2/2, exp(x) = 2ⁿ·exp(r), exp(r) by a polynomial. Adding `magic` rounds
/// to an integer and leaves n + exponent bias in the low bits, where a shift makes 2ⁿ of it.
inline __attribute__((always_inline)) Vec<float> vec_exp(Vec<float> x) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  x = x < -87.3f ? broadcast(-87.3f) : x;
  const Vec<float> t = x * 1.44269504f + kMagic;
  const Vec<float> n = t - kMagic;
  Vec<float> r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // Relative error 3.1e-9, fitted on |r| ≤ ln2/2 with the first two coefficients held at 1.
  Vec<float> p = r * 0.0013814598655870402f + 0.008368716888381795f;
  p = p * r + 0.041668388045659546f;
  p = p * r + 0.16666520631616127f;
  p = p * r + 0.4999999344779185f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * reinterpret_cast<Vec<float>>(reinterpret_cast<IntVec<float>>(t) << 23);
}

inline __attribute__((always_inline)) Vec<double> vec_exp(Vec<double> x) {
  constexpr double kMagic = 6755399441055744.0 + 1023.0;
  x = x < -708.0 ? broadcast(-708.0) : x;
  const Vec<double> t = x * 1.4426950408889634 + kMagic;
  const Vec<double> n = t - kMagic;
  Vec<double> r = x - n * 0.693147180369123816490;
  r = r - n * 1.90821492927058770002e-10;
  Vec<double> p = broadcast(1.0 / 6227020800.0);  // Taylor to r¹³: 4e-18
  constexpr double kFactorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0,
                                    120.0,       24.0,       6.0,       2.0,      1.0,     1.0};
  for (const double factorial : kFactorials) p = p * r + 1.0 / factorial;
  return p * reinterpret_cast<Vec<double>>(reinterpret_cast<IntVec<double>>(t) << 52);
}

/// log(1 + exp(x)) to the last digits of a small result.
inline double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
