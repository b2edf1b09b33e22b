// The persistent scans, as their caller sees them: plain C++, without a header of CUDA or torch. One launch runs all
// steps; what a step means is the same as in kernels.h, whose parameters are used here too.
#pragma once

#include "core/plan_cuda.h"
#include "cuda/kernels.h"

namespace fastrnn {

struct PersistentScan {
  CudaPlan plan;
  const void* weights[2] = {};  // T [G*H, H] of each direction
  // Aligned to 16 bytes: plan.fragments(D) times 16 bytes, for the weights as the tensor cores read them; for Tier::kGrid
  // plan.ring_words(...) words of all ones, through which its blocks exchange what the next step needs.
  void* packed = nullptr;
  int64_t step_stride = 0;  // the row of (t, n) is t * step_stride + n * batch_stride
  // [T] on the device, of a packed batch, else null: the row of (t, n) is offset[t] + n * batch_stride. There is none beyond
  // the row's length, which the table has; and the first row of the batch is the longest, as in every slice of it.
  const int64_t* offset = nullptr;
  // All rows of the batch have all steps, none begins anew on the way, and the data are not packed: there are kernels for
  // that alone.
  bool even = false;
};

// Writes `count` numbers of the host to the device's memory. They travel as arguments of kernels: nothing waits, and a
// graph has them in itself.
void copy_numbers(const int64_t* from, int64_t count, int64_t* to, void* stream);

// Whether the device runs such a launch at all: it is asked, since what a cluster finds free depends on more than its
// numbers (MIG, other contexts). For Tier::kBlock true.
bool can_run_forward(CellKind kind, Storage storage, const PersistentScan& scan);
bool can_run_backward(CellKind kind, Storage storage, const PersistentScan& scan);
bool can_run_grid_forward(CellKind kind, Storage storage, const PersistentScan& scan);
bool can_run_grid_backward(CellKind kind, Storage storage, const PersistentScan& scan);

// Of the parameters, `recurrent`, `hidden`, `state`, `activation` and `product` (what lives between launches) are not
// used, nor are the steps of the table. On `stream`, without waiting for it.
void persistent_forward(CellKind kind, Storage storage, const StepForward& params, const PersistentScan& scan,
                        void* stream);
// Of the parameters, `product`, `grad_activation`, `step_gates` and what belongs to projections is not used.
void persistent_backward(CellKind kind, Storage storage, const StepBackward& params, const PersistentScan& scan,
                         void* stream);

// The same for Tier::kGrid.
void grid_forward(CellKind kind, Storage storage, const StepForward& params, const PersistentScan& scan, void* stream);
void grid_backward(CellKind kind, Storage storage, const StepBackward& params, const PersistentScan& scan,
                   void* stream);

}  // namespace fastrnn
