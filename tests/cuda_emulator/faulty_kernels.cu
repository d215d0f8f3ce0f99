#include "csrc/common/cp_async.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/memory.cuh"
#include "csrc/common/mma.cuh"
#include "csrc/common/warp.cuh"
#include "tests/cuda_emulator/faulty_kernels.h"

namespace sslfast {
namespace {

enum class Fault {
  none,
  missing_barrier,
  divergent_barrier,
  different_barriers,
  missing_wait,
  missing_wait_at_end,
  global_write_out_of_bounds,
  global_read_out_of_bounds,
  raw_global_write_out_of_bounds,
  shared_write_out_of_bounds,
  uninitialised_shared,
  misaligned,
  divergent_shuffle,
};

struct FaultyParams {
  Fault fault;
  const float* in;
  float* out;
};

__global__ void faulty_kernel(const FaultyParams p) {
  const int i = threadIdx.x;
  const auto is = [&](Fault fault) { return p.fault == fault; };
  float* shared = reinterpret_cast<float*>(shared_memory());
  if (i < 16) {
    cp_async_16(shared + 4 * i, p.in + 4 * i);
    cp_async_commit();
    if (!is(Fault::missing_wait) && !is(Fault::missing_wait_at_end)) cp_async_wait<0>();
  }
  if (is(Fault::different_barriers) && i == 0)
    __syncthreads();
  else if (!is(Fault::missing_barrier) && !(is(Fault::divergent_barrier) && i % 32 == 5))
    __syncthreads();
  float value = is(Fault::missing_wait_at_end) ? 0.0f : shared[63 - i];
  if (is(Fault::missing_wait) && i < 16) cp_async_wait<0>();
  if (is(Fault::shared_write_out_of_bounds)) shared[64 + i] = 1.0f;
  if (is(Fault::uninitialised_shared)) value = shared[64 + i];
  if (is(Fault::global_read_out_of_bounds)) value = load_global(p.in + 1 + i);
  if (is(Fault::misaligned)) load_pack(p.in + i % 32);
  if (is(Fault::raw_global_write_out_of_bounds)) p.out[64 + i] = value;
  if (is(Fault::divergent_shuffle)) value = i % 2 == 0 ? __shfl_xor_sync(0xFFFFFFFFu, value, 1) : warp_sum(value);
  store_global(p.out + i + (is(Fault::global_write_out_of_bounds) ? 1 : 0), value);
}

enum class Feature { named_barriers, missing_named_barrier, short_named_barrier, mixed_counts, votes, atomics };

struct FeatureParams {
  Feature feature;
  const float* in;
  float* out;
};

/// 128 threads; every half of them reverses its 64 numbers, votes on them, or counts them.
__global__ void feature_kernel(const FeatureParams p) {
  const int i = threadIdx.x, half = i / 64, in_half = i % 64;
  const auto is = [&](Feature feature) { return p.feature == feature; };
  float* shared = reinterpret_cast<float*>(shared_memory());
  float value = load_global(p.in + in_half);
  if (is(Feature::votes)) {
    constexpr unsigned kAll = 0xFFFFFFFFu;
    const int votes = __popc(__ballot_sync(kAll, value < 20.0f));
    value = votes + 100.0f * __any_sync(kAll, value == 40.0f) + 1000.0f * __all_sync(kAll, value < 32.0f);
    store_global(p.out + i, value);
    return;
  }
  if (is(Feature::atomics)) {
    unsigned* counts = reinterpret_cast<unsigned*>(shared_memory());
    if (i < 8) counts[i] = 0;
    __syncthreads();
    atomicAdd(counts + i % 4, 1u);
    atomicMax(counts + 4 + i % 4, static_cast<unsigned>(i));
    __syncthreads();
    unsigned* out = reinterpret_cast<unsigned*>(p.out);
    store_global(out + i, i < 8 ? counts[i] : 0u);
    __syncthreads();
    atomicAdd(out + 8, 1u);
    atomicCAS(out + 9, 0u, 7u);
    return;
  }
  shared[i] = value;
  if (is(Feature::short_named_barrier) && i >= 96) return;
  if (!(is(Feature::missing_named_barrier) && half == 1))
    named_barrier(1 + half, is(Feature::mixed_counts) && i >= 96 ? 32 + 64 : 64);
  store_global(p.out + i, shared[64 * half + 63 - in_half]);
}

struct ProductParams {
  const void* a;
  const void* b;
  bool b_by_rows;
  float* c;
};

template <typename Math>
__global__ void product_kernel(const ProductParams p) {
  using T = typename Math::Operand;
  const int lane = threadIdx.x, width = p.b_by_rows ? 16 : 64;
  unsigned char* a = shared_memory();
  unsigned char* b = a + 16 * kSlotRowBytes;
  const auto copy = [&](unsigned char* slot, const void* matrix) {
    for (int i = lane; i < 16 * width; i += 32) {
      const int row = i / width, column = i % width;
      reinterpret_cast<T*>(slot + chunk_offset(row, column / Pack<T>::kSize))[column % Pack<T>::kSize] =
          load_global(static_cast<const T*>(matrix) + i);
    }
  };
  copy(a, p.a);
  copy(b, p.b);
  __syncthreads();
  float c[2][4] = {};
  const int steps = p.b_by_rows ? 1 : kSlotSteps;
  for (int step = 0; step < steps; ++step) {
    uint32_t a_fragment[4], b_fragment[2][2];
    ldmatrix_x4(a_fragment, a + (a_offset(0) ^ step_bits(step)));
    if (p.b_by_rows)
      load_b_rows(b_fragment, b, 0, 0);
    else
      load_b(b_fragment, b + (b_offset(0) ^ step_bits(step)));
    for (int n = 0; n < 2; ++n) Math::product(c[n], a_fragment, b_fragment[n]);
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i)
      store_global(p.c + (lane / 4 + 8 * (i / 2)) * 16 + 8 * n + 2 * (lane % 4) + i % 2, c[n][i]);
}

}  // namespace

void run_faulty_kernel(const std::string& name, const float* in, float* out) {
  constexpr const char* kNames[] = {"correct",
                                    "missing_barrier",
                                    "divergent_barrier",
                                    "different_barriers",
                                    "missing_wait",
                                    "missing_wait_at_end",
                                    "global_write_out_of_bounds",
                                    "global_read_out_of_bounds",
                                    "raw_global_write_out_of_bounds",
                                    "shared_write_out_of_bounds",
                                    "uninitialised_shared",
                                    "misaligned",
                                    "divergent_shuffle"};
  int fault = 0;
  while (name != kNames[fault]) ++fault;
  const size_t shared_floats = name == "uninitialised_shared" ? 128 : 64;
  launch(faulty_kernel, {"faulty", 1, 64, shared_floats * sizeof(float), nullptr},
         {static_cast<Fault>(fault), in, out});
}

void run_feature_kernel(const std::string& name, const float* in, float* out) {
  constexpr const char* kNames[] = {
      "named_barriers", "missing_named_barrier", "short_named_barrier", "mixed_counts", "votes", "atomics"};
  LaunchConfig config = {"feature", 1, 128, 128 * sizeof(float), nullptr};
  if (name == "empty_grid") config.grid = dim3(0);
  if (name == "too_many_rows_of_blocks") config.grid = dim3(1, 65536);
  if (name == "too_much_shared_memory") config.shared_bytes = 228 * 1024;
  int feature = 0;
  while (feature < 5 && name != kNames[feature]) ++feature;
  launch(feature_kernel, config, {static_cast<Feature>(feature), in, out});
}

void run_matrix_product(const std::string& math, const void* a, const void* b, bool b_by_rows, float* c) {
  const ProductParams params = {a, b, b_by_rows, c};
  const LaunchConfig config = {"product", 1, 32, 32 * kSlotRowBytes, nullptr};
  if (math == "bfloat16") launch(product_kernel<BFloat16Math>, config, params);
  if (math == "float16") launch(product_kernel<Float16Math>, config, params);
}

}  // namespace sslfast
