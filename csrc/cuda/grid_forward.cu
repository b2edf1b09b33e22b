// The forward scan of the whole GPU in 16 bits, for every cell and plan.
#include "grid_forward.cuh"

namespace fastrnn {

GridKernel<StepForward> grid_forward_kernel_16(CellKind kind, Storage storage, const PersistentScan& scan) {
  return choose_kernel<OfPlan<GridForwardKernels>>(kind, storage, scan);
}

}  // namespace fastrnn
