// Standard normal numbers from Philox, with the same bits on every instruction set and on a GPU: every operation below
// is an integer operation or a correctly rounded one of IEEE 754, in one fixed order, and none is fused with another.
//
// The numbers of a sample come in groups of 64 that are made from 16 blocks of Philox: number 64·g + 16·j + l is number
// j of block 16·g + l. So vectors of 16, 8 or 4 lanes store them without a transposition.
//
// A block's words (w0, w1) make numbers 0 and 1, (w2, w3) make 2 and 3 (Box-Muller): radius √(−2·ln u) with
// u = (⌊w/2⌋ + ½) / 2³¹, at most 6.66, and angle w/2³² of a turn. Errors stay below 3e-7 of the radius.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/common/philox.h"

namespace sslfast {

constexpr int64_t kNormalGroup = 64;                     // numbers
constexpr int kNormalBlocks = 16;                        // blocks of Philox that make them
constexpr int64_t kMaxNormals = int64_t{1} << (24 + 2);  // of a sample: 2²⁴ blocks of four

/// The arithmetic on one number. csrc/common/normal_vec.h has the same on vectors.
struct ScalarOps {
  using Float = float;
  using Int = int32_t;

  /// a·b, rounded before anything is added to it.
  static SSLFAST_HOST_DEVICE_MEMBER float times(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    float product = a * b;
#if defined(__x86_64__)
    __asm__("" : "+x"(product));
#elif defined(__aarch64__)
    __asm__("" : "+w"(product));
#endif
    return product;
#endif
  }
  static SSLFAST_HOST_DEVICE_MEMBER float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
  }
  static SSLFAST_HOST_DEVICE_MEMBER float to_float(int32_t x) { return static_cast<float>(x); }
  static SSLFAST_HOST_DEVICE_MEMBER int32_t bits(float x) {
    int32_t result;
    memcpy(&result, &x, sizeof x);
    return result;
  }
  static SSLFAST_HOST_DEVICE_MEMBER float from_bits(int32_t x) {
    float result;
    memcpy(&result, &x, sizeof x);
    return result;
  }
  /// The bits shifted right, zeros coming in.
  static SSLFAST_HOST_DEVICE_MEMBER int32_t shift_right(int32_t x, int by) {
    return static_cast<int32_t>(static_cast<uint32_t>(x) >> by);
  }
  static SSLFAST_HOST_DEVICE_MEMBER int32_t shift_left(int32_t x, int by) {
    return static_cast<int32_t>(static_cast<uint32_t>(x) << by);
  }
  static SSLFAST_HOST_DEVICE_MEMBER int32_t sum(int32_t x, int32_t y) {
    return static_cast<int32_t>(static_cast<uint32_t>(x) + static_cast<uint32_t>(y));
  }
};

/// −2·ln(u) for u in [2⁻³², 1]. With u = 2ᵉ·(1 + f), f from √½ − 1 to √2 − 1: −2·ln2·e − 2f + f²·q(f).
template <typename Ops>
SSLFAST_HOST_DEVICE typename Ops::Float minus_two_log(typename Ops::Float u) {
  using Int = typename Ops::Int;
  const Int bits = Ops::bits(u);
  const Int exponent = Ops::sum(bits, Int{} - 0x3F3504F3) >> 23;  // 0x3F3504F3: √½; the sign is kept
  const auto f = Ops::from_bits(Ops::sum(bits, Int{} - Ops::shift_left(exponent, 23))) - 1.0f;
  // Fitted on that interval, relative error of the whole 3.0e-8.
  auto q = Ops::times(f, -0.17959056794643402f + typename Ops::Float{}) + 0.2885376811027527f;
  q = Ops::times(f, q) - 0.29767370223999023f;
  q = Ops::times(f, q) + 0.3310357332229614f;
  q = Ops::times(f, q) - 0.39926955103874207f;
  q = Ops::times(f, q) + 0.5000516772270203f;
  q = Ops::times(f, q) - 0.6666786670684814f;
  q = Ops::times(f, q) + 0.9999996423721313f;
  const auto of_mantissa = Ops::times(Ops::times(f, f), q) - (f + f);
  return of_mantissa - Ops::times(Ops::to_float(exponent), 1.3862943649291992f + typename Ops::Float{});
}

/// Two independent standard normal numbers from two words.
template <typename Ops>
SSLFAST_HOST_DEVICE void normal_pair(typename Ops::Int word0, typename Ops::Int word1, typename Ops::Float* first,
                                     typename Ops::Float* second) {
  using Int = typename Ops::Int;
  using Float = typename Ops::Float;
  const Float u = Ops::times(Ops::to_float(Ops::shift_right(word0, 1)) + 0.5f, 4.656612873077393e-10f + Float{});
  const Float radius = Ops::square_root(minus_two_log<Ops>(u));

  // The angle: whole quarter turns, and x in [−½, ½] of one. sin and cos of x·π/2, errors 5e-9 and 2.8e-8.
  const Int quarter = Ops::shift_right(Ops::sum(word1, Int{} + 0x20000000), 30);
  const Float x = Ops::times(Ops::to_float(Ops::sum(word1, Ops::shift_left(Int{} - quarter, 30))), 0x1p-30f + Float{});
  const Float z = Ops::times(x, x);
  Float s = Ops::times(z, -0.004602177068591118f + Float{}) + 0.07968022674322128f;
  s = Ops::times(z, s) - 0.6459634900093079f;
  s = Ops::times(x, Ops::times(z, s) + 1.5707963705062866f);
  Float c = Ops::times(z, -0.020408352836966515f + Float{}) + 0.2535986304283142f;
  c = Ops::times(z, c) - 1.2336970567703247f;
  c = Ops::times(z, c) + 1.0f;

  // After an odd number of quarter turns they change places; the signs follow the quadrant.
  const Int sine = Ops::bits(s), cosine = Ops::bits(c), swap = (sine ^ cosine) & (Int{} - (quarter & 1));
  const Int cosine_sign = Ops::shift_left((quarter + 1) & 2, 30), sine_sign = Ops::shift_left(quarter & 2, 30);
  *first = radius * Ops::from_bits(cosine ^ swap ^ cosine_sign);
  *second = radius * Ops::from_bits(sine ^ swap ^ sine_sign);
}

/// The four normal numbers of one block.
SSLFAST_HOST_DEVICE void normal_block(uint64_t seed, uint64_t sample, uint32_t step, PhiloxPurpose purpose,
                                      uint32_t block, float* out) {
  const Philox4 r = philox_draw(seed, sample, step, purpose, block);
  normal_pair<ScalarOps>(static_cast<int32_t>(r.word[0]), static_cast<int32_t>(r.word[1]), out, out + 1);
  normal_pair<ScalarOps>(static_cast<int32_t>(r.word[2]), static_cast<int32_t>(r.word[3]), out + 2, out + 3);
}

}  // namespace sslfast
