// The backward scan's instantiations for every cell, 16-bit type and tile.
#include "persistent_backward.cuh"

namespace fastrnn {
namespace {

struct Kernels {
  using Kernel = PersistentKernel<StepBackward>;

  template <class Cell, class T, bool kEven, int kTiles = 2>
  static Kernel of(const CudaPlan& plan) {
    if (plan.row_tiles == kTiles) return persistent_backward_kernel<Cell, T, kTiles, kEven>;
    if constexpr (kTiles < most_backward_tiles(Cell::kGates)) {
      return of<Cell, T, kEven, kTiles + 2>(plan);
    }
    return nullptr;
  }
};

}  // namespace

bool can_run_backward(CellKind kind, Storage storage, const PersistentScan& scan) {
  return can_run(choose_kernel<Kernels>(kind, storage, scan), scan.plan);
}

void persistent_backward(CellKind kind, Storage storage, const StepBackward& params, const PersistentScan& scan,
                         void* stream) {
  run_scan(choose_kernel<Kernels>(kind, storage, scan), traits(kind).gates, params, scan, stream);
}

}  // namespace fastrnn
