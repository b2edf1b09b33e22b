// The plan of the persistent scans, over devices and shapes: no plan asks for more than the device has, and what a plan
// promises to hold, it holds.
#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "check.h"
#include "core/cells/all.h"
#include "core/plan_cuda.h"

namespace fastrnn::test {
namespace {

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

CudaProblem problem_of(CellKind kind, int64_t units, int64_t batch, int directions, bool backward) {
  const CellTraits& cell = traits(kind);
  return {.gates = cell.gates,
          .separate = cell.separate,
          .saved = cell.saved,
          .steps = 100,
          .batch = batch,
          .units = units,
          .directions = directions,
          .training = true,
          .backward = backward};
}

void check_fits(const CudaPlan& plan, const CudaProblem& p, const CudaDevice& device) {
  CHECK(plan.tier == (plan.cluster == 1 ? Tier::kBlock : Tier::kCluster));
  CHECK(plan.cluster >= 1 && plan.cluster <= device.max_cluster && plan.cluster <= 16);
  CHECK((plan.cluster & (plan.cluster - 1)) == 0);
  CHECK((plan.exchange == Exchange::kBlock) == (plan.cluster == 1));
  CHECK(plan.threads >= 32 * plan.warps && plan.threads <= 256 && plan.warps >= 1);
  CHECK(plan.threads * 255 <= device.register_words);
  CHECK(plan.shared_bytes <= device.shared_bytes);
  // all blocks of one cluster run at the same time, or the launch could never begin
  CHECK(plan.at_once >= 1 && plan.at_once * plan.cluster <= device.multiprocessors);
  CHECK(plan.clusters * 8 * plan.batch_groups >= p.directions * p.batch);
  CHECK(plan.blocks() == plan.clusters * plan.cluster && plan.blocks() <= int64_t{1} << 31);
  // every unit has one owner, and no block is without units
  CHECK(plan.units % 8 == 0 && int64_t{plan.units} * plan.cluster >= p.units);
  CHECK(int64_t{plan.units} * (plan.cluster - 1) < p.units);
  // the warps of a block have all its weights, in registers or in the shared memory that the plan asks for
  const int steps = plan.register_steps + plan.shared_steps;
  CHECK(plan.depth % (16 * kStepsAtOnce) == 0 && steps * 16 >= plan.depth && plan.register_steps % 2 == 0);
  CHECK(plan.register_steps > 0 && 4 * plan.register_steps * plan.row_tiles <= 160);
  const int64_t held = int64_t{plan.shared_steps} * plan.row_tiles * plan.warps * kFragmentBytes;
  const int64_t columns = int64_t{8} * plan.batch_groups;
  if (p.backward) {
    CHECK(plan.depth >= p.gates * plan.units && int64_t{plan.warps} * plan.row_tiles * 16 >= p.units);
    CHECK(int64_t{plan.units} * columns <= int64_t{plan.threads} * kElementsOfThread);
    const int64_t inboxes = 2 * int64_t{plan.cluster} * plan.units * columns * 4;
    CHECK(plan.shared_bytes >= held + inboxes + 2 * plan.depth * columns * 2 + plan.units * columns * 4 + 16);
  } else {
    CHECK(plan.depth >= divide_up(p.units, 8) * 8 && plan.units == plan.warps * plan.octets * 8);
    CHECK(plan.row_tiles * 2 >= plan.octets * p.gates);
    CHECK(plan.shared_bytes >= held + 2 * plan.depth * columns * 2 + 16);
  }
  CHECK(plan.fragments(p.directions) ==
        int64_t{32} * p.directions * plan.cluster * plan.warps * plan.row_tiles * steps);
  CHECK(plan.step_microseconds > 0.1 && plan.step_microseconds < 1e4);
}

void test_table() {
  int plans_seen = 0, clusters_seen = 0;
  for (const char* name : {"a100", "h100", "h200", "b200", "rtx4090", "rtx5060"}) {
    const CudaDevice device = cuda_device(name);
    for (int kind = 0; kind < kCellKinds; ++kind) {
      for (const int64_t units : {1, 3, 8, 17, 32, 64, 100, 128, 205, 256, 384, 500, 512, 768, 800, 1024, 2048}) {
        for (const int64_t batch : {1, 2, 7, 16, 33, 256}) {
          for (const int directions : {1, 2}) {
            for (const bool backward : {false, true}) {
              const CudaProblem problem = problem_of(static_cast<CellKind>(kind), units, batch, directions, backward);
              const auto plans = persistent_plans(problem, device);
              double before = 0;
              for (const CudaPlan& plan : plans) {
                check_fits(plan, problem, device);
                CHECK(plan.step_microseconds >= before);
                before = plan.step_microseconds;
                clusters_seen += plan.cluster > 1;
              }
              plans_seen += static_cast<int>(plans.size());
              if (units <= 32) CHECK(!plans.empty());  // one block is enough, on every device
              const CudaPlan chosen = plan_cuda(problem, device, "auto");
              CHECK(chosen.tier == Tier::kStepwise || device.capability == 90);
              CHECK(plan_cuda(problem, device, "stepwise").tier == Tier::kStepwise);
              CHECK((plan_cuda(problem, device, "persistent").tier == Tier::kStepwise) == plans.empty());
            }
          }
        }
      }
    }
  }
  CHECK(plans_seen > 5000 && clusters_seen > 1000);
}

}  // namespace

void test_plan_cuda() {
  test_table();
  const CudaDevice h200 = cuda_device("h200"), a100 = cuda_device("a100");
  const CudaProblem lstm = problem_of(CellKind::kLstm, 256, 8, 1, false);
  const auto plan = plan_cuda(lstm, h200, "auto");
  CHECK(plan.tier == Tier::kCluster && plan.exchange == Exchange::kAsync);
  CHECK(plan_cuda(problem_of(CellKind::kLstm, 2048, 8, 1, false), h200, "persistent").tier == Tier::kStepwise);
  // what a cluster of 16 holds
  CHECK(plan_cuda(problem_of(CellKind::kLstm, 768, 8, 1, false), h200, "persistent").tier == Tier::kCluster);
  for (const bool backward : {false, true}) {
    CHECK(plan_cuda(problem_of(CellKind::kLstm, 512, 8, 1, backward), h200, "persistent").tier == Tier::kCluster);
    // no clusters: only what one block holds
    CHECK(plan_cuda(problem_of(CellKind::kGru, 512, 8, 1, backward), a100, "persistent").tier == Tier::kStepwise);
    CHECK(plan_cuda(problem_of(CellKind::kGru, 64, 8, 1, backward), a100, "persistent").tier == Tier::kBlock);
  }
  CudaProblem other = lstm;
  other.element_size = 4;
  CHECK(persistent_plans(other, h200).empty());
  other = lstm;
  other.projected = true;
  CHECK(persistent_plans(other, h200).empty());
  other = lstm;
  other.packed = true;
  CHECK(persistent_plans(other, h200).empty());
  other = lstm;
  other.batch = 0;
  CHECK(persistent_plans(other, h200).empty());

  const auto plans = persistent_plans(lstm, h200);
  for (size_t k = 0; k < plans.size(); ++k) {
    const CudaPlan one = plan_cuda(lstm, h200, "persistent:" + std::to_string(k));
    CHECK(one.cluster == plans[k].cluster && one.exchange == plans[k].exchange && one.octets == plans[k].octets);
  }
  CHECK(plan_cuda(lstm, h200, "persistent:" + std::to_string(plans.size())).tier == Tier::kStepwise);
  // both exchanges are there for every cluster, and the one with the cluster's barrier is the slower
  CHECK(std::count_if(plans.begin(), plans.end(), [](const CudaPlan& p) { return p.exchange == Exchange::kAsync; }) ==
        std::count_if(plans.begin(), plans.end(),
                      [](const CudaPlan& p) { return p.exchange == Exchange::kClusterBarrier; }));
  for (const char* wrong : {"", "fast", "persistent:", "persistent:x", "persistent:-1", "stepwise:0"}) {
    bool refused = false;
    try {
      plan_cuda(lstm, h200, wrong);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

}  // namespace fastrnn::test
