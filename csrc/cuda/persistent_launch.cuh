// How persistent scans are launched.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "persistent.cuh"

namespace fastrnn {

// The weights of all directions, in the order in which each warp reads its fragments.
void pack_weights(const PersistentScan& scan, bool backward, int gates, int64_t units, int directions, void* stream);

template <class Step>
using PersistentKernel = void (*)(PersistentParams<Step>);

template <class Step>
bool can_run(PersistentKernel<Step> kernel, const CudaPlan& plan) {
  if (plan.tier != Tier::kCluster) return plan.tier == Tier::kBlock;
  try {
    return gpu::max_active_clusters(static_cast<unsigned>(plan.cluster), kernel, dim3(plan.threads),
                                    static_cast<size_t>(plan.shared_bytes)) > 0;
  } catch (const std::runtime_error&) {  // a size of cluster that the device does not know
    return false;
  }
}

// One scan: its weights packed, then its launch.
template <class Step>
void run_scan(PersistentKernel<Step> kernel, int gates, const Step& step, const PersistentScan& scan, void* stream) {
  constexpr bool kBackward = std::is_same_v<Step, StepBackward>;
  const CudaPlan& plan = scan.plan;
  const int directions = step.table.directions;
  pack_weights(scan, kBackward, gates, step.units, directions, stream);
  const PersistentParams<Step> params{step, plan, static_cast<const uint4*>(scan.packed), scan.step_stride,
                                      scan.offset};
  const dim3 grid(static_cast<unsigned>(plan.blocks() / directions), static_cast<unsigned>(directions));
  gpu::launch_cluster(static_cast<unsigned>(plan.cluster), kernel, grid, dim3(plan.threads),
                      static_cast<size_t>(plan.shared_bytes), static_cast<cudaStream_t>(stream), params);
}

// The kernel of a cell and a type: Kernels::of<Cell, T, kEven>(plan), a Kernels::Kernel.
template <class Kernels, class T, bool kEven, class... Cells>
typename Kernels::Kernel kernel_among(CellKind kind, const CudaPlan& plan, CellList<Cells...>) {
  using Choose = typename Kernels::Kernel (*)(const CudaPlan&);
  static constexpr Choose kChoose[] = {Kernels::template of<Cells, T, kEven>...};
  return kChoose[static_cast<int>(kind)](plan);
}
template <class Kernels, class T>
typename Kernels::Kernel kernel_of(CellKind kind, const PersistentScan& scan) {
  return scan.even ? kernel_among<Kernels, T, true>(kind, scan.plan, AllCells())
                   : kernel_among<Kernels, T, false>(kind, scan.plan, AllCells());
}
// Among the 16-bit types.
template <class Kernels>
typename Kernels::Kernel choose_kernel(CellKind kind, Storage storage, const PersistentScan& scan) {
  return storage == Storage::kHalf ? kernel_of<Kernels, __half>(kind, scan)
                                   : kernel_of<Kernels, __nv_bfloat16>(kind, scan);
}

}  // namespace fastrnn
