// The plan of the persistent scans, over devices and shapes: no plan asks for more than the device has, and what a plan
// promises to hold, it holds.
#include <algorithm>
#include <initializer_list>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "check.h"
#include "core/cells/all.h"
#include "core/plan_cuda.h"
#include "core/tuned_cuda.h"

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

// A team of blocks holds all weights, all teams run at the same time, and together they have all of the batch.
void check_grid_fits(const CudaPlan& plan, const CudaProblem& p, const CudaDevice& device) {
  CHECK(plan.exchange == Exchange::kGlobal && plan.threads == 256 && plan.warps >= 1 && plan.warps <= 8);
  CHECK(plan.threads * 255 <= device.register_words && plan.shared_bytes <= device.shared_bytes);
  CHECK(plan.blocks() <= device.multiprocessors && plan.blocks() == int64_t{plan.teams} * p.directions * plan.cluster);
  CHECK(int64_t{plan.slices} * 8 * plan.batch_groups >= p.batch && plan.teams <= plan.slices);
  CHECK(int64_t{plan.units} * plan.cluster >= p.units && int64_t{plan.units} * (plan.cluster - 1) < p.units);
  CHECK(plan.depth >= (p.backward ? p.gates : 1) * p.units && plan.warps * plan.pairs * 32 >= plan.depth);
  CHECK((plan.warps - 1) * plan.pairs * 32 < plan.depth);  // no warp is without
  CHECK(plan.units * 8 * plan.batch_groups <= plan.threads);  // one element each
  const int64_t columns = int64_t{8} * plan.batch_groups, visits = divide_up(plan.slices, plan.teams);
  int64_t held = 0, rows = 0;
  if (p.element_size == 2) {
    rows = 16 * plan.row_tiles;
    CHECK(rows >= plan.units * (p.backward ? 1 : p.gates) && plan.register_steps + plan.shared_steps >= 2 * plan.pairs);
    CHECK(4 * plan.register_steps * plan.row_tiles <= 160);
    held = int64_t{plan.shared_steps} * plan.row_tiles * plan.warps * kFragmentBytes;
  } else {
    rows = int64_t{plan.units} * (p.backward ? 1 : p.gates);
    held = int64_t{plan.warps} * plan.pairs * 32 * (rows + columns + 4) * 4 -
           int64_t{plan.warps} * (plan.pairs - 1) * 32 * (columns + 4) * 4;
  }
  const int64_t sums = plan.warps * rows * (plan.batch_groups == 1 ? 8 : 24) * 4 * plan.buffers;
  CHECK(plan.shared_bytes >= held + sums + visits * (p.backward ? 1 : 2) * plan.units * columns * 4);
  CHECK(plan.ring_words(p.steps, p.directions, p.element_size) * 4 ==
        std::min<int64_t>(p.steps + 1, kRing) * p.directions * plan.slices * plan.depth * columns * p.element_size);
  CHECK(plan.step_microseconds > 0.1 && plan.step_microseconds < 1e4);
}

