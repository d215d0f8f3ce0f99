// Parallel regions of at most so many threads as the caller counted (thread_count in csrc/common/scratch.h).
// at::parallel_for counts again when its region starts, and may find more than scratch was sized for. In both forms
// here at::get_thread_num() is below `threads`, and the kernel must not throw.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>

namespace sslfast {
namespace CPU_CAPABILITY {

/// One of the `count` threads that run a kernel together.
struct Worker {
  int64_t index, count;

  /// Waits until all are here.
  void barrier() const {
    if (count > 1) {
#pragma omp barrier
    }
  }

  /// visit(i) for this thread's share of 0 ≤ i < n, and so that all shares together are those n.
  template <typename Visit>
  void share(int64_t n, const Visit& visit) const {
    for (int64_t i = n * index / count; i < n * (index + 1) / count; ++i) visit(i);
  }
};

/// Calls kernel(worker) on `threads` threads: one parallel region for a whole kernel, whose threads pass from phase to
/// phase together. Starting a region costs several microseconds, a barrier less than one. A region of fewer threads
/// than the one before would end the others, so regions have all threads or one.
template <typename Kernel>
void run_workers(int64_t threads, const Kernel& kernel) {
  const auto run = [&](int index, int count) {
    const at::internal::ThreadIdGuard guard(index);
    kernel(Worker{index, count});
  };
  if (threads <= 1) return run(0, 1);
#pragma omp parallel num_threads(static_cast<int>(threads))
  run(omp_get_thread_num(), omp_get_num_threads());
}

/// Calls visit(begin, end) for contiguous parts of 0 … n, one per thread, of at least `grain` elements.
template <typename Visit>
void parallel_for(int64_t threads, int64_t n, int64_t grain, const Visit& visit) {
  const int64_t parts = std::min(threads, (n + grain - 1) / grain);
  if (parts <= 1) return visit(int64_t{0}, n);
  run_workers(threads, [&](const Worker& worker) {
    const int64_t count = std::min(parts, worker.count);
    if (worker.index < count) visit(n * worker.index / count, n * (worker.index + 1) / count);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
