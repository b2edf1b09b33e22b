// The forward scan's instantiations for every cell, 16-bit type and tile.
#include "persistent_forward.cuh"
#include "persistent_launch.cuh"

namespace fastrnn {
namespace {

struct Kernels {
  using Kernel = void (*)(PersistentForward);

  template <class Cell, class T>
  static Kernel of(const CudaPlan& plan) {
    constexpr int kNarrow = narrow_octets(Cell::kGates);
    return plan.octets == kNarrow ? persistent_forward_kernel<Cell, T, kNarrow, 1>
                                  : persistent_forward_kernel<Cell, T, widest_octets(Cell::kGates), 1>;
  }
};

}  // namespace

bool can_run_forward(CellKind kind, Storage storage, const CudaPlan& plan) {
  return can_run(choose_kernel<Kernels>(kind, storage, plan), plan);
}

void persistent_forward(CellKind kind, Storage storage, const StepForward& params, const PersistentScan& scan,
                        void* stream) {
  run_scan(choose_kernel<Kernels>(kind, storage, scan.plan), traits(kind).gates, params, scan, stream);
}

}  // namespace fastrnn
