// The backward scan's instantiations for 16 rows of the batch a cluster: a file of their own, for the compiler's time.
#include "persistent_backward.cuh"

namespace fastrnn {

PersistentKernel<StepBackward> backward_kernel_of_16_rows(CellKind kind, Storage storage, const CudaPlan& plan) {
  return choose_kernel<BackwardKernels<2>>(kind, storage, plan);
}

}  // namespace fastrnn
