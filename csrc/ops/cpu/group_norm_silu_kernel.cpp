// Group normalisation + SiLU on the CPU. The formulas: csrc/ops/group_norm_silu.h.
//
// A task is one group of one sample, or with channels_last so many neighbouring groups that a row of their channels is
// 64 numbers or more. It is small enough for the second-level cache at usual sizes, so that the passes over it (mean,
// variance, output; or sums, gradient) cost memory traffic only once: forward reads x and writes the output, backward
// reads x and the gradient and writes the gradient of x. Arithmetic per element: forward about 40 operations, of which
// the exponential takes 20, backward about 55.
//
// A task visits its numbers row by row: a channel's places, or with channels_last the channels at a place. What a
// number is scaled with is then one number a row, or a row of numbers of its own.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "csrc/common/vec.h"
#include "csrc/common/workers.h"
#include "csrc/ops/group_norm_silu.h"

namespace sslfast {
namespace CPU_CAPABILITY {
namespace {

#define SSLFAST_INLINE inline __attribute__((always_inline))

constexpr int64_t kBlock = 1024;        // the longest piece of a row
constexpr int64_t kTermsPerFlush = 64;  // of a lane: so many are summed in float before their sum goes into a double

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
SSLFAST_INLINE Vec<A> load_part(const A* p, int64_t count) {
  if (count >= kLanes<A>) return load(p);
  Vec<A> v{};
  std::memcpy(&v, p, count * sizeof(A));
  return v;
}

template <typename A>
SSLFAST_INLINE void store_part(A* p, Vec<A> v, int64_t count) {
  if (count >= kLanes<A>) return store(p, v);
  std::memcpy(p, &v, count * sizeof(A));
}

/// visit(i, n) for the vectors of a row of `count` numbers; n: numbers from i on, of which a vector's are used.
template <typename A, typename Visit>
SSLFAST_INLINE void for_each_vector(int64_t count, const Visit& visit) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) visit(i, kLanes<A>);
  if (i < count) visit(i, count - i);
}

/// 1 / (1 + exp(−y))
template <typename A>
SSLFAST_INLINE Vec<A> sigmoid(Vec<A> y) {
  constexpr A kLargest = std::is_same_v<A, double> ? 700 : 80;  // of which vec_exp knows the exponential
  const Vec<A> minus = y < -kLargest ? broadcast(kLargest) : -y;
  return 1 / (1 + vec_exp(minus));
}

/// What a thread works with: rows of a number for each channel of its task.
template <typename A>
struct ThreadScratch {
  A *mean, *rstd, *weight, *scale, *shift;  // y = scale·x + shift
  A* lanes[2];                              // sums of some rows
  double* sums[2];
  A* z;  // of the whole task, where grad x is too narrow to hold it

  ThreadScratch(const GroupNormSiluParams& p, int64_t thread) {
    std::byte* next = p.scratch + thread * p.scratch_bytes;
    const int64_t width = (group_norm_silu_width(p) + 15) / 16 * 16;
    for (double** row : {&sums[0], &sums[1]}) *row = reinterpret_cast<double*>(next), next += width * sizeof(double);
    for (A** row : {&mean, &rstd, &weight, &scale, &shift, &lanes[0], &lanes[1]})
      *row = reinterpret_cast<A*>(next), next += width * sizeof(A);
    z = reinterpret_cast<A*>(next);
  }
};

template <typename T, bool kLast>
class Task {
  using A = Acc<T>;
  static constexpr bool kConverts = !std::is_same_v<T, A>;

 public:
  Task(const GroupNormSiluParams& p, const ThreadScratch<A>& s, int64_t task) : p_(p), s_(s) {
    const int64_t width = group_norm_silu_width(p), tasks = (p.channels + width - 1) / width;
    sample_ = task / tasks;
    channel_ = task % tasks * width;
    width_ = std::min(width, p.channels - channel_);
    group_width_ = p.channels / p.groups;
    inverse_count_ = 1.0 / (static_cast<double>(group_width_) * p.places);
  }

