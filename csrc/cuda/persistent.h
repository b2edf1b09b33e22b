// The persistent scans, as their caller sees them: plain C++, without a header of CUDA or torch. One launch runs all
// steps; what a step means is the same as in kernels.h, whose parameters are used here too.
#pragma once

#include "core/plan_cuda.h"
#include "cuda/kernels.h"

namespace fastrnn {

struct PersistentScan {
  CudaPlan plan;
  const void* weights[2] = {};  // T [G*H, H] of each direction
  void* packed = nullptr;  // plan.fragments(D) times 16 bytes, aligned to 16: the weights as the tensor cores read them
  int64_t step_stride = 0;  // the row of (t, n) is t * step_stride + n * batch_stride
};

// Whether the device runs such a launch at all: it is asked, since what a cluster finds free depends on more than its
// numbers (MIG, other contexts). For Tier::kBlock true.
bool can_run_forward(CellKind kind, Storage storage, const CudaPlan& plan);
bool can_run_backward(CellKind kind, Storage storage, const CudaPlan& plan);

// Of the parameters, `recurrent`, `hidden`, `state`, `activation` and `product` (what lives between launches) are not
// used, nor are the steps of the table. On `stream`, without waiting for it.
void persistent_forward(CellKind kind, Storage storage, const StepForward& params, const PersistentScan& scan,
                        void* stream);
// Of the parameters, `product`, `grad_activation`, `step_gates` and what belongs to projections is not used.
void persistent_backward(CellKind kind, Storage storage, const StepBackward& params, const PersistentScan& scan,
                         void* stream);

}  // namespace fastrnn
