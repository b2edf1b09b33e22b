#include "ops/persistent.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/tuned_cuda.h"

namespace fastrnn {
namespace {

constexpr const char* kDefaultWish = "auto";

std::string wish() {
  const char* variable = std::getenv("FASTRNN_CUDA_PLAN");
  return variable == nullptr ? kDefaultWish : variable;
}

// Kernels count rows and steps in 32 bits.
bool rows_fit(const StepTable& table) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  return table.steps < kMost && table.batch < kMost && table.total < kMost / table.directions;
}

template <class Step>
CudaPlan plan_of(CellKind kind, Storage storage, const CudaDevice& device, const Step& p) {
  constexpr bool kBackward = std::is_same_v<Step, StepBackward>;
  const CellTraits& cell = traits(kind);
  bool training = true;
  if constexpr (!kBackward) training = p.save;
  const CudaProblem problem{
      .gates = cell.gates,
      .separate = cell.separate,
      .saved = cell.saved,
      .steps = p.table.steps,
      .batch = p.table.batch,
      .units = p.units,
      .directions = p.table.directions,
      .element_size = bytes_of(storage),
      .projected = p.projected,
      .training = training,
      .backward = kBackward,
  };
  return plan_cuda(problem, device, wish(), tuned_plans().get());
}

// Whether the scan goes step by step, the device having no room for the plan.
bool falls_back(const CudaPlan& plan, bool can_run) {
  const bool grid = plan.tier == Tier::kGrid;
  TORCH_CHECK(can_run || !wish().starts_with("persistent:"), "FASTRNN_CUDA_PLAN=", wish(),
              " cannot run: this device has no room for ", grid ? "" : "a cluster of ",
              grid ? plan.blocks() : plan.cluster, grid ? " blocks at the same time" : " blocks", " with ",
              plan.shared_bytes, " bytes of shared memory each");
  return !can_run;
}

template <class Step>
bool run(CellKind kind, Storage storage, const Gpu& gpu, const Layout& l, const Tensors& weights, Step p,
         int64_t step_stride, const Rows* packed) {
  constexpr bool kBackward = std::is_same_v<Step, StepBackward>;
  PersistentScan scan;
  scan.plan = plan_of(kind, storage, gpu.device, p);
  if (scan.plan.tier == Tier::kStepwise || !rows_fit(p.table)) return false;
  scan.even = p.table.lengths == nullptr && p.table.reset == nullptr && packed == nullptr;
  const bool grid = scan.plan.tier == Tier::kGrid;
  const auto can_run = kBackward ? (grid ? can_run_grid_backward : can_run_backward)
                                 : (grid ? can_run_grid_forward : can_run_forward);
  if (falls_back(scan.plan, can_run(kind, storage, scan))) return false;

  for (int d = 0; d < l.directions; ++d) scan.weights[d] = weights[l.w_hh(d)].const_data_ptr();
  scan.step_stride = step_stride;
  const auto options = weights[0].options();
  constexpr int64_t kFragmentLane = 16;  // bytes
  const Tensor memory = grid ? at::full({scan.plan.ring_words(p.table.steps, l.directions, bytes_of(storage))}, -1,
                                        options.dtype(at::kInt))
                             : at::empty({scan.plan.fragments(l.directions) * kFragmentLane}, options.dtype(at::kByte));
  scan.packed = memory.mutable_data_ptr();
  Tensor layout;  // [T + N] of a packed batch: where steps begin, and lengths
  if (packed != nullptr) {
    std::vector<int64_t> numbers(packed->offset, packed->offset + packed->steps);
    numbers.insert(numbers.end(), packed->length, packed->length + packed->batch);
    layout = at::empty({packed->steps + packed->batch}, options.dtype(at::kLong));
    int64_t* const to = layout.mutable_data_ptr<int64_t>();
    copy_numbers(numbers.data(), layout.numel(), to, gpu.stream);
    scan.offset = to;
    p.table.lengths = to + packed->steps;
  }
  if constexpr (kBackward) {
    (grid ? grid_backward : persistent_backward)(kind, storage, p, scan, gpu.stream);
  } else {
    (grid ? grid_forward : persistent_forward)(kind, storage, p, scan, gpu.stream);
  }
  return true;
}

}  // namespace

bool run_persistent(CellKind kind, Storage storage, const Gpu& gpu, const Layout& l, const Tensors& weights,
                    const StepForward& p, int64_t step_stride, const Rows* packed) {
  return run(kind, storage, gpu, l, weights, p, step_stride, packed);
}

bool run_persistent(CellKind kind, Storage storage, const Gpu& gpu, const Layout& l, const Tensors& weights,
                    const StepBackward& p, int64_t step_stride, const Rows* packed) {
  return run(kind, storage, gpu, l, weights, p, step_stride, packed);
}

}  // namespace fastrnn
