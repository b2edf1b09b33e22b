// The backward scan of the whole GPU in 16 bits, for every cell and plan.
#include "grid_backward.cuh"

namespace fastrnn {

GridKernel<StepBackward> grid_backward_kernel_16(CellKind kind, Storage storage, const CudaPlan& plan) {
  return choose_grid_kernel_16<GridBackwardKernels>(kind, storage, plan);
}

}  // namespace fastrnn
