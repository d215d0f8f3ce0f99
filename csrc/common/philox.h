// Philox 4x32-10, the counter-based random generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011): 128 bits of counter and 64 bits of key go in, 128 random bits come out, and there is no state.
//
// How sslfast spends those bits, so that what happens to a sample depends on nothing but the seed and the sample:
//   key      = the 64-bit seed
//   counter  = sample id (64 bits) | epoch or step (32 bits) | purpose (8 bits) and index of the block (24 bits)
// Two ops that use the same seed differ in `purpose` and therefore never share a random number.
#pragma once

#include <cstdint>

#include "csrc/common/macros.h"

namespace sslfast {

enum PhiloxPurpose : uint32_t { kPhiloxAugment = 1, kPhiloxNoise = 2, kPhiloxTimestep = 3, kPhiloxRotation = 4 };

struct Philox4 {
  uint32_t word[4];
};

SSLFAST_HOST_DEVICE Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The 128 bits that belong to (seed, sample, step, purpose, block); `block` counts up to 2^24.
SSLFAST_HOST_DEVICE Philox4 philox_draw(uint64_t seed, uint64_t sample, uint32_t step, PhiloxPurpose purpose,
                                        uint32_t block) {
  const Philox4 counter{{static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32), step,
                         (static_cast<uint32_t>(purpose) << 24) | (block & 0xFFFFFFu)}};
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// [0, 1), all 32 bits kept.
SSLFAST_HOST_DEVICE double uniform_double(uint32_t bits) { return bits * (1.0 / 4294967296.0); }

// [0, 1), 24 bits: every value is exact in float32, and 1 never comes out.
SSLFAST_HOST_DEVICE float uniform_float(uint32_t bits) { return static_cast<float>(bits >> 8) * (1.0f / 16777216.0f); }

// {0, …, n - 1}; the bias is below n / 2^32.
SSLFAST_HOST_DEVICE uint32_t uniform_below(uint32_t bits, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{bits} * n) >> 32);
}

}  // namespace sslfast
