// Scans that one launch runs for all steps, where the plan has one (core/plan_cuda.h). The environment variable
// FASTRNN_CUDA_PLAN chooses: auto (the default), stepwise, persistent, or persistent:K for the K-th alternative. What the
// device has no room for goes step by step, except with persistent:K: who asks for one of them measures it, so nothing
// else may run in its place.
#pragma once

#include "cuda/persistent.h"
#include "ops/stepwise.h"

namespace fastrnn {

// Runs the scan of both directions and returns true; false if the step-by-step loop has to do it. The row of (t, n) is
// t * step_stride + n * batch_stride, or what the rows of a `packed` batch say (else null).
bool run_persistent(CellKind kind, Storage storage, const Gpu& gpu, const Layout& layout, const Tensors& weights,
                    const StepForward& params, int64_t step_stride, const Rows* packed);
bool run_persistent(CellKind kind, Storage storage, const Gpu& gpu, const Layout& layout, const Tensors& weights,
                    const StepBackward& params, int64_t step_stride, const Rows* packed);

}  // namespace fastrnn
