// The persistent scans of two cells in bf16 and their packing, as a program: whole layers without the GEMMs around the scan,
// small enough for ThreadSanitizer.
#include "core/plan_cuda.cpp"
#include "core/tuned_cuda.cpp"
#include "grid_backward.cuh"
#include "grid_forward.cuh"
#include "persistent_backward.cuh"
#include "persistent_forward.cuh"
#include "persistent_launch.cuh"
#include "persistent_pack.cu"
#include "program.h"

namespace {

using fastrnn::CellKind;
using fastrnn::CudaPlan;
using fastrnn::CudaProblem;
using fastrnn::StepTable;
using gpu::bf16;
using program::Case;

void* optional(const Case& c, const char* name) { return c.has(name) ? c.array<void>(name) : nullptr; }

StepTable table_of(const Case& c) {
  StepTable table;
  table.steps = c.number("steps");
  table.batch = c.number("batch");
  table.total = c.number("rows");
  table.batch_stride = 1;
  table.lengths = static_cast<const int64_t*>(optional(c, "lengths"));
  table.reset = static_cast<const bool*>(optional(c, "reset"));
  table.reset_step_stride = table.batch;
  table.reset_batch_stride = 1;
  table.directions = c.number("directions");
  return table;
}

// The fastest plan with that many blocks in a cluster and that exchange.
CudaPlan plan_of(const Case& c, bool backward) {
  const fastrnn::CellTraits& cell = fastrnn::traits(static_cast<CellKind>(c.number("kind")));
  const CudaProblem problem{.gates = cell.gates,
                            .separate = cell.separate,
                            .saved = cell.saved,
                            .steps = c.number("steps"),
                            .batch = c.number("batch"),
                            .units = c.number("units"),
                            .directions = c.number("directions"),
                            .training = true,
                            .backward = backward};
  for (const CudaPlan& plan : fastrnn::persistent_plans(problem, fastrnn::cuda_device("h200"))) {
    if (static_cast<int>(plan.exchange) != c.number("exchange")) continue;
    if (plan.tier == fastrnn::Tier::kGrid) {
      if (plan.octets == 1 && plan.batch_groups == 1) return plan;
      continue;
    }
    const bool tile = backward ? plan.row_tiles == 2 : plan.octets == fastrnn::kNarrowOctets;
    if (plan.cluster == c.number("cluster") && tile) return plan;
  }
  throw std::runtime_error("no such plan");
}

template <class Cell, bool kEven>
void layer(const Case& c) {
  const int gates = Cell::kGates, directions = c.number("directions");
  const int64_t units = c.number("units");
  fastrnn::PersistentScan scan;
  for (int d = 0; d < directions; ++d) scan.weights[d] = c.array<bf16>("w_hh") + d * gates * units * units;
  scan.packed = c.array<void>("packed");
  scan.step_stride = c.number("batch");
  scan.offset = static_cast<const int64_t*>(optional(c, "offset"));

  fastrnn::StepForward f;
  f.table = table_of(c);
  f.units = f.outputs = units;
  f.save = true;
  f.gates = c.array<void>("gates");
  f.gates_stride = c.number("columns");
  f.h0 = optional(c, "h0");
  f.c0 = optional(c, "c0");
  f.output = c.array<void>("output");
  f.h_n = c.array<void>("h_n");
  f.c_n = optional(c, "c_n");
  scan.plan = plan_of(c, false);
  const bool grid = scan.plan.tier == fastrnn::Tier::kGrid;
  const auto nothing_yet = [&] {
    memset(scan.packed, 0xff, scan.plan.ring_words(f.table.steps, directions, sizeof(bf16)) * 4);
  };
  if (grid) {
    nothing_yet();
    fastrnn::run_grid(fastrnn::grid_forward_kernel<Cell, bf16, 1, 1, kEven>, f, scan, nullptr);
  } else {
    fastrnn::run_scan(fastrnn::persistent_forward_kernel<Cell, bf16, fastrnn::kNarrowOctets, kEven>, gates, f, scan,
                      nullptr);
  }

  fastrnn::StepBackward b;
  b.table = f.table;
  b.units = b.outputs = units;
  b.reserve = f.gates;
  b.reserve_stride = f.gates_stride;
  b.output = f.output;
  b.h0 = f.h0;
  b.c0 = f.c0;
  b.grad_output = c.array<void>("grad_output");
  b.carry = c.array<void>("carry");
  b.grad_gates = c.array<void>("grad_gates");
  b.grad_recurrent = optional(c, "grad_recurrent");
  b.grad_first = c.array<void>("grad_first");
  b.previous = c.array<void>("previous");
  scan.plan = plan_of(c, true);
  if (grid) {
    nothing_yet();
    fastrnn::run_grid(fastrnn::grid_backward_kernel<Cell, bf16, 1, 1, kEven>, b, scan, nullptr);
  } else {
    fastrnn::run_scan(fastrnn::persistent_backward_kernel<Cell, bf16, 2, kEven>, gates, b, scan, nullptr);
  }
}

// By the kernels for any rows, or where all rows have all steps by those for that.
template <class Cell>
void layer_of(const Case& c) {
  if (c.has("lengths") || c.has("reset") || c.has("offset")) {
    layer<Cell, false>(c);
  } else {
    layer<Cell, true>(c);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return program::run(argc, argv, {{"lstm", layer_of<fastrnn::LstmCell<>>}, {"gru", layer_of<fastrnn::GruCell<>>}});
}