  void forward() {
    sum<1, false>([&](const Row& row, int64_t i, int64_t n, Vec<A>* terms)
                      __attribute__((always_inline)) { terms[0] = load_part(row.x + i, n); });
    for_each_group([&](int64_t first) { set(s_.mean, first, total(0, first) * inverse_count_); });
    sum<1, false>([&](const Row& row, int64_t i, int64_t n, Vec<A>* terms) __attribute__((always_inline)) {
      const Vec<A> difference = load_part(row.x + i, n) - value(s_.mean, row, i, n);
      terms[0] = difference * difference;
    });
    const int64_t at = sample_ * p_.groups + channel_ / group_width_;
    for_each_group([&](int64_t first) {
      set(s_.rstd, first, 1.0 / std::sqrt(total(0, first) * inverse_count_ + p_.eps));
      static_cast<A*>(p_.mean)[at + first / group_width_] = s_.mean[first];
      static_cast<A*>(p_.rstd)[at + first / group_width_] = s_.rstd[first];
    });
    prepare_affine();
    T* out = static_cast<T*>(p_.out);
    A buffer[kConverts ? kBlock : 1];
    for_each_row([&](const Row& row) {
      A* to = destination(out, row, buffer);
      for_each_vector<A>(row.count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vec<A> y = value(s_.scale, row, i, n) * load_part(row.x + i, n) + value(s_.shift, row, i, n);
        store_part(to + i, y * sigmoid<A>(y), n);
      });
      narrow(out, row, buffer);
    });
  }

