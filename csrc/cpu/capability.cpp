#include "cpu/capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastrnn {
namespace {

CpuCapability choose() {
  const char* variable = std::getenv("FASTRNN_CPU_CAPABILITY");
  const std::string wanted = variable == nullptr ? "" : variable;
  if (!wanted.empty() && wanted != "avx512" && wanted != "avx2" && wanted != "default") {
    throw std::invalid_argument("FASTRNN_CPU_CAPABILITY should be 'avx512', 'avx2' or 'default', got '" + wanted + "'");
  }
#ifdef FASTRNN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  // the variable lowers the choice; what the machine lacks can't be asked for
  if (avx512 && (wanted.empty() || wanted == "avx512")) return CpuCapability::kAvx512;
  if (avx2 && wanted != "default") return CpuCapability::kAvx2;
#endif
  return CpuCapability::kDefault;
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

#ifdef FASTRNN_X86
bool has_bf16_dot() { return cpu_capability() == CpuCapability::kAvx512 && __builtin_cpu_supports("avx512bf16"); }
bool has_int8_dot() { return cpu_capability() == CpuCapability::kAvx512 && __builtin_cpu_supports("avx512vnni"); }
#else
bool has_bf16_dot() { return false; }
bool has_int8_dot() { return false; }
#endif

}  // namespace fastrnn
