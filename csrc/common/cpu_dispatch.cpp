#include "csrc/common/cpu_dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sslfast {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
/// Whether the CPU multiplies bfloat16 tiles and Linux lets this process use the tile registers (asked for once).
bool request_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

CpuCapability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    static const bool amx = request_amx();
    return amx ? CpuCapability::Amx : CpuCapability::Avx512Bf16;
  }
  if (avx512) return CpuCapability::Avx512;
  if (avx2) return CpuCapability::Avx2;
#endif
  return CpuCapability::Default;
}

CpuCapability parse(const std::string& name) {
  const auto names = available_cpu_capabilities();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found != names.end()) return static_cast<CpuCapability>(found - names.begin());
  std::string choices;
  for (const auto& n : names) choices += (choices.empty() ? "" : ", ") + n;
  throw std::invalid_argument("SSLFAST_CPU_CAPABILITY: expected one of " + choices + " on this machine, got '" + name +
                              "'");
}

std::atomic<CpuCapability>& current() {
  static std::atomic<CpuCapability> capability = [] {
    const char* wanted = std::getenv("SSLFAST_CPU_CAPABILITY");
    return wanted != nullptr && *wanted != '\0' ? parse(wanted) : best_capability();
  }();
  return capability;
}

}  // namespace

CpuCapability cpu_capability() { return current().load(std::memory_order_relaxed); }

void set_cpu_capability(const std::string& name) { current().store(parse(name), std::memory_order_relaxed); }

std::string cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

std::vector<std::string> available_cpu_capabilities() {
  const int best = static_cast<int>(best_capability());
  return {kNames, kNames + best + 1};
}

}  // namespace sslfast
