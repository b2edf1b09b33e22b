// The backward scan's instantiations for every cell, 16-bit type and tile.
#include "persistent_backward.cuh"
#include "persistent_launch.cuh"

namespace fastrnn {
namespace {

struct Kernels {
  using Kernel = void (*)(PersistentBackward);

  template <class Cell, class T>
  static Kernel of(const CudaPlan& plan) {
    return plan.row_tiles == 2   ? persistent_backward_kernel<Cell, T, 2, 1>
           : plan.row_tiles == 4 ? persistent_backward_kernel<Cell, T, 4, 1>
                                 : persistent_backward_kernel<Cell, T, 8, 1>;
  }
};

}  // namespace

bool can_run_backward(CellKind kind, Storage storage, const CudaPlan& plan) {
  return can_run(choose_kernel<Kernels>(kind, storage, plan), plan);
}

void persistent_backward(CellKind kind, Storage storage, const StepBackward& params, const PersistentScan& scan,
                         void* stream) {
  run_scan(choose_kernel<Kernels>(kind, storage, scan.plan), traits(kind).gates, params, scan, stream);
}

}  // namespace fastrnn
