#include "tests/cuda_emulator/emulator.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace cuda_emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedLimit = 227 * 1024;  // the most that a block can have on any GPU so far
constexpr unsigned char kPoison = 0xFF;
constexpr size_t kPoisonedBytes = size_t{1} << 30;  // at most, of one allocation

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

unsigned char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<unsigned char*>(p);
}

// ---- fibers

#if !defined(__x86_64__)
#error "tests/cuda_emulator switches fibers by hand for x86-64 only: write switch_stack() for this machine"
#endif

/// Saves the callee-saved registers on the stack in use, leaves that stack's pointer in *from and continues on `to`.
extern "C" void cuda_emulator_switch_stack(void** from, void* to);
asm(R"(
.text
.globl cuda_emulator_switch_stack
.hidden cuda_emulator_switch_stack
.type cuda_emulator_switch_stack, @function
cuda_emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch_stack, .-cuda_emulator_switch_stack
)");

enum class State { ready, at_barrier, at_named_barrier, in_warp, done };

struct AsyncCopy {
  void* shared;
  const void* global;
};

struct Fiber {
  ThreadIndex index;
  State state;
  void* stack_pointer;
  unsigned char* stack = nullptr;
  std::source_location site;                         // of the barrier where it waits
  int barrier_id = 0, barrier_threads = 0;           // of the named one
  std::vector<std::vector<AsyncCopy>> async_groups;  // committed, oldest first; the last one is still open
};

struct Warp {
  const char* name = nullptr;
  unsigned mask = 0, arrived = 0;
  void* arguments[32] = {};
};

struct Machine {
  Order order = Order::ascending;
  std::map<std::string, Counters> counters;
  std::map<uintptr_t, size_t> regions;  // device memory: address → bytes
  bool only_corners = false;
  std::set<std::string> skipped;

