// Run-time choice of the instruction set, the way PyTorch does it: every csrc/ops/cpu/*_kernel.cpp is compiled once per
// CpuCapability with CPU_CAPABILITY naming a namespace, and the tensor side calls the best copy that the machine can
// run.
//
//   op.h:          SSLFAST_DECLARE_CPU_LAUNCHER(launch_info_nce_forward_cpu, InfoNceForwardParams)
//   op_kernel.cpp: namespace sslfast::CPU_CAPABILITY { void launch_info_nce_forward_cpu(const InfoNceForwardParams& p)
//   {…} } op.cpp:        SSLFAST_CPU_DISPATCH(launch_info_nce_forward_cpu, params);
#pragma once

#include <string>
#include <vector>

namespace sslfast {

/// The last two run the AVX-512 copies, in which a kernel may use these instructions through target attributes.
enum class CpuCapability { Default = 0, Avx2 = 1, Avx512 = 2, Avx512Bf16 = 3, Amx = 4 };

/// The capability in use: the best that was compiled and that this machine has, or what SSLFAST_CPU_CAPABILITY or
/// set_cpu_capability() asked for.
CpuCapability cpu_capability();

/// "default", "avx2", "avx512", "avx512_bf16" or "amx"; throws std::invalid_argument on another name or one that this
/// machine cannot run.
void set_cpu_capability(const std::string& name);
std::string cpu_capability_name();
std::vector<std::string> available_cpu_capabilities();

}  // namespace sslfast

#if defined(__x86_64__)
#define SSLFAST_DECLARE_CPU_LAUNCHER(name, Params) \
  namespace DEFAULT {                              \
  void name(const Params&);                        \
  }                                                \
  namespace AVX2 {                                 \
  void name(const Params&);                        \
  }                                                \
  namespace AVX512 {                               \
  void name(const Params&);                        \
  }
#define SSLFAST_CPU_DISPATCH(name, params)     \
  switch (::sslfast::cpu_capability()) {       \
    case ::sslfast::CpuCapability::Amx:        \
    case ::sslfast::CpuCapability::Avx512Bf16: \
    case ::sslfast::CpuCapability::Avx512:     \
      ::sslfast::AVX512::name(params);         \
      break;                                   \
    case ::sslfast::CpuCapability::Avx2:       \
      ::sslfast::AVX2::name(params);           \
      break;                                   \
    default:                                   \
      ::sslfast::DEFAULT::name(params);        \
  }
#else
#define SSLFAST_DECLARE_CPU_LAUNCHER(name, Params) \
  namespace DEFAULT {                              \
  void name(const Params&);                        \
  }
#define SSLFAST_CPU_DISPATCH(name, params) ::sslfast::DEFAULT::name(params)
#endif
