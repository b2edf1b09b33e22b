// What a plan for the CPU is asked with: this machine, and a layer as it is stored.
#pragma once

#include "core/cells/all.h"
#include "core/plan.h"
#include "cpu/kernels.h"
#include "ops/layer_op.h"
#include "ops/rows.h"

namespace fastrnn {

// That may be used here and now.
int cpu_threads();

CpuMachine cpu_machine(int threads);

// Fills in what the cell and the dtype of its tensors decide, torch.backends.mkldnn.rnn.fp32_precision included.
void describe(CellKind kind, Storage storage, CpuProblem& problem);

// Whether float32 may be multiplied in parts where the plan is for it.
enum class Parts { kAllowed, kNone };

// A layer's forward scan.
CpuProblem cpu_problem(CellKind kind, const Layout& layout, bool ragged, Storage storage, Parts parts);

Scan make_scan(CellKind kind, const CpuProblem& problem, const RowTable& table, int threads);

}  // namespace fastrnn
