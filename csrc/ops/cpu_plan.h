// What a plan for the CPU is asked with: this machine, and a layer as it is stored.
#pragma once

#include "core/cells/all.h"
#include "core/plan.h"

namespace fastrnn {

CpuMachine cpu_machine(int threads);

// Fills in what the cell and the dtype of its tensors decide, torch.backends.mkldnn.rnn.fp32_precision included.
void describe(CellKind kind, Storage storage, CpuProblem& problem);

}  // namespace fastrnn