  // Of the launch that runs now.
  const char* kernel = nullptr;
  const std::function<void()>* body = nullptr;
  Counters* count = nullptr;
  void* scheduler = nullptr;  // its stack pointer while a fiber runs
  Fiber* current = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* shared_end = nullptr;
  size_t shared_bytes = 0;
  std::string error;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

std::string where() {
  const Machine& m = machine();
  const ThreadIndex& i = m.current->index;
  const auto triple = [](auto v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  return std::string(m.kernel) + ", block " + triple(i.block) + ", thread " + triple(i.thread);
}

void wait(State state) {
  Machine& m = machine();
  Fiber* self = m.current;
  self->state = state;
  cuda_emulator_switch_stack(&self->stack_pointer, m.scheduler);
}

/// Ends the launch with a message; the fiber never runs again.
[[noreturn]] void stop(const std::string& message) {
  machine().error = where() + ": " + message;
  wait(State::done);
  __builtin_unreachable();
}

void run_fiber() {
  Machine& m = machine();
  (*m.body)();
  for (const auto& group : m.current->async_groups)
    if (!group.empty()) fail("the thread ends with a cp.async that it has not waited for");
  wait(State::done);
}

void start(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack = map_pages(kStackBytes);
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&run_fiber);  // 16-byte aligned: `ret` leaves the stack as a call would
  fiber.stack_pointer = top - 6;               // six registers, whatever they hold
  fiber.state = State::ready;
  fiber.async_groups.assign(1, {});
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  cuda_emulator_switch_stack(&m.scheduler, fiber.stack_pointer);
}

// ---- scheduler

std::vector<size_t> sequence(size_t n, Order order, uint32_t seed) {
  std::vector<size_t> s(n);
  std::iota(s.begin(), s.end(), size_t{0});
  if (order == Order::descending) std::reverse(s.begin(), s.end());
  if (order == Order::shuffled) std::shuffle(s.begin(), s.end(), std::mt19937(seed));
  return s;
}

/// No thread can run: lets them go on if all wait at the same barrier, and otherwise sets m.error to the reason.
void release_barrier() {
  Machine& m = machine();
  const auto in_state = [&](State state) {
    return std::find_if(m.fibers.begin(), m.fibers.end(), [=](const Fiber& f) { return f.state == state; });
  };
  const auto report = [&](std::vector<Fiber>::iterator fiber, const char* why) {
    m.current = &*fiber;
    m.error = where() + ": " + why;
  };
  const auto end = m.fibers.end(), first = in_state(State::at_barrier);
  if (in_state(State::in_warp) != end)
    return report(in_state(State::in_warp), "deadlock: waits in a warp-wide instruction that other lanes never reach");
  if (in_state(State::at_named_barrier) != end)
    return report(in_state(State::at_named_barrier), "deadlock: waits at a named barrier for threads that never come");
  if (in_state(State::done) != end)
    return report(in_state(State::done), "divergent barrier: has ended while others wait in __syncthreads()");
  for (auto fiber = first; fiber != end; ++fiber)
    if (fiber->site.line() != first->site.line())
      return report(fiber, "divergent barrier: waits in another __syncthreads() than others");
  for (Fiber& f : m.fibers) f.state = State::ready;
  ++m.count->barriers;
}

void run_block(uint3 block, dim3 block_dim, dim3 grid_dim, uint32_t seed) {
  Machine& m = machine();
  const size_t threads = m.fibers.size();
  std::memset(m.shared_end - round_up(m.shared_bytes, 16), kPoison, round_up(m.shared_bytes, 16));
  for (size_t t = 0; t < threads; ++t) {
    m.fibers[t].index = {{static_cast<unsigned>(t), 0, 0}, block, block_dim, grid_dim};
    start(m.fibers[t]);
  }
  std::fill(m.warps.begin(), m.warps.end(), Warp{});
  const auto warps = sequence(m.warps.size(), m.order, seed), lanes = sequence(32, m.order, seed + 1);
  // Lets one warp run until all its lanes wait at a barrier or have ended: as far ahead of the others as it can be.
  const auto run_warp = [&](size_t warp) {
    for (bool ran = true; ran;) {
      ran = false;
      for (const size_t lane : lanes) {
        Fiber& fiber = m.fibers[32 * warp + lane];
        if (fiber.state != State::ready) continue;
        resume(fiber);
        if (!m.error.empty()) return;
        ran = true;
      }
    }
  };
  const auto is_done = [](const Fiber& f) { return f.state == State::done; };
  const auto is_ready = [](const Fiber& f) { return f.state == State::ready; };
  for (;;) {
    for (const size_t warp : warps) {
      run_warp(warp);
      if (!m.error.empty()) return;
    }
    if (std::all_of(m.fibers.begin(), m.fibers.end(), is_done)) return;
    if (std::any_of(m.fibers.begin(), m.fibers.end(), is_ready)) continue;  // a named barrier let them go
    release_barrier();
    if (!m.error.empty()) return;
  }
}

void on_fault(int, siginfo_t* info, void*) {
  char address[32];
  std::snprintf(address, sizeof address, "%p", info->si_addr);
  stop(std::string("access to address ") + address + ", outside shared and device memory");
}

// ---- tensor cores

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float bf16_value(uint32_t word, int half) { return __uint_as_float(half ? word & 0xFFFF0000u : word << 16); }
float f16_value(uint32_t word, int half) {
  const __half_raw raw{static_cast<unsigned short>(half ? word >> 16 : word & 0xFFFF)};
  return __half2float(__half(raw));
}

/// Tensor cores round their sums towards zero.
float towards_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

/// PTX ISA, "Matrix Fragments for mma.m16n8k16": with group g = lane / 4 and t = lane % 4, register r of A holds row
/// g + 8·(r % 2) and columns from 2·t + 8·(r / 2); register r of B rows from 2·t + 8·r of column g; D holds row
/// g + 8·(r / 2), column 2·t + r % 2.
template <float (*kValue)(uint32_t, int)>
void complete_mma(void* const* lanes) {
  constexpr int kPerWord = 2, kK = 8 * kPerWord;
  float a[16][kK], b[kK][8];
  double d[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& f = *static_cast<const Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int h = 0; h < kPerWord; ++h) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][kPerWord * t + kK / 2 * (r / 2) + h] = kValue(f.a[r], h);
      for (int r = 0; r < 2; ++r) b[kPerWord * t + kK / 2 * r + h][g] = kValue(f.b[r], h);
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kK; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += static_cast<double>(a[m][k]) * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r) {
      float& sum = static_cast<const Mma*>(lanes[lane])->d[r];
      sum = towards_zero(sum + d[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2]);
    }
  machine().count->mma_flops += 2 * 16 * 8 * kK;
}

struct LdMatrix {
  uint32_t* r;
  const unsigned char* row;
  bool transposed;
};

