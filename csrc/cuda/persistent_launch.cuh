// How persistent scans are launched.
#pragma once

#include <stdexcept>

#include "gpu.h"
#include "persistent.h"

namespace fastrnn {

// The weights of all directions, in the order in which each warp reads its fragments.
void pack_weights(const PersistentScan& scan, bool backward, int gates, int64_t units, int directions, void* stream);

template <class P>
bool can_run(void (*kernel)(P), const CudaPlan& plan) {
  if (plan.tier != Tier::kCluster) return plan.tier == Tier::kBlock;
  try {
    return gpu::max_active_clusters(static_cast<unsigned>(plan.cluster), kernel, dim3(plan.threads),
                                    static_cast<size_t>(plan.shared_bytes)) > 0;
  } catch (const std::runtime_error&) {  // a size of cluster that the device does not know
    return false;
  }
}

template <class P>
void launch_scan(void (*kernel)(P), const CudaPlan& plan, int directions, void* stream, const P& params) {
  const dim3 grid(static_cast<unsigned>(plan.blocks() / directions), static_cast<unsigned>(directions));
  gpu::launch_cluster(static_cast<unsigned>(plan.cluster), kernel, grid, dim3(plan.threads),
                      static_cast<size_t>(plan.shared_bytes), static_cast<cudaStream_t>(stream), params);
}

}  // namespace fastrnn
