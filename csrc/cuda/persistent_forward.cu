// The forward scan's instantiations for every cell, 16-bit type and tile.
#include "persistent_forward.cuh"
#include "persistent_launch.cuh"

namespace fastrnn {
namespace {

struct Kernels {
  using Kernel = void (*)(PersistentForward);

  template <class Cell, class T, bool kEven>
  static Kernel of(const CudaPlan& plan) {
    return plan.octets == kNarrowOctets ? persistent_forward_kernel<Cell, T, kNarrowOctets, kEven>
                                        : persistent_forward_kernel<Cell, T, widest_octets(Cell::kGates), kEven>;
  }
};

}  // namespace

bool can_run_forward(CellKind kind, Storage storage, const PersistentScan& scan) {
  return can_run(choose_kernel<Kernels>(kind, storage, scan), scan.plan);
}

void persistent_forward(CellKind kind, Storage storage, const StepForward& params, const PersistentScan& scan,
                        void* stream) {
  run_scan(choose_kernel<Kernels>(kind, storage, scan), traits(kind).gates, params, scan, stream);
}

}  // namespace fastrnn
