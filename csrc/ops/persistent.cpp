#include "ops/persistent.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

#include "core/tuned_cuda.h"

namespace fastrnn {
namespace {

constexpr const char* kDefaultWish = "stepwise";  // "auto" once the persistent kernels have run on a GPU

std::string wish() {
  const char* variable = std::getenv("FASTRNN_CUDA_PLAN");
  return variable == nullptr ? kDefaultWish : variable;
}

CudaPlan plan_of(CellKind kind, Storage storage, const CudaDevice& device, const StepTable& table, int64_t units,
                 bool projected, bool packed, bool training, bool backward) {
  const CellTraits& cell = traits(kind);
  const bool is_16_bit = storage == Storage::kHalf || storage == Storage::kBFloat16;
  const CudaProblem problem{
      .gates = cell.gates,
      .separate = cell.separate,
      .saved = cell.saved,
      .steps = table.steps,
      .batch = table.batch,
      .units = units,
      .directions = table.directions,
      .element_size = is_16_bit ? 2 : 4,
      .projected = projected,
      .packed = packed,
      .training = training,
      .backward = backward,
  };
  return plan_cuda(problem, device, wish(), tuned_plans().get());
}

// Whether the scan goes step by step, the device having no room for the plan.
bool falls_back(const CudaPlan& plan, bool can_run) {
  TORCH_CHECK(can_run || !wish().starts_with("persistent:"), "FASTRNN_CUDA_PLAN=", wish(),
              " cannot run: this device has ", "no room for a cluster of ", plan.cluster, " blocks with ",
              plan.shared_bytes, " bytes of shared memory each");
  return !can_run;
}

// The scan's packed weights live in `memory`.
PersistentScan scan_of(const CudaPlan& plan, const Layout& l, const Tensors& weights, int64_t step_stride,
                       Tensor& memory) {
  constexpr int64_t kFragmentLane = 16;  // bytes
  PersistentScan scan;
  scan.plan = plan;
  scan.step_stride = step_stride;
  for (int d = 0; d < l.directions; ++d) scan.weights[d] = weights[l.w_hh(d)].const_data_ptr();
  memory = at::empty({plan.fragments(l.directions) * kFragmentLane}, weights[0].options().dtype(at::kByte));
  scan.packed = memory.mutable_data_ptr();
  return scan;
}

}  // namespace

bool run_persistent(CellKind kind, Storage storage, const Gpu& gpu, const Layout& l, bool packed,
                    const Tensors& weights, const StepForward& p, int64_t step_stride) {
  const CudaPlan plan = plan_of(kind, storage, gpu.device, p.table, p.units, p.projected, packed, p.save, false);
  if (plan.tier == Tier::kStepwise || falls_back(plan, can_run_forward(kind, storage, plan))) return false;
  Tensor memory;
  persistent_forward(kind, storage, p, scan_of(plan, l, weights, step_stride, memory), gpu.stream);
  return true;
}

bool run_persistent(CellKind kind, Storage storage, const Gpu& gpu, const Layout& l, bool packed,
                    const Tensors& weights, const StepBackward& p, int64_t step_stride) {
  const CudaPlan plan = plan_of(kind, storage, gpu.device, p.table, p.units, p.projected, packed, true, true);
  if (plan.tier == Tier::kStepwise || falls_back(plan, can_run_backward(kind, storage, plan))) return false;
  Tensor memory;
  persistent_backward(kind, storage, p, scan_of(plan, l, weights, step_stride, memory), gpu.stream);
  return true;
}

}  // namespace fastrnn
