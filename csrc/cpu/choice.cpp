// The table of kernels for this machine.
#include <unistd.h>

#include "cpu/capability.h"
#include "cpu/kernels.h"

namespace fastrnn {

extern const CpuKernels kernels_default;
#ifdef FASTRNN_X86
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
#endif

namespace {

const CpuKernels& choose() {
  switch (cpu_capability()) {
#ifdef FASTRNN_X86
    case CpuCapability::kAvx512:
      return kernels_avx512;
    case CpuCapability::kAvx2:
      return kernels_avx2;
#endif
    default:
      return kernels_default;
  }
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