/// Lane l gives the address of row l % 8 of matrix l / 8 (8×8 elements of 2 bytes) and gets, of each matrix, elements
/// 2·(l % 4) and the next of row l / 4; transposed: of column l / 4.
void complete_ldmatrix(void* const* lanes) {
  const auto at = [&](int lane) -> const LdMatrix& { return *static_cast<const LdMatrix*>(lanes[lane]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) banks |= 1u << (reinterpret_cast<uintptr_t>(at(8 * matrix + row).row) / 16 % 8);
    machine().count->ldmatrix_conflicts += banks != 0xFFu;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      unsigned char* target = reinterpret_cast<unsigned char*>(&at(lane).r[matrix]);
      for (int h = 0; h < 2; ++h) {
        const int row = at(lane).transposed ? 2 * t + h : g, column = at(lane).transposed ? g : 2 * t + h;
        std::memcpy(target + 2 * h, at(8 * matrix + row).row + 2 * column, 2);
      }
    }
  }
}

}  // namespace

// ---- host side

void set_order(Order order) { machine().order = order; }
const std::map<std::string, Counters>& counters() { return machine().counters; }
void reset_counters() { machine().counters.clear(); }

void run_corners(const std::set<std::string>& skipped) {
  machine().only_corners = true;
  machine().skipped = skipped;
}
void run_all_blocks() { machine().only_corners = false; }

void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Machine& m = machine();
  const auto reject = [&](const std::string& why) { throw std::runtime_error(std::string(name) + ": " + why); };
  if (block.y != 1 || block.z != 1 || block.x == 0 || block.x % 32 != 0 || block.x > 1024)
    reject("a block must be one row of full warps, 32 to 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    reject("the grid is empty or exceeds the limits");
  if (shared_bytes > kSharedLimit) reject("too much shared memory: " + std::to_string(shared_bytes) + " bytes");
  if (m.only_corners && m.skipped.contains(name)) return;
  if (m.shared_end == nullptr) {
    const size_t pages = round_up(kSharedLimit, kPage);
    m.shared_end = map_pages(pages + kPage) + pages;
    mprotect(m.shared_end, kPage, PROT_NONE);
  }
  m.kernel = name;
  m.body = &body;
  m.count = &m.counters[name];
  ++m.count->launches;
  m.shared_bytes = shared_bytes;
  m.fibers.resize(std::max<size_t>(m.fibers.size(), block.x));
  for (size_t t = block.x; t < m.fibers.size(); ++t)
    if (m.fibers[t].stack != nullptr) munmap(m.fibers[t].stack, kStackBytes);
  m.fibers.resize(block.x);
  m.warps.assign(block.x / 32, {});
  m.error.clear();

  struct sigaction handler = {}, segv = {}, bus = {};
  handler.sa_sigaction = on_fault;
  handler.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &handler, &segv);
  sigaction(SIGBUS, &handler, &bus);
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  for (const size_t b : sequence(blocks, m.order, 1)) {
    const uint3 index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                         static_cast<unsigned>(b / grid.x / grid.y)};
    const auto inside = [](unsigned i, unsigned n) { return i > 0 && i + 1 < n; };
    if (m.only_corners && (inside(index.x, grid.x) || inside(index.y, grid.y) || inside(index.z, grid.z))) continue;
    run_block(index, block, grid, static_cast<uint32_t>(b));
    if (!m.error.empty()) break;
  }
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  m.current = nullptr;
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

// An allocation ends at an unmapped page (up to 15 bytes before it, for alignment) and starts after one.
void* device_allocate(size_t bytes) {
  const size_t used = round_up(std::max<size_t>(bytes, 1), 16), pages = round_up(used, kPage);
  unsigned char* base = map_pages(pages + 2 * kPage);
  mprotect(base, kPage, PROT_NONE);
  mprotect(base + kPage + pages, kPage, PROT_NONE);
  unsigned char* start = base + kPage + pages - used;
  if (bytes <= kPoisonedBytes) std::memset(base + kPage, kPoison, pages);
  machine().regions[reinterpret_cast<uintptr_t>(start)] = bytes;
  return start;
}

void device_free(void* pointer) {
  const auto region = machine().regions.find(reinterpret_cast<uintptr_t>(pointer));
  if (region == machine().regions.end()) return;
  const size_t used = round_up(std::max<size_t>(region->second, 1), 16), pages = round_up(used, kPage);
  munmap(static_cast<unsigned char*>(pointer) + used - pages - kPage, pages + 2 * kPage);
  machine().regions.erase(region);
}

bool is_device_memory(const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const auto next = machine().regions.upper_bound(address);
  return next != machine().regions.begin() && address < std::prev(next)->first + std::prev(next)->second;
}

