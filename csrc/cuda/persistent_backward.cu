// The backward scan's instantiations for every cell, 16-bit type and tile, 8 rows of the batch a cluster.
#include "persistent_backward.cuh"

namespace fastrnn {
namespace {

PersistentKernel<StepBackward> kernel_of(CellKind kind, Storage storage, const CudaPlan& plan) {
  return plan.batch_groups == 1 ? choose_kernel<BackwardKernels<1>>(kind, storage, plan)
                                : backward_kernel_of_16_rows(kind, storage, plan);
}

}  // namespace

bool can_run_backward(CellKind kind, Storage storage, const CudaPlan& plan) {
  return can_run(kernel_of(kind, storage, plan), plan);
}

void persistent_backward(CellKind kind, Storage storage, const StepBackward& params, const PersistentScan& scan,
                         void* stream) {
  run_scan(kernel_of(kind, storage, scan.plan), traits(kind).gates, params, scan, stream);
}

}  // namespace fastrnn
