// The backward scan of the whole GPU in 16 bits, for every cell and plan.
#include "grid_backward.cuh"

namespace fastrnn {

GridKernel<StepBackward> grid_backward_kernel_16(CellKind kind, Storage storage, const PersistentScan& scan) {
  return choose_kernel<OfPlan<GridBackwardKernels>>(kind, storage, scan);
}

}  // namespace fastrnn
