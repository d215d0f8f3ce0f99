// Visits pairs of blocks in parallel without two threads touching one block: every unordered pair of row blocks of a
// symmetric problem, or every pair of a row block and a column block.
#pragma once

#include "csrc/common/workers.h"

namespace sslfast {
namespace CPU_CAPABILITY {

/// Calls visit(i, j) once for each 0 ≤ i ≤ j < blocks, on the workers together. Calls that run at the same time never
/// share a block, and the calls that touch one block come in an order that depends on `blocks` alone, (i, i) first:
/// what visit() adds to its two blocks needs no atomics and is the same to the bit on any number of threads. Returns
/// when all workers are done.
///
/// The schedule is a round-robin tournament (the circle method): block n−1 stays, the others turn by one place each
/// round and the pairs that face each other play, n/2 disjoint pairs in each of n−1 rounds.
template <typename Visit>
void for_each_block_pair(const Worker& worker, int64_t blocks, const Visit& visit) {
  worker.share(blocks, [&](int64_t i) { visit(i, i); });
  worker.barrier();
  const int64_t players = blocks + blocks % 2;  // an odd number gets a bye
  for (int64_t round = 0; round < players - 1; ++round) {
    worker.share(players / 2, [&](int64_t k) {
      const int64_t a = k == 0 ? players - 1 : (round + k) % (players - 1);
      const int64_t b = (round + players - 1 - k) % (players - 1);
      if (a < blocks && b < blocks) visit(a < b ? a : b, a < b ? b : a);
    });
    worker.barrier();
  }
}

/// The same on up to `threads` threads, for a kernel that has no workers.
template <typename Visit>
void for_each_block_pair(int64_t threads, int64_t blocks, const Visit& visit) {
  run_workers(blocks > 1 ? threads : 1, [&](const Worker& worker) { for_each_block_pair(worker, blocks, visit); });
}

/// Calls visit(i, j) once for each 0 ≤ i < rows and 0 ≤ j < columns, with the same promise. In round r of a Latin
/// square, block i of the shorter side meets block i + r of the longer.
template <typename Visit>
void for_each_block_of_a_rectangle(int64_t threads, int64_t rows, int64_t columns, const Visit& visit) {
  const int64_t shorter = rows < columns ? rows : columns, longer = rows < columns ? columns : rows;
  run_workers(shorter > 1 ? threads : 1, [&](const Worker& worker) {
    for (int64_t round = 0; round < longer; ++round) {
      worker.share(shorter, [&](int64_t k) {
        const int64_t other = (k + round) % longer;
        rows < columns ? visit(k, other) : visit(other, k);
      });
      worker.barrier();
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