  void backward() {
    const int64_t at = sample_ * p_.groups + channel_ / group_width_;
    for_each_group([&](int64_t first) {
      set(s_.mean, first, static_cast<const A*>(p_.mean)[at + first / group_width_]);
      set(s_.rstd, first, static_cast<const A*>(p_.rstd)[at + first / group_width_]);
    });
    prepare_affine();
    T* grad_x = static_cast<T*>(p_.grad_x);
    const T* grad_out = static_cast<const T*>(p_.grad_out);
    A buffer[kConverts ? kBlock : 1];
    sum<2, true>([&](const Row& row, int64_t i, int64_t n, Vec<A>* terms) __attribute__((always_inline)) {
      if constexpr (kConverts) {
        if (i == 0)  // a new row
          for (int64_t k = 0; k < row.count; ++k) buffer[k] = static_cast<float>(grad_out[row.offset + k]);
      }
      const A* grad = kConverts ? buffer : reinterpret_cast<const A*>(grad_out) + row.offset;
      const Vec<A> x = load_part(row.x + i, n);
      const Vec<A> y = value(s_.scale, row, i, n) * x + value(s_.shift, row, i, n), sigma = sigmoid<A>(y);
      const Vec<A> z = load_part(grad + i, n) * sigma * (1 + y * (1 - sigma));
      store_part(z_of(row, grad_x) + i, z, n);
      terms[0] = z;
      terms[1] = z * ((x - value(s_.mean, row, i, n)) * value(s_.rstd, row, i, n));
    });
    for (int k = 0; k < 2; ++k) {
      double* part = p_.grad_parameters + ((1 - k) * p_.samples + sample_) * p_.channels + channel_;
      std::copy(s_.sums[k], s_.sums[k] + width_, part);
    }
    // grad x = scale·z − slope·x − offset with slope = rstd²·mean(γ·z·x̂), offset = rstd·mean(γ·z) − slope·mean
    A *slope = s_.lanes[0], *offset = s_.lanes[1];
    for_each_group([&](int64_t first) {
      double of_z = 0, of_zx = 0;
      for (int64_t c = first; c < first + group_width_; ++c) {
        of_z += s_.weight[c] * s_.sums[0][c];
        of_zx += s_.weight[c] * s_.sums[1][c];
      }
      const double rstd = s_.rstd[first], tilt = rstd * rstd * of_zx * inverse_count_;
      set(slope, first, tilt);
      set(offset, first, rstd * of_z * inverse_count_ - tilt * s_.mean[first]);
    });
    for_each_row([&](const Row& row) {
      const A* z = z_of(row, grad_x);
      A* to = destination(grad_x, row, buffer);
      for_each_vector<A>(row.count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vec<A> of_z = value(s_.scale, row, i, n) * load_part(z + i, n);
        const Vec<A> of_x = value(slope, row, i, n) * load_part(row.x + i, n);
        store_part(to + i, of_z - of_x - value(offset, row, i, n), n);
      });
      narrow(grad_x, row, buffer);
    });
  }

 private:
  /// A piece of a row of the task.
  struct Row {
    const A* x;
    int64_t offset, count;  // in the tensor
    int64_t channel;        // in the task: of the row, or with channels_last of its first number
    int64_t in_task;        // numbers of the task before it
  };

  template <typename Visit>
  SSLFAST_INLINE void for_each_row(const Visit& visit) const {
    A buffer[kConverts ? kBlock : 1];
    const int64_t rows = kLast ? p_.places : width_, length = kLast ? width_ : p_.places;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t start = kLast ? (sample_ * p_.places + r) * p_.channels + channel_
                                  : (sample_ * p_.channels + channel_ + r) * p_.places;
      for (int64_t first = 0; first < length; first += kBlock) {
        Row row{nullptr, start + first, std::min(kBlock, length - first), kLast ? first : r, r * length + first};
        const T* x = static_cast<const T*>(p_.x) + row.offset;
        if constexpr (kConverts) {
          for (int64_t i = 0; i < row.count; ++i) buffer[i] = static_cast<float>(x[i]);
          row.x = buffer;
        } else {
          row.x = x;
        }
        visit(row);
      }
    }
  }

  template <typename Visit>
  void for_each_group(const Visit& visit) const {
    for (int64_t first = 0; first < width_; first += group_width_) visit(first);
  }

  /// The numbers of `row` at its places i, …: one for all, or with channels_last one each.
  SSLFAST_INLINE Vec<A> value(const A* of_channel, const Row& row, int64_t i, int64_t n) const {
    return kLast ? load_part(of_channel + row.channel + i, n) : broadcast(of_channel[row.channel]);
  }

  void set(A* of_channel, int64_t first, double value) const {
    std::fill(of_channel + first, of_channel + first + group_width_, static_cast<A>(value));
  }

  double total(int k, int64_t first) const {
    double sum = 0;
    for (int64_t c = first; c < first + group_width_; ++c) sum += s_.sums[k][c];
    return sum;
  }

  /// s_.sums of the terms over each channel of the task; or, if only groups are wanted, sums of channels that add up to
  /// those of their group.
  template <int kSums, bool kChannels, typename Terms>
  SSLFAST_INLINE void sum(const Terms& terms) const {
    for (int k = 0; k < kSums; ++k) {
      std::fill(s_.sums[k], s_.sums[k] + width_, 0.0);
      std::fill(s_.lanes[k], s_.lanes[k] + width_, A{0});
    }
    Vec<A> total[kSums] = {};  // of rows since the last flush
    int64_t terms_of_lane = 0, channel = 0;
    const auto flush = [&] {
      for (int k = 0; k < kSums; ++k) {
        if constexpr (kLast) {
          flush_lanes(k);
        } else {
          s_.sums[k][channel] += sum_lanes<A>(total[k]);
          total[k] = Vec<A>{};
        }
      }
      terms_of_lane = 0;
    };
    for_each_row([&](const Row& row) {
      const bool another = kChannels && !kLast && row.channel != channel;
      if (another || (terms_of_lane >= kTermsPerFlush && (!kLast || row.channel == 0))) flush();
      channel = row.channel;
      terms_of_lane += kLast ? row.channel == 0 : (row.count + kLanes<A> - 1) / kLanes<A>;
      for_each_vector<A>(row.count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        Vec<A> term[kSums];
        terms(row, i, n, term);
        for (int k = 0; k < kSums; ++k) {
          if constexpr (kLast) {
            A* lanes = s_.lanes[k] + row.channel + i;
            store_part(lanes, load_part(lanes, n) + term[k], n);
          } else {
            if (n < kLanes<A>) {
              Vec<A> some{};
              std::memcpy(&some, &term[k], n * sizeof(A));
              term[k] = some;
            }
            total[k] += term[k];
          }
        }
      });
    });
    flush();
  }

  void flush_lanes(int k) const {
    for (int64_t c = 0; c < width_; ++c) {
      s_.sums[k][c] += s_.lanes[k][c];
      s_.lanes[k][c] = 0;
    }
  }

  void prepare_affine() const {
    const A *weight = static_cast<const A*>(p_.weight), *bias = static_cast<const A*>(p_.bias);
    for (int64_t c = 0; c < width_; ++c) {
      s_.weight[c] = weight != nullptr ? weight[channel_ + c] : 1;
      s_.scale[c] = s_.weight[c] * s_.rstd[c];
      s_.shift[c] = (bias != nullptr ? bias[channel_ + c] : 0) - s_.mean[c] * s_.scale[c];
    }
  }

  SSLFAST_INLINE static A* destination(T* out, const Row& row, A* buffer) {
    if constexpr (kConverts) return buffer;
    return reinterpret_cast<A*>(out) + row.offset;
  }
  SSLFAST_INLINE static void narrow(T* out, const Row& row, const A* buffer) {
    if constexpr (kConverts)
      for (int64_t i = 0; i < row.count; ++i) out[row.offset + i] = static_cast<T>(buffer[i]);
  }
  SSLFAST_INLINE A* z_of(const Row& row, T* grad_x) const {
    return kConverts ? s_.z + row.in_task : reinterpret_cast<A*>(grad_x) + row.offset;
  }

  const GroupNormSiluParams& p_;
  const ThreadScratch<A>& s_;
  int64_t sample_, channel_, width_, group_width_;
  double inverse_count_;
};

