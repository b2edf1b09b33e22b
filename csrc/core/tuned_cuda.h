// What was measured on GPUs: for a scan on a device, the plan that was the fastest there. The plan (core/plan_cuda.h)
// takes such a row before its model. docs/cuda.md has the format, and how rows are made.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "core/plan_cuda.h"

namespace fastrnn {

// One of the alternatives of a scan, by what tells it from the others: never by its place among them, which changes with
// the model. The row tiles of a warp tell its octets, too.
struct TunedChoice {
  Tier tier = Tier::kStepwise;  // which has none of the following
  Exchange exchange = Exchange::kBlock;
  int cluster = 1;
  int batch_groups = 1;
  int row_tiles = 0;

  bool is(const CudaPlan& plan) const {
    return plan.tier == tier && plan.exchange == exchange && plan.cluster == cluster &&
           plan.batch_groups == batch_groups && plan.row_tiles == row_tiles;
  }
};

class TunedPlans {
 public:
  // The first line of a table.
  static constexpr const char* kHeader =
      "capability,multiprocessors,cell,element_size,scan,batch,hidden_size,directions,"
      "tier,exchange,cluster,rows,row_tiles";

  TunedPlans() = default;
  // From CSV. Lines that are empty or begin with '#' are skipped; anything else that is no row throws
  // std::invalid_argument, which names the line.
  explicit TunedPlans(const std::string& text);

  size_t size() const { return rows_.size(); }
  // The row of exactly this scan (any number of steps) on exactly this device; null: none.
  const TunedChoice* find(const CudaProblem& problem, const CudaDevice& device) const;

 private:
  enum class Scan { kInference, kTraining, kBackward };
  // capability, multiprocessors, gates, separate, element size, scan, batch, units, directions
  using Key = std::tuple<int, int, int, int, int, Scan, int64_t, int64_t, int>;

  std::map<Key, TunedChoice> rows_;
};

// The table of this process, empty at first. A call keeps the one that it began with.
std::shared_ptr<const TunedPlans> tuned_plans();
void set_tuned_plans(TunedPlans plans);

}  // namespace fastrnn
