// Runs CUDA kernels on a CPU, compiled by a plain C++ compiler from the same .cu files, to find what a GPU would make
// of them.
//
// Threads of a block are fibers on one OS thread. A warp runs until all its lanes wait at a barrier or have ended, then
// the next one in `order` runs: as far ahead of the others as the program allows. What a missing barrier leaves to luck
// on a GPU goes wrong here in one of the orders. Lanes of a warp meet in warp-wide instructions only.
//
// What is stricter than a GPU, each with a test in tests/test_cuda_emulator.py:
//   - shared memory starts as NaN (0xFF bytes) in every block and ends at an unmapped page;
//   - device memory starts as NaN, lies between unmapped pages, and global accesses are checked byte by byte;
//   - cp.async writes NaN at once and the data at the wait, so that neither the old nor the new value can be read in
//   between;
//   - lanes that meet at different warp-wide instructions, threads that meet at different barriers, and threads that
//     leave while others wait at a barrier are errors.
// A violation throws std::runtime_error from launch() with the kernel, block and thread.
//
// It counts what the threads ask for (before any cache): see Counters. It models neither time nor memory ordering.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <source_location>
#include <string>
#include <type_traits>

namespace cuda_emulator {

enum class Order { ascending, descending, shuffled };

struct Counters {
  uint64_t launches = 0;
  uint64_t read_bytes = 0;          // global memory, cp.async included
  uint64_t written_bytes = 0;       // global memory
  uint64_t mma_flops = 0;           // 2 · m · n · k of every mma
  uint64_t exponentials = 0;        // exp2 through fast_exp2()
  uint64_t barriers = 0;            // per block
  uint64_t ldmatrix_conflicts = 0;  // 8-row reads of which two rows lie in the same banks
};

/// Host side. The order in which threads of a block, and blocks of a grid, are run from now on.
void set_order(Order order);
/// Counters by kernel name since the last reset_counters().
const std::map<std::string, Counters>& counters();
void reset_counters();
/// Runs body once for every thread of the grid; name is for messages and counters.
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

/// Memory that kernels may touch, filled with NaN (0xFF bytes), 16-byte aligned. More than 1 GiB: zeros, and only the
/// pages that are used take memory.
void* device_allocate(size_t bytes);
void device_free(void* pointer);
bool is_device_memory(const void* pointer);

/// From now on launches run only the blocks at the corners of their grids, and none of the kernels named: enough to see
/// where the indices of a problem end that is too large to be computed.
void run_corners(const std::set<std::string>& skipped);
void run_all_blocks();

// Device side: what csrc/common/*.cuh stands on when SSLFAST_CUDA_EMULATED is defined.

struct ThreadIndex {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
const ThreadIndex& index();
unsigned char* shared_memory();
void barrier(std::source_location site);
void named_barrier(int id, int threads);
void check_global(const void* pointer, size_t bytes, bool write);
void check_shared(const void* pointer, size_t bytes);
void check_atomic(const void* pointer, size_t bytes);  // in either memory
void cp_async(void* shared, const void* global);       // 16 bytes
void cp_async_commit();
void cp_async_wait(int pending_groups);
void count_exponential();
[[noreturn]] void fail(const std::string& message);

/// Waits until all lanes of mask have called it with the same name, then runs complete(arguments of all lanes) once.
void warp_collective(const char* name, unsigned mask, void* argument, void (*complete)(void* const* arguments));

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed);
/// d += a·b for one m16n8 tile; a, b and d are fragments as the PTX ISA lays them out.
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <typename T>
T load_global(const T* pointer) {
  check_global(pointer, sizeof(T), false);
  T value;
  std::memcpy(&value, pointer, sizeof(T));
  return value;
}

template <typename T>
void store_global(T* pointer, const T& value) {
  check_global(pointer, sizeof(T), true);
  std::memcpy(pointer, &value, sizeof(T));
}

template <typename T>
struct Shuffle {
  T in, out;
  int source;
};

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source_lane) {
  static_assert(std::is_trivially_copyable_v<T>);
  Shuffle<T> mine{value, value, source_lane};
  warp_collective(name, mask, &mine, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] == nullptr) continue;
      auto& to = *static_cast<Shuffle<T>*>(lanes[lane]);
      if (lanes[to.source] == nullptr) fail("a shuffle reads a lane that does not take part");
      to.out = static_cast<Shuffle<T>*>(lanes[to.source])->in;
    }
  });
  return mine.out;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate) {
  struct Ballot {
    bool in;
    unsigned out;
  } mine{predicate, 0};
  warp_collective(name, mask, &mine, [](void* const* lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane] != nullptr && static_cast<Ballot*>(lanes[lane])->in) votes |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane] != nullptr) static_cast<Ballot*>(lanes[lane])->out = votes;
  });
  return mine.out;
}

/// *pointer = change(*pointer); returns what was there. Only one thread runs at a time, so nothing comes in between.
template <typename T, typename Change>
T atomic(T* pointer, const Change& change) {
  check_atomic(pointer, sizeof(T));
  const T old = *pointer;
  *pointer = change(old);
  return old;
}

inline int lane() { return static_cast<int>(index().thread.x % 32); }

}  // namespace cuda_emulator

// The names of CUDA C++ that kernels use; NVIDIA's headers define __device__ and the like as nothing for a plain C++
// compiler.
#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (::cuda_emulator::index().thread)
#define blockIdx (::cuda_emulator::index().block)
#define blockDim (::cuda_emulator::index().block_dim)
#define gridDim (::cuda_emulator::index().grid_dim)

inline void __syncthreads(std::source_location site = std::source_location::current()) { cuda_emulator::barrier(site); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, cuda_emulator::lane() ^ lane_mask);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane) {
  return cuda_emulator::shuffle("__shfl_sync", mask, value, source_lane % 32);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_emulator::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return cuda_emulator::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return cuda_emulator::ballot("__all_sync", mask, predicate != 0) == mask;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { cuda_emulator::ballot("__syncwarp", mask, false); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T atomicAdd(T* pointer, T value) {
  return cuda_emulator::atomic(pointer, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* pointer, T value) {
  return cuda_emulator::atomic(pointer, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicCAS(T* pointer, T expected, T value) {
  return cuda_emulator::atomic(pointer, [=](T old) { return old == expected ? value : old; });
}
inline int min(int a, int b) { return a < b ? a : b; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
