// The choice of algorithm on a GPU: how a persistent scan lies on it, or that none fits. A pure function of the cell, the
// shape and the device's properties, testable without a GPU. docs/cuda.md explains the tiers and the model.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastrnn {

struct CudaDevice {
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 0;  //
  int64_t shared_bytes = 0;  // that one block can ask for
  int64_t register_words = 65536;  // of a multiprocessor
  int max_cluster = 1;  // blocks of the largest cluster, non-portable sizes included; 1: no clusters
  double clock_ghz = 1.0;  //
  double memory_gbps = 1000;  // GB/s
};

// Known devices by name, for tables and tests: "a100", "h100", "h200", "b200", "rtx4090", "rtx5060".
// Throws std::invalid_argument for any other name.
CudaDevice cuda_device(const std::string& name);

// One direction's scan, forward or backward; the directions of a layer have the same.
struct CudaProblem {
  int gates = 1;  // G
  int separate = 0;  // S
  int saved = 1;  // columns of the reserve, in units of H
  int64_t steps = 1;  // T
  int64_t batch = 1;  // N
  int64_t units = 1;  // H
  int directions = 1;  // D
  int element_size = 2;  // bytes
  bool projected = false;
  bool training = false;  // forward: the reserve is stored
  bool backward = false;
};

// How blocks of one cluster exchange what all of them need for the next step.
enum class Exchange {
  kBlock,  // one block: its own barrier
  kAsync,  // remote stores that count themselves in on an mbarrier of the receiver
  kGlobal,  // words in global memory that say by themselves that they have arrived
};
inline constexpr const char* kExchangeNames[] = {"block", "async", "global"};

// Who holds the recurrent weights for all T: a block, a cluster of blocks, or a team of blocks anywhere on the GPU, all teams
// running at the same time.
enum class Tier { kStepwise, kBlock, kCluster, kGrid };
inline constexpr const char* kTierNames[] = {"stepwise", "block", "cluster", "grid"};

struct CudaPlan {
  Tier tier = Tier::kStepwise;
  Exchange exchange = Exchange::kBlock;
  int cluster = 1;  // blocks; of a team, for Tier::kGrid
  int owners = 1;  // of these, from the first on, that have units; the others only come to the cluster's barriers
  int threads = 0;  // of a block
  int warps = 0;  // of a block, that have products
  int row_tiles = 0;  // of 16 rows of weights, a warp's
  int octets = 0;  // groups of 8 units, a warp's (forward)
  int batch_groups = 1;  // groups of 8 rows of the batch, a cluster's
  int units = 0;  // of a block
  int depth = 0;  // of a block's products: columns of weights, zeros included
  int register_steps = 0;  // 16 columns each, of a warp's weights that registers hold
  int shared_steps = 0;  // the rest
  int64_t shared_bytes = 0;  // of a block
  int pairs = 0;  // kGrid: of k-steps, a warp's
  int buffers = 1;  // kGrid: of sums
  int teams = 0;  // kGrid: of a direction
  int slices = 0;  // kGrid: of the batch, which the teams share
  int64_t clusters = 0;  // of the launch: batch slices times directions; teams, for Tier::kGrid
  int64_t at_once = 0;  // clusters that the device runs at the same time, by its numbers alone
  double step_microseconds = 0;  // predicted, of one step of all clusters

  int64_t blocks() const { return clusters * cluster; }
  // uint4 fragments of the packed weights of all directions
  int64_t fragments(int directions) const {
    return int64_t{32} * directions * cluster * warps * row_tiles * (register_steps + shared_steps);
  }
  // kGrid: words of 4 bytes through which all directions exchange their steps
  int64_t ring_words(int64_t steps, int directions, int element_size) const;
  // of one slice's ring: the steps that have a place, and the one before the first
  static int64_t ring_places(int64_t steps);
};

// --- What kernels and plan must agree on ------------------------------------------------------------------------------

constexpr int kPersistentWarps = 8;  // at most: 255 registers a thread, one block a multiprocessor
constexpr int kLargestCluster = 16;  // blocks
// Backward: units times rows of the batch of a block, over its threads.
constexpr int kElementsOfThread = 2;
constexpr int kStepsAtOnce = 4;  // k-steps of 16 between two tests for the end of a product, weights in registers
constexpr int kMatrixRows = 16;  // of an mma
constexpr int kMatrixColumns = 8;  // of an mma: rows of the batch
constexpr int kFragmentBytes = 512;  // of weights: 16 rows, 16 columns

