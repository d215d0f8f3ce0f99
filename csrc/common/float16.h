// float from and to bfloat16 and float16 by integer arithmetic: of single numbers, in loops that compilers vectorise,
// or of whole vectors (vec.h), whose lanes hold 16 bits each in the lower half of a uint32_t.
#pragma once

#include <cstdint>

namespace sslfast {
namespace CPU_CAPABILITY {

#define SSLFAST_FLOAT16_INLINE inline __attribute__((always_inline))

SSLFAST_FLOAT16_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

// To nearest, ties to even; NaN stays NaN.
template <typename Float, typename Bits>
SSLFAST_FLOAT16_INLINE Bits to_bfloat16_bits(Float x) {
  const Bits bits = __builtin_bit_cast(Bits, x);
  const Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? Bits{} + 0x7FC0u : rounded;
}

template <typename Float, typename Bits>
SSLFAST_FLOAT16_INLINE Bits to_float16_bits(Float x) {
  const Bits bits = __builtin_bit_cast(Bits, x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // Normal: rebias the exponent by 112 and round. Subnormal: adding 0.5 lines the mantissa up and rounds it.
  const Bits normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = __builtin_bit_cast(Bits, __builtin_bit_cast(Float, magnitude) + 0.5f) - 0x3F000000u;
  Bits half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? Bits{} + 0x7C00u : half;  // 65520 and more
  half = magnitude > 0x7F800000u ? Bits{} + 0x7E00u : half;
  return sign | half;
}

template <typename Float, typename Bits>
SSLFAST_FLOAT16_INLINE Float from_bfloat16_bits(Bits x) {
  return __builtin_bit_cast(Float, x << 16);
}

template <typename Float, typename Bits>
SSLFAST_FLOAT16_INLINE Float from_float16_bits(Bits x) {
  const Bits sign = (x & 0x8000u) << 16, magnitude = (x & 0x7FFFu) << 13;
  // Normal: rebias the exponent by 112. Subnormal: the same, on top of a leading 1 (2⁻¹⁴) that is then taken off.
  const Bits normal = magnitude + (112u << 23);
  const Float one_more = __builtin_bit_cast(Float, magnitude + (113u << 23));
  const Bits subnormal = __builtin_bit_cast(Bits, one_more - 6.103515625e-05f);
  Bits bits = magnitude < (1u << 23) ? subnormal : normal;
  bits = magnitude >= (31u << 23) ? magnitude | 0x7F800000u : bits;  // infinity and NaN
  return __builtin_bit_cast(Float, sign | bits);
}

SSLFAST_FLOAT16_INLINE uint16_t to_bfloat16(float x) {
  return static_cast<uint16_t>(to_bfloat16_bits<float, uint32_t>(x));
}
SSLFAST_FLOAT16_INLINE uint16_t to_float16(float x) {
  return static_cast<uint16_t>(to_float16_bits<float, uint32_t>(x));
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
