// The backward scan's instantiations for every cell, 16-bit type and tile.
#include "persistent_backward.cuh"
#include "persistent_launch.cuh"

namespace fastrnn {

namespace {

using Kernel = void (*)(PersistentBackward);

template <class Cell, class T>
Kernel kernel_of(const CudaPlan& plan) {
  return plan.row_tiles == 2   ? persistent_backward_kernel<Cell, T, 2, 1>
         : plan.row_tiles == 4 ? persistent_backward_kernel<Cell, T, 4, 1>
                               : persistent_backward_kernel<Cell, T, 8, 1>;
}

template <class T, class... Cells>
Kernel kernel_among(CellKind kind, const CudaPlan& plan, CellList<Cells...>) {
  using Choose = Kernel (*)(const CudaPlan&);
  static constexpr Choose kChoose[] = {kernel_of<Cells, T>...};
  return kChoose[static_cast<int>(kind)](plan);
}

Kernel choose(CellKind kind, Storage storage, const CudaPlan& plan) {
  return storage == Storage::kHalf ? kernel_among<__half>(kind, plan, AllCells())
                                   : kernel_among<__nv_bfloat16>(kind, plan, AllCells());
}

}  // namespace

bool can_run_backward(CellKind kind, Storage storage, const CudaPlan& plan) {
  return can_run(choose(kind, storage, plan), plan);
}

void persistent_backward(CellKind kind, Storage storage, const StepBackward& params, const PersistentScan& scan,
                         void* stream) {
  pack_weights(scan, true, traits(kind).gates, params.units, params.table.directions, stream);
  const PersistentBackward p{params, scan.plan, static_cast<const uint4*>(scan.packed), scan.step_stride};
  launch_scan(choose(kind, storage, scan.plan), scan.plan, params.table.directions, stream, p);
}

}  // namespace fastrnn
