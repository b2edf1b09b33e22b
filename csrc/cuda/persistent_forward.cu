// The forward scan's instantiations for every cell, 16-bit type and tile.
#include "persistent_forward.cuh"
#include "persistent_launch.cuh"

namespace fastrnn {

namespace {

using Kernel = void (*)(PersistentForward);

template <class Cell, class T>
Kernel kernel_of(const CudaPlan& plan) {
  constexpr int kNarrow = narrow_octets(Cell::kGates);
  if (plan.batch_groups == 2) return persistent_forward_kernel<Cell, T, kNarrow, 2>;
  return plan.octets == kNarrow ? persistent_forward_kernel<Cell, T, kNarrow, 1>
                                : persistent_forward_kernel<Cell, T, widest_octets(Cell::kGates), 1>;
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

bool can_run_forward(CellKind kind, Storage storage, const CudaPlan& plan) {
  return can_run(choose(kind, storage, plan), plan);
}

void persistent_forward(CellKind kind, Storage storage, const StepForward& params, const PersistentScan& scan,
                        void* stream) {
  pack_weights(scan, false, traits(kind).gates, params.units, params.table.directions, stream);
  const PersistentForward p{params, scan.plan, static_cast<const uint4*>(scan.packed), scan.step_stride};
  launch_scan(choose(kind, storage, scan.plan), scan.plan, params.table.directions, stream, p);
}

}  // namespace fastrnn
