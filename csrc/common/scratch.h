// Scratch memory for one call of an op, cut out of one buffer, and the number of threads that the call may use.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace sslfast {

/// The number of threads for a call. Count once per call, size scratch with it, and hand it to the kernel, whose
/// parallel regions (csrc/common/workers.h) never have more threads: another thread may call torch.set_num_threads at
/// any moment.
inline int64_t thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

/// Reserve everything, allocate once, then ask for the pointers:
///
///   Scratch scratch;
///   const auto rows = scratch.reserve<float>(n);
///   scratch.allocate();
///   params.rows = scratch.at(rows);
///
/// The buffer stays with the calling thread for its next call as long as it is at most 32 MiB: fresh pages would cost a
/// small problem more than its arithmetic (batch 256, dim 128, backward: 0.61 ms with fresh pages, 0.26 ms without).
class Scratch {
 public:
  struct Offset {
    int64_t bytes;
  };

  template <typename T>
  Offset reserve(int64_t elements) {
    return reserve_bytes(elements * static_cast<int64_t>(sizeof(T)));
  }
  Offset reserve_bytes(int64_t bytes) {
    const Offset offset{size_};
    size_ += (bytes + 63) / 64 * 64;
    return offset;
  }

  void allocate() {
    thread_local at::Tensor kept;
    if (size_ > kKeptBytes) {
      buffer_ = at::empty({size_}, at::kByte);
    } else {
      if (!kept.defined() || kept.numel() < size_) {
        kept = at::Tensor();
        kept = at::empty({size_}, at::kByte);
      }
      buffer_ = kept;
    }
  }

  template <typename T = void>
  T* at(Offset offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(buffer_.data_ptr()) + offset.bytes);
  }

 private:
  static constexpr int64_t kKeptBytes = int64_t{32} << 20;
  int64_t size_ = 0;
  at::Tensor buffer_;
};

}  // namespace sslfast
