// One parallel region for a whole kernel, whose threads pass from phase to phase together: starting a region costs
// several microseconds, a barrier less than one.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

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

/// kernel(worker) on each of torch's threads. On this thread alone if `parallel` is false, or within a parallel region,
/// as at::parallel_for does it. at::get_thread_num() is the worker's index. The kernel must not throw.
template <typename Kernel>
void run_workers(bool parallel, const Kernel& kernel) {
  const auto run = [&](int index, int count) {
    const at::internal::ThreadIdGuard guard(index);
    kernel(Worker{index, count});
  };
  if (!parallel || at::get_num_threads() == 1 || at::in_parallel_region()) return run(0, 1);
#pragma omp parallel
  run(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
