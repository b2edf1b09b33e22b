#include "core/tuned_cuda.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "core/cells/all.h"

namespace fastrnn {
namespace {

constexpr const char* kScanNames[] = {"inference", "training", "backward"};

std::vector<std::string> fields_of(const std::string& line) {
  std::vector<std::string> fields(1);
  for (const char c : line) {
    if (c == ',') {
      fields.emplace_back();
    } else {
      fields.back() += c;
    }
  }
  return fields;
}

// The fields of one row, taken from left to right.
class RowReader {
 public:
  RowReader(const std::string& line, int number)
      : number_(number), names_(fields_of(TunedPlans::kHeader)), fields_(fields_of(line)) {
    if (fields_.size() != names_.size()) {
      fail("expected " + std::to_string(names_.size()) + " fields, got " + std::to_string(fields_.size()));
    }
  }

  template <class T = int>
  T number() {
    const std::string& field = fields_[next_];
    T value = 0;
    const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
    if (error != std::errc() || end != field.data() + field.size() || value < 1) refuse("a positive number");
    ++next_;
    return value;
  }

  // The place of the field among the names.
  template <size_t n>
  int among(const char* const (&names)[n]) {
    const auto found = std::find(std::begin(names), std::end(names), std::string_view(fields_[next_]));
    if (found == std::end(names)) {
      std::string all;
      for (const char* name : names) all += (all.empty() ? "" : ", ") + std::string(name);
      refuse("one of " + all);
    }
    ++next_;
    return static_cast<int>(found - std::begin(names));
  }

  void nothing() {
    for (; next_ < fields_.size(); ++next_) {
      if (!fields_[next_].empty()) refuse("nothing for the tier stepwise");
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument("tuned plans, line " + std::to_string(number_) + ": " + what);
  }

 private:
  [[noreturn]] void refuse(const std::string& expected) const {
    fail(names_[next_] + " should be " + expected + ", got '" + fields_[next_] + "'");
  }

  int number_;
  size_t next_ = 0;
  std::vector<std::string> names_, fields_;
};

TunedChoice choice_of(RowReader& row) {
  TunedChoice choice;
  choice.tier = static_cast<Tier>(row.among(kTierNames));
  if (choice.tier == Tier::kStepwise) {
    row.nothing();
    return choice;
  }
  choice.exchange = static_cast<Exchange>(row.among(kExchangeNames));
  choice.cluster = row.number();
  const int rows = row.number();
  choice.row_tiles = row.number();
  const bool alone = choice.tier == Tier::kBlock, global = choice.tier == Tier::kGrid;
  if ((!global && alone != (choice.cluster == 1)) || alone != (choice.exchange == Exchange::kBlock) ||
      global != (choice.exchange == Exchange::kGlobal)) {
    row.fail("tier, exchange and cluster do not go together");
  }
  if (rows % kMatrixColumns != 0) row.fail("rows should be a multiple of " + std::to_string(kMatrixColumns));
  choice.batch_groups = rows / kMatrixColumns;
  return choice;
}

struct Table {
  std::mutex mutex;
  std::shared_ptr<const TunedPlans> plans = std::make_shared<TunedPlans>();
};

Table& table() {
  static Table of_process;
  return of_process;
}

}  // namespace

TunedPlans::TunedPlans(const std::string& text) {
  std::istringstream lines(text);
  std::string line;
  bool headed = false;
  for (int number = 1; std::getline(lines, line); ++number) {
    if (line.ends_with('\r')) line.pop_back();
    if (line.empty() || line.starts_with('#')) continue;
    if (!headed) {
      if (line != kHeader) {
        throw std::invalid_argument("tuned plans, line " + std::to_string(number) + ": the header should be '" +
                                    kHeader + "', got '" + line + "'");
      }
      headed = true;
      continue;
    }
    RowReader row(line, number);
    const int capability = row.number(), multiprocessors = row.number();
    const CellTraits& cell = traits(static_cast<CellKind>(row.among(kCellNames)));
    const int element_size = row.number();
    const auto scan = static_cast<Scan>(row.among(kScanNames));
    const auto batch = row.number<int64_t>(), units = row.number<int64_t>();
    const int directions = row.number();
    const Key key{capability, multiprocessors, cell.gates, cell.separate, element_size, scan, batch, units, directions};
    if (!rows_.try_emplace(key, choice_of(row)).second) row.fail("a row of the same scan stands above");
  }
}

const TunedChoice* TunedPlans::find(const CudaProblem& p, const CudaDevice& device) const {
  const Scan scan = p.backward ? Scan::kBackward : p.training ? Scan::kTraining : Scan::kInference;
  const auto found = rows_.find({device.capability, device.multiprocessors, p.gates, p.separate, p.element_size, scan,
                                 p.batch, p.units, p.directions});
  return found == rows_.end() ? nullptr : &found->second;
}

std::shared_ptr<const TunedPlans> tuned_plans() {
  const std::lock_guard<std::mutex> lock(table().mutex);
  return table().plans;
}

void set_tuned_plans(TunedPlans plans) {
  auto next = std::make_shared<const TunedPlans>(std::move(plans));
  const std::lock_guard<std::mutex> lock(table().mutex);
  table().plans.swap(next);
}

}  // namespace fastrnn
