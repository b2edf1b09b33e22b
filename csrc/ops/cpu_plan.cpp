#include "ops/cpu_plan.h"

#include <ATen/Context.h>

#include "cpu/kernels.h"

namespace fastrnn {

CpuMachine cpu_machine(int threads) {
  const Bf16Products& products = bf16_products();
  // oneDNN's, but for those in parts: one that the user has switched off would throw, with other threads waiting for it
  const bool bf16 = products.multiply != nullptr && at::globalContext().userEnabledMkldnn();
  return {threads, l2_cache_bytes(), bf16, products.multiply_parts != nullptr};
}

void describe(CellKind kind, Storage storage, CpuProblem& problem) {
  problem.gates = traits(kind).gates;
  problem.separate = traits(kind).separate;
  problem.element_size = storage == Storage::kDouble ? 8 : 4;  // 16 bits are computed in float32
  problem.weight_size = bytes_of(storage);
  problem.bf16 = storage == Storage::kBFloat16;
  problem.parts = 0;
  if (storage != Storage::kFloat) return;
  switch (at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::RNN)) {
    case at::Float32Precision::BF16:
      problem.bf16 = true;
      break;
    case at::Float32Precision::TF32:  // 11 bits or more: two parts have 16
      problem.parts = 2;
      break;
    case at::Float32Precision::NONE:
      problem.parts = exact_parts();
      break;
    default:
      break;
  }
}

}  // namespace fastrnn
