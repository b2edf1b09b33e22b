#include "core/plan_cuda.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "core/tuned_cuda.h"

namespace fastrnn {
namespace {

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Clocks and rates of one multiprocessor that the model counts with. Those of products and exchanges are from documentation
// and published microbenchmarks; a cell's, the whole GPU's and a launch's were fitted to measurements on an H200
// (docs/cuda.md).
constexpr double kSharedBytesPerClock = 128;
constexpr double kMatrixClocks = 6.5;  // of one mma.m16n8k16 on one of four tensor cores
constexpr double kSpecialPerClock = 16;  // exp2 and reciprocal
constexpr double kRemoteBytesPerClock = 20;  // arriving from other blocks of a cluster
constexpr double kRemoteLatency = 200;  // of a store to another block, clocks
constexpr double kBlockBarrier = 40;
constexpr double kProductLatency = 110;  // first operand read to last dependent sum
constexpr double kForwardCell = 600, kForwardElement = 400;  // a warp's instructions around its cells, and for each
constexpr double kBackwardCell = 2200, kBackwardElement = 1000;  // element of a lane
constexpr double kLaunchMicroseconds = 5;  // of a launch in a loop, its gap included
constexpr double kFloatTeraflops = 45;  // a GEMM of float32, not of TF32
// Of the whole GPU, forward and backward, in microseconds: a visit of a slice of the batch, what its exchange takes longer
// where nothing else is to do, and a MB of words that all blocks read at the same time.
constexpr double kGridVisit[] = {1.25, 2.4}, kGridLatency[] = {0.45, 0.5}, kGridMegabyte[] = {0.55, 0.3};
constexpr double kFloatProducts = 90;  // multiplications and additions a clock
constexpr double kSpecialsOfCell = 2.5;  // exp2 and reciprocals for each gate of an element

// The largest number of clusters at once. A cluster lies in one group of multiprocessors, and groups are not even: what
// was reported of H100s (8 blocks: 15 clusters, 4: 31, 2: 66, of 132; 16: 7, of which 6 run) scaled to the device. Before a launch the
// device itself is asked.
int64_t clusters_at_once(int cluster, const CudaDevice& device) {
  const double of_132 = cluster == 1 ? 132 : cluster == 2 ? 66 : cluster == 4 ? 31 : cluster == 8 ? 15 : 6;
  return static_cast<int64_t>(of_132 * device.multiprocessors / 132);
}

// Bytes of shared memory of a block: the operand of its products, twice; the weights; two mbarriers. Backward also two
// inboxes, and what its units carry from step to step.
int64_t shared_bytes_of(const CudaPlan& plan, const CudaProblem& p) {
  const int64_t columns = kMatrixColumns;
  const int64_t weights = int64_t{plan.warps} * plan.row_tiles * plan.shared_steps * kFragmentBytes;
  const int64_t operand = plan.depth * columns * p.element_size;
  int64_t exchanged = 2 * operand;
  if (p.backward) exchanged += (2 * int64_t{plan.owners} + 1) * plan.units * columns * 4;
  return exchanged + weights + 16;
}

double predicted_step(const CudaPlan& plan, const CudaProblem& p, const CudaDevice& device) {
  const double columns = kMatrixColumns, owners = plan.owners;
  const double steps = plan.register_steps + plan.shared_steps, used = plan.depth / 16.0;
  const double turns = std::ceil(plan.warps / 4.0);
  const double matrix = turns * used * plan.row_tiles * kMatrixClocks;
  const double weights = plan.warps * plan.row_tiles * std::max(0.0, used - plan.register_steps) * kFragmentBytes;
  const double operand = plan.warps * std::min(used, steps) * 16 * columns * p.element_size;
  const double product = std::max(matrix, (weights + operand) / kSharedBytesPerClock) + kProductLatency;
  const double elements = p.backward ? std::ceil(plan.units * columns / plan.threads) : 2.0 * plan.octets;
  const double around = p.backward ? kBackwardCell + kBackwardElement * elements
                                   : kForwardCell + kForwardElement * elements;
  const double cell = plan.units * columns * kSpecialsOfCell * p.gates / kSpecialPerClock + around;
  double exchange = kBlockBarrier;
  if (plan.cluster > 1) {
    const double arriving = p.backward ? (owners - 1) * plan.units * columns * 4
                                       : (owners - 1) / owners * static_cast<double>(p.units) * columns * 2;
    exchange = arriving / kRemoteBytesPerClock + kRemoteLatency;
    if (p.backward) exchange += kBlockBarrier;
  }
  const double alone = (product + cell + exchange) / (device.clock_ghz * 1e3);
  // what a step reads and writes of the device's memory, all running clusters together
  const double running = static_cast<double>(std::min(plan.clusters, plan.at_once));
  double bytes = 4.0 * p.gates + p.element_size;
  if (p.training || p.backward) bytes += 4.0 * p.saved;
  if (p.backward) bytes += p.element_size * p.gates;
  const double memory = running * columns * static_cast<double>(p.units) * bytes / (device.memory_gbps * 1e3);
  const double rounds = std::ceil(static_cast<double>(plan.clusters) / static_cast<double>(plan.at_once));
  return rounds * std::max(alone, memory);
}

// A plan for that tile and cluster, or one of Tier::kStepwise if it does not fit.
CudaPlan try_plan(const CudaProblem& p, const CudaDevice& device, int cluster, int octets, int row_tiles) {
  CudaPlan plan;
  plan.cluster = cluster;
  plan.exchange = cluster == 1 ? Exchange::kBlock : Exchange::kAsync;
  plan.octets = octets;
  plan.row_tiles = row_tiles;
  const int64_t all_octets = divide_up(p.units, 8);
  int64_t depth;
  if (p.backward) {  // all rows of W^T over the warps; the units of a block are its columns
    const int64_t warps = divide_up(p.units, int64_t{kMatrixRows} * row_tiles);
    const int64_t units = 8 * divide_up(all_octets, cluster);
    const int64_t elements = int64_t{kElementsOfThread} * kPersistentWarps * 32;
    if (warps > kPersistentWarps || units * kMatrixColumns > elements) return {};
    plan.warps = static_cast<int>(warps);
    plan.threads = kPersistentWarps * 32;
    plan.units = static_cast<int>(units);
    depth = p.gates * units;
  } else {
    const int64_t warps = divide_up(all_octets, int64_t{cluster} * octets);
    if (warps > kPersistentWarps) return {};
    plan.warps = static_cast<int>(warps);
    plan.threads = plan.warps * 32;
    plan.units = static_cast<int>(warps) * octets * 8;
    depth = p.units;
  }
  plan.owners = static_cast<int>(divide_up(p.units, plan.units));
  if (cluster > 1 && plan.owners <= cluster / 2) return {};  // a smaller cluster does
  plan.register_steps = p.backward ? backward_register_steps(row_tiles)
                                   : forward_register_steps(p.gates, p.separate, p.saved, octets);
  const int steps = product_steps(depth, plan.register_steps);
  plan.depth = 16 * steps;
  plan.shared_steps = std::max(0, steps - plan.register_steps);
  plan.shared_bytes = shared_bytes_of(plan, p);
  plan.clusters = p.directions * divide_up(p.batch, kMatrixColumns);
  plan.at_once = clusters_at_once(cluster, device);
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  const int64_t registers = int64_t{255} * plan.threads;
  if (plan.shared_bytes > device.shared_bytes || plan.at_once < 1 || registers > device.register_words) return {};
  if (plan.blocks() > kMostBlocks || cluster > device.max_cluster) return {};
  plan.tier = cluster == 1 ? Tier::kBlock : Tier::kCluster;
  plan.step_microseconds = predicted_step(plan, p, device);
  return plan;
}

// The same for a team of blocks with `octets` groups of 8 units each, which takes 8 * groups rows of the batch at a time.
CudaPlan try_grid(const CudaProblem& p, const CudaDevice& device, int octets, int groups) {
  const bool is_16_bit = p.element_size == 2;
  const int64_t all_octets = divide_up(p.units, 8), columns = int64_t{kMatrixColumns} * groups;
  const int64_t cluster = divide_up(all_octets, octets);
  if (octets > all_octets || cluster * p.directions > device.multiprocessors) return {};
  CudaPlan plan;
  plan.exchange = Exchange::kGlobal;
  plan.octets = octets;
  plan.batch_groups = groups;
  plan.cluster = plan.owners = static_cast<int>(cluster);
  plan.threads = kPersistentWarps * 32;
  plan.units = 8 * octets;
  const int64_t rows_of_lane = grid_rows_of_lane(p.gates, octets, p.backward);
  plan.row_tiles = is_16_bit ? grid_row_tiles(p.gates, octets, p.backward) : static_cast<int>(rows_of_lane);
  plan.depth = static_cast<int>((p.backward ? p.gates : 1) * all_octets * 8);
  const int64_t pairs = divide_up(plan.depth, 32);
  plan.pairs = static_cast<int>(divide_up(pairs, kPersistentWarps));
  plan.warps = static_cast<int>(divide_up(pairs, plan.pairs));
  const int in_registers = is_16_bit ? grid_register_pairs(plan.row_tiles, groups) : 0;
  plan.register_steps = 2 * in_registers;
  plan.shared_steps = 2 * std::max(0, plan.pairs - in_registers);
  plan.slices = static_cast<int>(divide_up(p.batch, columns));
  plan.teams = static_cast<int>(std::min<int64_t>(plan.slices, device.multiprocessors / (cluster * p.directions)));
  plan.clusters = plan.at_once = int64_t{plan.teams} * p.directions;
  const int64_t visits = divide_up(plan.slices, plan.teams);

  constexpr int64_t kFloat = 4, kStageColumns = 32;
  const int64_t rows = is_16_bit ? int64_t{kMatrixRows} * plan.row_tiles : 8 * rows_of_lane;
  const int64_t of_weights = is_16_bit
                                 ? int64_t{plan.shared_steps} * plan.row_tiles * kFragmentBytes
                                 : plan.pairs * kStageColumns * rows * kFloat + kStageColumns * (columns + 4) * kFloat;
  const int64_t states = visits * (p.backward ? 1 : 2) * plan.units * columns * kFloat;
  const int64_t sums = plan.warps * rows * grid_sum_stride(groups) * kFloat;
  const int64_t fixed = plan.warps * of_weights + states;
  plan.buffers = fixed + 2 * sums <= device.shared_bytes ? 2 : 1;
  plan.shared_bytes = fixed + plan.buffers * sums;
  if (plan.shared_bytes > device.shared_bytes || int64_t{255} * plan.threads > device.register_words) return {};
  plan.tier = Tier::kGrid;

  const double words = static_cast<double>(plan.depth * columns * p.element_size * plan.blocks()) * 1e-6;
  const double products = static_cast<double>(rows * plan.depth * columns);
  const double product = is_16_bit ? 0.0 : products / kFloatProducts / (device.clock_ghz * 1e3);
  const double visit = kGridVisit[p.backward] + kGridMegabyte[p.backward] * words + product;
  plan.step_microseconds = static_cast<double>(visits) * visit + (visits == 1 ? kGridLatency[p.backward] : 0.0);
  return plan;
}

}  // namespace

CudaDevice cuda_device(const std::string& name) {
  if (name == "a100") return {80, 108, 163 << 10, 65536, 1, 1.41, 2039};
  if (name == "h100") return {90, 132, 227 << 10, 65536, 16, 1.75, 3350};
  if (name == "h200") return {90, 132, 227 << 10, 65536, 16, 1.75, 4800};
  if (name == "b200") return {100, 148, 227 << 10, 65536, 16, 1.85, 8000};
  if (name == "rtx4090") return {89, 128, 99 << 10, 65536, 1, 2.5, 1008};
  if (name == "rtx5060") return {120, 30, 99 << 10, 65536, 8, 2.5, 448};
  throw std::invalid_argument("unknown device '" + name + "': a100, h100, h200, b200, rtx4090 or rtx5060");
}

std::vector<CudaPlan> persistent_plans(const CudaProblem& p, const CudaDevice& device) {
  std::vector<CudaPlan> plans;
  const bool is_16_bit = p.element_size == 2;
  if ((!is_16_bit && p.element_size != 4) || p.projected || p.batch < 1 || p.units < 1 || p.steps < 1) return plans;
  if (device.capability < 80) return plans;
  const auto keep = [&](const CudaPlan& plan) {
    if (plan.tier != Tier::kStepwise) plans.push_back(plan);
  };
  for (int octets = 1; octets <= (is_16_bit ? kGridOctets : grid_octets_32(p.gates)); ++octets) {
    for (int groups = 1; groups <= 2; ++groups) keep(try_grid(p, device, octets, groups));
  }
  for (int cluster = 1; cluster <= (is_16_bit ? kLargestCluster : 0); cluster *= 2) {
    if (p.backward) {
      for (int tiles = 2; tiles <= most_backward_tiles(p.gates); tiles += 2) {
        keep(try_plan(p, device, cluster, 0, tiles));
      }
    } else {
      for (const int octets : {kNarrowOctets, widest_octets(p.gates)}) {
        keep(try_plan(p, device, cluster, octets, row_tiles_of(p.gates, octets)));
      }
    }
  }
  std::stable_sort(plans.begin(), plans.end(),
                   [](const CudaPlan& a, const CudaPlan& b) { return a.step_microseconds < b.step_microseconds; });
  return plans;
}

double stepwise_microseconds(const CudaProblem& p, const CudaDevice& device) {
  const double bytes = static_cast<double>(p.directions) *
                       (static_cast<double>(p.gates * p.units * p.units * p.element_size) +
                        static_cast<double>(p.batch * p.units) * 4 * (2 * p.gates + p.saved));
  const double products = static_cast<double>(p.directions * p.gates * p.batch) *
                          static_cast<double>(p.units * p.units);
  const double arithmetic = p.element_size == 4 ? 2 * products / (kFloatTeraflops * 1e6) : 0.0;
  return 2 * kLaunchMicroseconds + bytes / (device.memory_gbps * 1e3) + arithmetic;
}

namespace {

// `plans` are the alternatives, the fastest by the model first.
CudaPlan automatic_plan(const CudaProblem& p, const CudaDevice& device, const std::vector<CudaPlan>& plans,
                        const TunedPlans* tuned) {
  constexpr int kCapability = 90;
  if (p.steps <= 1 || plans.empty()) return {};
  if (const TunedChoice* choice = tuned == nullptr ? nullptr : tuned->find(p, device)) {
    if (choice->tier == Tier::kStepwise) return {};
    const auto same = [&](const CudaPlan& plan) { return choice->is(plan); };
    const auto found = std::find_if(plans.begin(), plans.end(), same);
    // a row that an older model left behind chooses nothing: only what the model lists is known to fit
    if (found != plans.end()) return *found;
  }
  const bool use = device.capability == kCapability && plans[0].step_microseconds < stepwise_microseconds(p, device);
  return use ? plans[0] : CudaPlan{};
}

}  // namespace

CudaPlan plan_cuda(const CudaProblem& p, const CudaDevice& device, const std::string& wish, const TunedPlans* tuned) {
  if (wish == "stepwise") return {};
  const std::vector<CudaPlan> plans = persistent_plans(p, device);
  if (wish == "auto") return automatic_plan(p, device, plans, tuned);
  const std::string prefix = "persistent";
  if (wish == prefix) return plans.empty() ? CudaPlan{} : plans[0];
  const bool digits = wish.size() > prefix.size() + 1 && wish.size() < prefix.size() + 8 &&
                      wish.find_first_not_of("0123456789", prefix.size() + 1) == std::string::npos;
  if (!wish.starts_with(prefix + ":") || !digits) {
    throw std::invalid_argument("FASTRNN_CUDA_PLAN should be auto, stepwise, persistent or persistent:K, got '" + wish +
                                "'");
  }
  const size_t index = std::stoul(wish.substr(prefix.size() + 1));
  return index < plans.size() ? plans[index] : CudaPlan{};
}

}  // namespace fastrnn
