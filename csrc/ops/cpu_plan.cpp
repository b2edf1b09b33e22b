#include "ops/cpu_plan.h"

#include <ATen/Context.h>

#include "cpu/kernels.h"

namespace fastrnn {

CpuMachine cpu_machine(int threads) {
  // products are oneDNN's: one that the user has switched off would throw, with other threads waiting for it
  return {threads, l2_cache_bytes(), at::globalContext().userEnabledMkldnn() && bf16_products() != nullptr};
}

void describe(CellKind kind, Storage storage, CpuProblem& problem) {
  problem.gates = traits(kind).gates;
  problem.separate = traits(kind).separate;
  problem.element_size = storage == Storage::kDouble ? 8 : 4;  // 16 bits are computed in float32
  problem.weight_size = bytes_of(storage);
  const auto by_leave = [] {
    return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::RNN) ==
           at::Float32Precision::BF16;
  };
  problem.bf16 = storage == Storage::kBFloat16 || (storage == Storage::kFloat && by_leave());
}

}  // namespace fastrnn