template <typename T, bool kLast>
void run(const GroupNormSiluParams& p, bool backward) {
  const int64_t width = group_norm_silu_width(p), tasks = p.samples * ((p.channels + width - 1) / width);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width * p.places));
  parallel_for(p.threads, tasks, grain, [&](int64_t begin, int64_t end) {
    const ThreadScratch<Acc<T>> scratch(p, at::get_thread_num());
    for (int64_t i = begin; i < end; ++i) {
      Task<T, kLast> task(p, scratch, i);
      backward ? task.backward() : task.forward();
    }
  });
  if (!backward) return;
  // In the order of the samples: the same bits for any number of threads.
  parallel_for(p.threads, p.channels, 64, [&](int64_t begin, int64_t end) {
    for (int k = 0; k < 2; ++k) {
      Acc<T>* grad = static_cast<Acc<T>*>(k == 0 ? p.grad_weight : p.grad_bias);
      for (int64_t c = begin; c < end; ++c) {
        double sum = 0;
        for (int64_t n = 0; n < p.samples; ++n) sum += p.grad_parameters[(k * p.samples + n) * p.channels + c];
        grad[c] = static_cast<Acc<T>>(sum);
      }
    }
  });
}

template <typename T>
void run(const GroupNormSiluParams& p, bool backward) {
  p.channels_last ? run<T, true>(p, backward) : run<T, false>(p, backward);
}

void dispatch(const GroupNormSiluParams& p, bool backward) {
  switch (p.dtype) {
    case c10::ScalarType::Double:
      return run<double>(p, backward);
    case c10::ScalarType::BFloat16:
      return run<c10::BFloat16>(p, backward);
    case c10::ScalarType::Half:
      return run<c10::Half>(p, backward);
    default:
      return run<float>(p, backward);
  }
}

}  // namespace

void launch_group_norm_silu_forward_cpu(const GroupNormSiluParams& params) { dispatch(params, false); }
void launch_group_norm_silu_backward_cpu(const GroupNormSiluParams& params) { dispatch(params, true); }

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