void check_fits(const CudaPlan& plan, const CudaProblem& p, const CudaDevice& device) {
  if (plan.tier == Tier::kGrid) return check_grid_fits(plan, p, device);
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
  // every unit has one owner, and a cluster of half the size would not do
  CHECK(plan.units % 8 == 0 && int64_t{plan.units} * plan.owners >= p.units);
  CHECK(int64_t{plan.units} * (plan.owners - 1) < p.units);
  CHECK(plan.owners <= plan.cluster && plan.owners * 2 > plan.cluster);
  // the warps of a block have all its weights, in registers or in the shared memory that the plan asks for
  const int steps = plan.register_steps + plan.shared_steps;
  CHECK(plan.depth % 32 == 0 && steps * 16 >= plan.depth);
  // what a product reads of its operand, group by group and then in pairs, is within the operand
  int read = 0;
  for (int first = 0; first < plan.register_steps && first * 16 < plan.depth; first += kStepsAtOnce) {
    read = std::min(first + kStepsAtOnce, (plan.register_steps + 1) / 2 * 2);
  }
  CHECK(read * 16 <= plan.depth);
  CHECK(plan.register_steps > 0 && 4 * plan.register_steps * plan.row_tiles <= 160);
  const int64_t held = int64_t{plan.shared_steps} * plan.row_tiles * plan.warps * kFragmentBytes;
  const int64_t columns = int64_t{8} * plan.batch_groups;
  if (p.backward) {
    CHECK(plan.depth >= p.gates * plan.units && int64_t{plan.warps} * plan.row_tiles * 16 >= p.units);
    CHECK(int64_t{plan.units} * columns <= int64_t{plan.threads} * kElementsOfThread);
    const int64_t inboxes = 2 * int64_t{plan.owners} * plan.units * columns * 4;
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
            for (const int half : {0, 1, 2, 3}) {
              const bool backward = half % 2 == 1;
              CudaProblem problem = problem_of(static_cast<CellKind>(kind), units, batch, directions, backward);
              problem.element_size = half < 2 ? 2 : 4;
              const auto plans = persistent_plans(problem, device);
              double before = 0;
              std::set<std::tuple<Exchange, int, int, int>> choices;
              for (const CudaPlan& plan : plans) {
                CHECK(choices.emplace(plan.exchange, plan.cluster, plan.batch_groups, plan.row_tiles).second);
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

bool same(const CudaPlan& a, const CudaPlan& b) {
  return a.tier == b.tier && a.exchange == b.exchange && a.cluster == b.cluster && a.batch_groups == b.batch_groups &&
         a.row_tiles == b.row_tiles;
}

std::string table_of(const std::string& rows) { return std::string(TunedPlans::kHeader) + "\n" + rows; }

// A row of `scan` of an LSTM of 256 units and a batch of 8 on an H200, that chooses this plan.
std::string row_of(const std::string& scan, const CudaPlan& plan) {
  std::string row = "90,132,lstm,2," + scan + ",8,256,1," + kTierNames[static_cast<int>(plan.tier)] + ",";
  row += std::string(kExchangeNames[static_cast<int>(plan.exchange)]) + "," + std::to_string(plan.cluster) + ",";
  return row + std::to_string(8 * plan.batch_groups) + "," + std::to_string(plan.row_tiles) + "\n";
}

void test_tuned_rows() {
  const CudaDevice h200 = cuda_device("h200");
  for (const char* scan : {"inference", "training", "backward"}) {
    CudaProblem lstm = problem_of(CellKind::kLstm, 256, 8, 1, scan == std::string("backward"));
    lstm.training = scan != std::string("inference");
    const auto plans = persistent_plans(lstm, h200);
    CHECK(plans.size() > 4);
    const CudaPlan best = plan_cuda(lstm, h200, "auto");
    CHECK(same(best, plans[0]));
    for (const CudaPlan& plan : plans) {
      const TunedPlans tuned(table_of(row_of(scan, plan)));
      CHECK(tuned.size() == 1);
      const CudaPlan chosen = plan_cuda(lstm, h200, "auto", &tuned);
      CHECK(same(chosen, plan) && chosen.shared_bytes == plan.shared_bytes && chosen.threads == plan.threads);
      // a wish that names a plan is none that a table fulfils
      CHECK(same(plan_cuda(lstm, h200, "persistent", &tuned), plans[0]));
      CHECK(same(plan_cuda(lstm, h200, "persistent:1", &tuned), plans[1]));
      CHECK(plan_cuda(lstm, h200, "stepwise", &tuned).tier == Tier::kStepwise);
    }

    // whatever the row does not speak of goes by the model
    const TunedPlans last(table_of(row_of(scan, plans.back())));
    const auto by_model = [&](const CudaProblem& p, const CudaDevice& device) {
      const CudaPlan with = plan_cuda(p, device, "auto", &last), without = plan_cuda(p, device, "auto");
      CHECK(same(with, without) && !same(with, plans.back()));
    };
    const auto changed = [&](auto change) {
      CudaProblem other = lstm;
      change(other);
      by_model(other, h200);
    };
    changed([](CudaProblem& p) { p.batch = 9; });
    changed([](CudaProblem& p) { p.units = 255; });
    changed([](CudaProblem& p) { p.directions = 2; });
    changed([](CudaProblem& p) { p.element_size = 4; });
    changed([](CudaProblem& p) { p.steps = 1; });
    changed([](CudaProblem& p) {
      p.training = !p.training || p.backward;
      p.backward = !p.backward;
    });
    CudaProblem gru = problem_of(CellKind::kGru, 256, 8, 1, lstm.backward);
    gru.training = lstm.training;
    by_model(gru, h200);
    CudaDevice other = h200;
    other.multiprocessors = 114;
    by_model(lstm, other);
    other = h200;
    other.capability = 100;
    by_model(lstm, other);
    CHECK(same(plan_cuda({.gates = 4,
                          .saved = lstm.saved,
                          .steps = 7,
                          .batch = 8,
                          .units = 256,
                          .training = lstm.training,
                          .backward = lstm.backward},
                         h200, "auto", &last),
               plans.back()));  // any number of steps

    // stepwise is a choice too
    const std::string key = "90,132,lstm,2," + std::string(scan) + ",8,256,1,";
    const TunedPlans stepwise(table_of(key + "stepwise,,,,\n"));
    CHECK(best.tier != Tier::kStepwise && plan_cuda(lstm, h200, "auto", &stepwise).tier == Tier::kStepwise);
    // and so is a plan on a capability that the model alone does not trust
    CudaDevice b200 = cuda_device("b200");
    const std::string elsewhere = row_of(scan, plans[1]).substr(6);
    const TunedPlans of_b200(table_of("100,148" + elsewhere));
    CHECK(plan_cuda(lstm, b200, "auto").tier == Tier::kStepwise);
    CHECK(same(plan_cuda(lstm, b200, "auto", &of_b200), plans[1]));

    // a row that no alternative has any more chooses nothing
    for (const char* stale : {"cluster,async,32,8,2", "block,block,1,8,2", "cluster,async,16,24,2",
                              "cluster,async,16,8,3", "cluster,async,2,8,16"}) {
      const TunedPlans tuned(table_of(key + stale + "\n"));
      CHECK(tuned.find(lstm, h200) != nullptr);
      CHECK(same(plan_cuda(lstm, h200, "auto", &tuned), best));
    }
    CudaDevice small = h200;  // the same by its row, but what was chosen does not fit any more
    small.shared_bytes = plans.front().shared_bytes - 1;
    const TunedPlans first(table_of(row_of(scan, plans.front())));
    const CudaPlan fits = plan_cuda(lstm, small, "auto", &first);
    CHECK(!same(fits, plans.front()) && fits.shared_bytes <= small.shared_bytes);
  }
}

void test_tuned_text() {
  CHECK(TunedPlans().size() == 0 && TunedPlans("").size() == 0 && TunedPlans(table_of("")).size() == 0);
  const std::string one = "90,132,gru,2,training,16,512,1,cluster,async,8,8,6\n";
  const std::string two = "90,132,rnn_relu,2,backward,16,512,2,stepwise,,,,\r\n";
  const TunedPlans tuned("# measured\n\n" + table_of(one + "# more\n" + two));
  CHECK(tuned.size() == 2);
  // the plan sees gates only, which the two RNNs have in common
  const TunedChoice* found = tuned.find(problem_of(CellKind::kRnnTanh, 512, 16, 2, true), cuda_device("h100"));
  CHECK(found != nullptr && found->tier == Tier::kStepwise);
  found = tuned.find(problem_of(CellKind::kGru, 512, 16, 1, false), cuda_device("h200"));
  CHECK(found != nullptr && found->tier == Tier::kCluster && found->exchange == Exchange::kAsync);
  CHECK(found != nullptr && found->cluster == 8 && found->batch_groups == 1 && found->row_tiles == 6);

  const auto message = [](const std::string& text) -> std::string {
    try {
      TunedPlans refused(text);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  const auto refused = [&](const std::string& row, const std::string& why) {
    const std::string found_why = message(table_of(one + row + "\n"));
    CHECK(found_why.find("line 3") != std::string::npos && found_why.find(why) != std::string::npos);
  };
  CHECK(message(one).find("line 1: the header should be 'capability,") != std::string::npos);
  refused("90,132", "expected 13 fields, got 2");
  refused("90,132,gru,2,training,16,512,1,cluster,async,8,8,6,", "expected 13 fields, got 14");
  refused("ninety,132,gru,2,training,8,512,1,cluster,async,8,8,6", "capability should be a positive number");
  refused("90,132,lstm_proj,2,training,8,512,1,cluster,async,8,8,6", "cell should be one of rnn_tanh");
  refused("90,132,gru,2,forward,8,512,1,cluster,async,8,8,6", "scan should be one of inference");
  refused("90,132,gru,2,training,0,512,1,cluster,async,8,8,6", "batch should be a positive number, got '0'");
  refused("90,132,gru,2,training,8,512 ,1,cluster,async,8,8,6", "hidden_size should be a positive number");
  refused("90,132,gru,2,training,8,99999999999999999999,1,cluster,async,8,8,6", "hidden_size should be");
  refused("90,132,gru,2,training,8,512,-1,cluster,async,8,8,6", "directions should be a positive number");
  refused("90,132,gru,2,training,8,512,1,team,global,8,8,6", "tier should be one of stepwise, block, cluster, grid");
  refused("90,132,gru,2,training,8,512,1,grid,async,8,8,6", "tier, exchange and cluster do not go together");
  refused("90,132,gru,2,training,8,512,1,cluster,global,8,8,6", "tier, exchange and cluster do not go together");
  refused("90,132,gru,2,training,8,512,1,cluster,flags,8,8,6", "exchange should be one of block");
  refused("90,132,gru,2,training,8,512,1,cluster,async,8,8,", "row_tiles should be a positive number, got ''");
  refused("90,132,gru,2,training,8,512,1,cluster,async,8,12,6", "rows should be a multiple of 8");
  refused("90,132,gru,2,training,8,512,1,block,async,1,8,6", "do not go together");
  refused("90,132,gru,2,training,8,512,1,cluster,async,1,8,6", "do not go together");
  refused("90,132,gru,2,training,8,512,1,stepwise,block,1,8,6", "exchange should be nothing for the tier stepwise");
  refused(one.substr(0, one.size() - 1), "a row of the same scan stands above");

  set_tuned_plans(tuned);
  const auto before = tuned_plans();
  CHECK(before->size() == 2);
  set_tuned_plans({});
  CHECK(tuned_plans()->size() == 0 && before->size() == 2);
}

}  // namespace

void test_plan_cuda() {
  test_table();
  test_tuned_rows();
  test_tuned_text();
  const CudaDevice h200 = cuda_device("h200"), a100 = cuda_device("a100");
  const CudaProblem lstm = problem_of(CellKind::kLstm, 256, 8, 1, false);
  const auto plan = plan_cuda(lstm, h200, "auto");
  CHECK(plan.tier == Tier::kCluster && plan.exchange == Exchange::kAsync);
  CHECK(plan_cuda(problem_of(CellKind::kLstm, 2048, 8, 1, false), h200, "persistent").tier == Tier::kGrid);
  CHECK(plan_cuda(problem_of(CellKind::kLstm, 4096, 8, 1, false), h200, "persistent").tier == Tier::kStepwise);
  const auto has = [](Tier tier, const CudaProblem& problem, const CudaDevice& device) {
    const auto plans = persistent_plans(problem, device);
    return std::any_of(plans.begin(), plans.end(), [&](const CudaPlan& p) { return p.tier == tier; });
  };
  for (const CellKind kind : {CellKind::kLstm, CellKind::kGru}) {
    for (const bool backward : {false, true}) {
      const int most = backward ? 512 : 768;  // what a cluster of 16 holds
      for (int units = 8; units <= 2048; ++units) {
        const CudaProblem problem = problem_of(kind, units, 8, 1, backward);
        CHECK(units > 1056 || plan_cuda(problem, h200, "persistent").tier != Tier::kStepwise);
        CHECK(units < 64 || has(Tier::kCluster, problem, h200) == (units <= most));
      }
      // no clusters: one block, or the whole GPU
      CHECK(plan_cuda(problem_of(kind, 512, 8, 1, backward), a100, "persistent").tier == Tier::kGrid);
      CHECK(has(Tier::kBlock, problem_of(kind, 64, 8, 1, backward), a100));
      CHECK(!has(Tier::kCluster, problem_of(kind, 64, 8, 1, backward), a100));
    }
  }
  CudaProblem other = lstm;
  other.element_size = 4;
  for (const CudaPlan& one : persistent_plans(other, h200)) CHECK(one.tier == Tier::kGrid);
  CHECK(!persistent_plans(other, h200).empty());
  other.element_size = 8;
  CHECK(persistent_plans(other, h200).empty());
  other = lstm;
  other.projected = true;
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
