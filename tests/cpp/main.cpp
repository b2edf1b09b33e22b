// All C++ tests in one program: the plan once, cells and scans once per ISA that this machine has.
#include "check.h"

namespace fastrnn::test {
void test_plan();
void test_streaming();
void test_plan_cuda();
void test_kernels_default();
#ifdef FASTRNN_X86
void test_kernels_avx2();
void test_kernels_avx512();
#endif
}  // namespace fastrnn::test

int main() {
  using namespace fastrnn::test;
  const auto run = [](const char* name, void (*test)()) {
    const int before = failures, counted = checks;
    test();
    std::printf("%-16s %d checks, %d failed\n", name, checks - counted, failures - before);
  };
  run("plan", test_plan);
  run("streaming", test_streaming);
  run("plan cuda", test_plan_cuda);
  run("kernels default", test_kernels_default);
#ifdef FASTRNN_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    run("kernels avx2", test_kernels_avx2);
  } else {
    std::puts("kernels avx2: not run, this machine has no AVX2");
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    run("kernels avx512", test_kernels_avx512);
  } else {
    std::puts("kernels avx512: not run, this machine has no AVX-512");
  }
#endif
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
