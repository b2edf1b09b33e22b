// The best table of kernels for this machine.
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"

namespace fastrnn {

extern const CpuKernels kernels_default;
#ifdef FASTRNN_X86
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
#endif

namespace {

const CpuKernels& choose() {
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
  if (avx512 && (wanted.empty() || wanted == "avx512")) return kernels_avx512;
  if (avx2 && wanted != "default") return kernels_avx2;
#endif
  return kernels_default;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

int64_t l2_cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

}  // namespace fastrnn
