// Scans that one launch runs for all steps, where the plan has one (core/plan_cuda.h). The environment variable
// FASTRNN_CUDA_PLAN chooses: stepwise (the default), auto, persistent, or persistent:K for the K-th alternative. What the
// device has no room for goes step by step, except with persistent:K: who asks for one of them measures it, so nothing
// else may run in its place.
#pragma once

#include "cuda/persistent.h"
#include "ops/stepwise.h"

namespace fastrnn {

// Runs the scan of both directions and returns true; false if the step-by-step loop has to do it.
bool run_persistent(CellKind kind, Storage storage, const Gpu& gpu, const Layout& layout, bool packed,
                    const Tensors& weights, const StepForward& params, int64_t step_stride);
bool run_persistent(CellKind kind, Storage storage, const Gpu& gpu, const Layout& layout, bool packed,
                    const Tensors& weights, const StepBackward& params, int64_t step_stride);

}  // namespace fastrnn
