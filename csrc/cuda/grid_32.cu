// The scans of the whole GPU in float32, for every cell and plan; and the choice among all of its kernels.
#include "grid_backward.cuh"
#include "grid_forward.cuh"

namespace fastrnn {
namespace {

GridKernel<StepForward> forward_kernel(CellKind kind, Storage storage, const PersistentScan& scan) {
  if (storage != Storage::kFloat) return grid_forward_kernel_16(kind, storage, scan);
  return kernel_of<OfPlan<GridForwardKernels>, float>(kind, scan);
}

GridKernel<StepBackward> backward_kernel(CellKind kind, Storage storage, const PersistentScan& scan) {
  if (storage != Storage::kFloat) return grid_backward_kernel_16(kind, storage, scan);
  return kernel_of<OfPlan<GridBackwardKernels>, float>(kind, scan);
}

}  // namespace

bool can_run_grid_forward(CellKind kind, Storage storage, const PersistentScan& scan) {
  return can_run(forward_kernel(kind, storage, scan), scan.plan);
}
bool can_run_grid_backward(CellKind kind, Storage storage, const PersistentScan& scan) {
  return can_run(backward_kernel(kind, storage, scan), scan.plan);
}
void grid_forward(CellKind kind, Storage storage, const StepForward& params, const PersistentScan& scan, void* stream) {
  run_grid(forward_kernel(kind, storage, scan), params, scan, stream);
}
void grid_backward(CellKind kind, Storage storage, const StepBackward& params, const PersistentScan& scan,
                   void* stream) {
  run_grid(backward_kernel(kind, storage, scan), params, scan, stream);
}

}  // namespace fastrnn
