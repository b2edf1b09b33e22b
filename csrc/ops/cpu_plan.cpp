#include "ops/cpu_plan.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <pthread.h>

#include <atomic>

namespace fastrnn {
namespace {

// Threads of OpenMP do not survive a fork: a child that calls them would wait forever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int cpu_threads() { return at::in_parallel_region() || forked ? 1 : at::get_num_threads(); }

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

CpuProblem cpu_problem(CellKind kind, const Layout& l, bool ragged, Storage storage, Parts parts) {
  const Sizes z(l);
  CpuProblem problem{
      .steps = z.steps,
      .batch = z.batch,
      .shape = {z.inputs, z.units, z.outputs, l.projected},
      .directions = l.directions,
      .ragged = ragged,
  };
  describe(kind, storage, problem);
  if (parts == Parts::kNone) problem.parts = 0;
  return problem;
}

Scan make_scan(CellKind kind, const CpuProblem& problem, const RowTable& table, int threads) {
  Scan scan{kind, problem.shape, table.rows(), plan_cpu(problem, cpu_machine(threads)), problem.directions};
  scan.bf16 = &bf16_products();
  return scan;
}

}  // namespace fastrnn
