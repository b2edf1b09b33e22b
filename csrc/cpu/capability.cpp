#include "cpu/capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastrnn {
namespace {

CpuCapability choose() {
  [[maybe_unused]] const std::string wanted = setting("FASTRNN_CPU_CAPABILITY", {"avx512", "avx2", "default"});
#ifdef FASTRNN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  // the variable lowers the choice; what the machine lacks can't be asked for
  if (avx512 && wanted == "avx512") return CpuCapability::kAvx512;
  if (avx2 && wanted != "default") return CpuCapability::kAvx2;
#endif
  return CpuCapability::kDefault;
}

bool choose_gemm() {
  const std::string wanted = setting("FASTRNN_CPU_GEMM", {"auto", "own", "library"});
  if (wanted == "auto") return cpu_capability() == CpuCapability::kAvx512 && library_is_foreign();
  return wanted == "own";
}

}  // namespace

std::string setting(const char* variable, std::initializer_list<const char*> values) {
  const char* given = std::getenv(variable);
  const std::string value = given == nullptr || *given == '\0' ? *values.begin() : given;
  std::string words;
  for (const char* const* v = values.begin(); v != values.end(); ++v) {
    if (value == *v) return value;
    words += v == values.begin() ? "'" : v + 1 == values.end() ? " or '" : ", '";
    words += std::string(*v) + "'";
  }
  throw std::invalid_argument(std::string(variable) + " should be " + words + ", got '" + value + "'");
}

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

bool library_is_foreign() {
#ifdef FASTRNN_X86
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool own_gemm() {
  static const bool own = choose_gemm();
  return own;
}

#ifdef FASTRNN_X86
bool has_bf16_dot() { return cpu_capability() == CpuCapability::kAvx512 && __builtin_cpu_supports("avx512bf16"); }
bool has_int8_dot() { return cpu_capability() == CpuCapability::kAvx512 && __builtin_cpu_supports("avx512vnni"); }
#else
bool has_bf16_dot() { return false; }
bool has_int8_dot() { return false; }
#endif

}  // namespace fastrnn
