// csrc/common/normal.h on vectors: the normal numbers of a sample, 64 at a time.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "csrc/common/normal.h"
#include "csrc/common/vec.h"

namespace sslfast {
namespace CPU_CAPABILITY {

struct VecOps {
  using Float = Vec<float>;
  using Int = IntVec<float>;
  typedef uint32_t Unsigned __attribute__((vector_size(kVecBytes)));

  static inline __attribute__((always_inline)) Float times(Float a, Float b) {
    Float product = a * b;
#if defined(__x86_64__)
    __asm__("" : "+x"(product));
#elif defined(__aarch64__)
    __asm__("" : "+w"(product));
#endif
    return product;
  }
  static inline __attribute__((always_inline)) Float square_root(Float x) {
    for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
    return x;
  }
  static inline __attribute__((always_inline)) Float to_float(Int x) { return __builtin_convertvector(x, Float); }
  static inline __attribute__((always_inline)) Int bits(Float x) { return reinterpret_cast<Int>(x); }
  static inline __attribute__((always_inline)) Float from_bits(Int x) { return reinterpret_cast<Float>(x); }
  static inline __attribute__((always_inline)) Int shift_right(Int x, int by) {
    return reinterpret_cast<Int>(reinterpret_cast<Unsigned>(x) >> by);
  }
  static inline __attribute__((always_inline)) Int shift_left(Int x, int by) {
    return reinterpret_cast<Int>(reinterpret_cast<Unsigned>(x) << by);
  }
  static inline __attribute__((always_inline)) Int sum(Int x, Int y) {
    return reinterpret_cast<Int>(reinterpret_cast<Unsigned>(x) + reinterpret_cast<Unsigned>(y));
  }
};

/// Philox on 64-bit lanes that hold a word each in their lower half; what the upper half holds does not matter.
struct PhiloxVec {
  typedef uint64_t Lanes __attribute__((vector_size(kVecBytes)));
  Lanes word[4];

  /// The product of the lower halves.
  static inline __attribute__((always_inline)) Lanes multiply(Lanes a, Lanes b) {
#if defined(CPU_CAPABILITY_AVX512)
    return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(CPU_CAPABILITY_AVX2)
    return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
    return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
  }

  inline __attribute__((always_inline)) void round(uint32_t key0, uint32_t key1) {
    const Lanes product0 = multiply(word[0], Lanes{} + 0xD2511F53u),
                product1 = multiply(word[2], Lanes{} + 0xCD9E8D57u);
    word[0] = (product1 >> 32) ^ word[1] ^ (Lanes{} + key0);
    word[1] = product1;
    word[2] = (product0 >> 32) ^ word[3] ^ (Lanes{} + key1);
    word[3] = product0;
  }
};

/// Numbers 64·group … 64·(group + groups) − 1 of a sample. First all words, then what they make: iterations of two
/// short loops overlap in the processor, those of a long one do not.
inline void normal_groups(uint64_t seed, uint64_t sample, uint32_t step, PhiloxPurpose purpose, int64_t group,
                          int64_t groups, float* out) {
  using Lanes = PhiloxVec::Lanes;
  constexpr int kLane = kLanes<float>;
  Lanes even_numbers;
  for (int i = 0; i < kLane / 2; ++i) even_numbers[i] = 2 * i;
  const uint32_t block = (static_cast<uint32_t>(purpose) << 24) | static_cast<uint32_t>(group * kNormalBlocks);
  for (int64_t at = 0; at < groups * kNormalBlocks; at += kLane) {
    PhiloxVec even;  // of blocks at, at + 2, …
    even.word[0] = Lanes{} + static_cast<uint32_t>(sample);
    even.word[1] = Lanes{} + static_cast<uint32_t>(sample >> 32);
    even.word[2] = Lanes{} + step;
    even.word[3] = even_numbers + (block + static_cast<uint32_t>(at));
    PhiloxVec odd = even;
    odd.word[3] += 1;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      even.round(key0, key1);
      odd.round(key0, key1);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    float* words = out + at / kNormalBlocks * kNormalGroup + at % kNormalBlocks;
    for (int j = 0; j < 4; ++j)
      store(words + kNormalBlocks * j,
            reinterpret_cast<Vec<float>>((even.word[j] & 0xFFFFFFFFu) | (odd.word[j] << 32)));
  }
  for (int64_t at = 0; at < groups * 2 * kNormalBlocks; at += kLane) {
    float* words = out + at / kNormalBlocks * 2 * kNormalBlocks + at % kNormalBlocks;
    Vec<float> first = load(words), second = load(words + kNormalBlocks);
    normal_pair<VecOps>(VecOps::bits(first), VecOps::bits(second), &first, &second);
    store(words, first);
    store(words + kNormalBlocks, second);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