// Row tiles that hold all gates of `octets` groups of 8 units: a tile has two halves of 8 rows, one gate of a group each.
constexpr int row_tiles_of(int gates, int octets) { return (gates * octets + 1) / 2; }
// Groups of a warp, forward. One, though an odd number of gates then leaves half a tile empty: a step is as long as the
// cells of a lane. Or as many as fill whole tiles, and twice as many where these are 4 at most: fewer warps hold more units.
constexpr int kNarrowOctets = 1;
constexpr int widest_octets(int gates) {
  const int whole = gates % 2 == 0 ? 1 : 2;
  return row_tiles_of(gates, 2 * whole) <= 4 ? 2 * whole : whole;
}
// An mma waits for the one before it that has the same sums: few tiles get two sets.
constexpr int chains_of(int row_tiles, int batch_groups) { return row_tiles * batch_groups < 4 ? 2 : 1; }
// Backward, 2 or 4 row tiles a warp, 8 warps: H = 512. With 6 an LSTM's thread has no register left, and the whole GPU takes
// such layers as fast.
constexpr int most_backward_tiles(int gates) { return gates > 1 ? 4 : 8; }
// k-steps whose fragments stay in registers: what is left of 255 by sums, operands, addresses and the cells of a lane.
// nvcc says whether it is so (tests/test_cuda_compile.py): a spilled register is an error there.
constexpr int register_steps_of(int row_tiles, int of_cells) {
  constexpr int kAddresses = 72, kOperands = 8;
  const int sums = 4 * chains_of(row_tiles, 1) * row_tiles;
  return (255 - kAddresses - kOperands - sums - of_cells) / (4 * row_tiles);
}
// k-steps of a product of `columns` numbers, zeros included: reads come in pairs, and where registers hold the weights
// kStepsAtOnce together.
constexpr int product_steps(int64_t columns, int register_steps) {
  const int pairs = static_cast<int>((columns + 31) / 32) * 2;
  return pairs >= register_steps ? pairs : (pairs + kStepsAtOnce - 1) / kStepsAtOnce * kStepsAtOnce;
}
constexpr int forward_register_steps(int gates, int separate, int saved, int octets) {
  constexpr int kFewest = 18, kLookAhead = 2;  // of the addresses that any cell has; for what comes to L2
  const int numbers = octets * (2 * (saved + 4) + gates + separate);
  const int of_cells = (numbers > kFewest ? numbers : kFewest) + kLookAhead;
  // an even number: with one more, an LSTM of 16 units a warp spills
  return register_steps_of(row_tiles_of(gates, octets), of_cells) / 2 * 2;
}
// Cells and products take turns: while sums are in registers, of a cell only its results are. Few tiles need more for
// addresses; more than 4 have RNNs alone, whose cells have one gate.
constexpr int backward_register_steps(int row_tiles) {
  return register_steps_of(row_tiles, row_tiles == 2 ? 40 : row_tiles == 4 ? 32 : 24);
}

// --- The same for Tier::kGrid -----------------------------------------------------------------------------------------

constexpr int kRing = 64;  // steps whose words have a place of their own; four times kFence (grid.cuh)
constexpr int kGridOctets = 2;  // groups of 8 units of a block, at most

// Row tiles of a block: its gates forward, its units backward.
constexpr int grid_row_tiles(int gates, int octets, bool backward) {
  return backward ? (octets + 1) / 2 : row_tiles_of(gates, octets);
}
// Pairs of k-steps whose operands are asked for together, twice ahead: what is on its way at the same time.
constexpr int grid_pairs_at_once(int row_tiles, int batch_groups) { return (row_tiles <= 2 ? 4 : 2) / batch_groups; }
// Of weights in registers: what 255 leave for sums, operands, addresses and a cell.
constexpr int grid_register_pairs(int row_tiles, int batch_groups) {
  const int others = row_tiles == 1 ? 120 : 88;  // a tile alone is mostly backward, where a cell is more
  const int at_once = grid_pairs_at_once(row_tiles, batch_groups);
  const int sums = 4 * row_tiles * batch_groups * chains_of(row_tiles, batch_groups);
  const int pairs = (255 - others - sums - 8 * at_once * batch_groups) / (8 * row_tiles);
  return pairs / at_once * at_once;
}
// float32 has no tensor cores: rows of weights of a lane, 8 lanes have all.
constexpr int grid_rows_of_lane(int gates, int octets, bool backward) { return backward ? octets : gates * octets; }
// Few gates leave room for 16 units a block.
constexpr int grid_octets_32(int gates) { return gates > 1 ? 1 : kGridOctets; }
// Rows of 4 bytes between the sums of one row of weights and the next (grid.cuh).
constexpr int grid_sum_stride(int batch_groups) { return batch_groups == 1 ? 8 : 24; }
inline int64_t CudaPlan::ring_places(int64_t steps) { return steps < kRing ? steps + 1 : kRing; }
inline int64_t CudaPlan::ring_words(int64_t steps, int directions, int element_size) const {
  return ring_places(steps) * directions * slices * depth * kMatrixColumns * batch_groups * element_size / 4;
}

// --- The plan ---------------------------------------------------------------------------------------------------------

// Every way to run a persistent scan on the device, the fastest by the model first; empty: none fits.
std::vector<CudaPlan> persistent_plans(const CudaProblem& problem, const CudaDevice& device);

class TunedPlans;  // core/tuned_cuda.h

// The fastest, stepwise included. `wish`: "auto" (what `tuned` has for this scan, if it still is one of the alternatives;
// else by the model: persistent kernels only on the capability that they were written for, and if they are faster),
// "stepwise", "persistent" (wherever one fits), or "persistent:K", the K-th of persistent_plans. Throws
// std::invalid_argument for anything else.
CudaPlan plan_cuda(const CudaProblem& problem, const CudaDevice& device, const std::string& wish,
                   const TunedPlans* tuned = nullptr);

// A step of the loop on the host: two launches, and the weights from memory or L2.
double stepwise_microseconds(const CudaProblem& problem, const CudaDevice& device);

}  // namespace fastrnn