// ---- device side

const ThreadIndex& index() { return machine().current->index; }

void fail(const std::string& message) { stop(message); }

unsigned char* shared_memory() { return machine().shared_end - round_up(machine().shared_bytes, 16); }

void barrier(std::source_location site) {
  machine().current->site = site;
  wait(State::at_barrier);
}

void named_barrier(int id, int threads) {
  Machine& m = machine();
  if (id < 1 || id > 15 || threads < 32 || threads % 32 != 0)
    fail("a named barrier has a number from 1 to 15 and counts full warps");
  m.current->barrier_id = id;
  m.current->barrier_threads = threads;
  std::vector<Fiber*> waiting{m.current};
  for (Fiber& f : m.fibers) {
    if (f.state != State::at_named_barrier || f.barrier_id != id) continue;
    if (f.barrier_threads != threads) fail("threads meet at a named barrier with different counts");
    waiting.push_back(&f);
  }
  if (static_cast<int>(waiting.size()) < threads) return wait(State::at_named_barrier);
  for (Fiber* f : waiting) f->state = State::ready;
  ++m.count->barriers;
}

void check_atomic(const void* pointer, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (p >= machine().shared_end - round_up(kSharedLimit, kPage) && p < machine().shared_end)
    return check_shared(pointer, bytes);
  check_global(pointer, bytes, false);
  check_global(pointer, bytes, true);
}

void check_global(const void* pointer, size_t bytes, bool write) {
  Machine& m = machine();
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const auto next = m.regions.upper_bound(address);
  const char* what = write ? "global write of " : "global read of ";
  if (next == m.regions.begin() || address + bytes > std::prev(next)->first + std::prev(next)->second)
    fail(what + std::to_string(bytes) + " bytes out of bounds");
  if (address % bytes != 0) fail(what + std::to_string(bytes) + " bytes at a misaligned address");
  (write ? m.count->written_bytes : m.count->read_bytes) += bytes;
}

void check_shared(const void* pointer, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (p < shared_memory() || p + bytes > shared_memory() + machine().shared_bytes)
    fail("shared access of " + std::to_string(bytes) + " bytes out of bounds");
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("misaligned shared access of " + std::to_string(bytes) + " bytes");
}

void cp_async(void* shared, const void* global) {
  check_shared(shared, 16);
  check_global(global, 16, false);
  std::memset(shared, kPoison, 16);
  machine().current->async_groups.back().push_back({shared, global});
}

void cp_async_commit() { machine().current->async_groups.emplace_back(); }

void cp_async_wait(int pending_groups) {
  auto& groups = machine().current->async_groups;
  while (static_cast<int>(groups.size()) - 1 > pending_groups) {
    for (const AsyncCopy& copy : groups.front()) std::memcpy(copy.shared, copy.global, 16);
    groups.erase(groups.begin());
  }
}

void count_exponential() { ++machine().count->exponentials; }

void warp_collective(const char* name, unsigned mask, void* argument, void (*complete)(void* const* arguments)) {
  Machine& m = machine();
  const unsigned thread = m.current->index.thread.x, bit = 1u << (thread % 32);
  Warp& warp = m.warps[thread / 32];
  if ((mask & bit) == 0) fail(std::string(name) + ": the lane is not in its own mask");
  if (warp.arrived == 0) {
    warp.name = name;
    warp.mask = mask;
    std::fill(warp.arguments, warp.arguments + 32, nullptr);
  } else if (std::strcmp(warp.name, name) != 0 || warp.mask != mask) {
    fail("divergent warp: " + std::string(name) + " meets " + warp.name);
  }
  warp.arrived |= bit;
  warp.arguments[thread % 32] = argument;
  if (warp.arrived != mask) return wait(State::in_warp);
  complete(warp.arguments);
  warp.arrived = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (warp.arguments[lane] != nullptr) m.fibers[thread / 32 * 32 + lane].state = State::ready;
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  check_shared(row, 16);
  LdMatrix mine{r, static_cast<const unsigned char*>(row), transposed};
  warp_collective("ldmatrix", 0xFFFFFFFFu, &mine, complete_ldmatrix);
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma mine{d, a, b};
  warp_collective("mma.m16n8k16.bf16", 0xFFFFFFFFu, &mine, complete_mma<bf16_value>);
}

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma mine{d, a, b};
  warp_collective("mma.m16n8k16.f16", 0xFFFFFFFFu, &mine, complete_mma<f16_value>);
}

}  // namespace cuda_emulator
