#include "core/plan.h"

#include <algorithm>

namespace fastrnn {
namespace {

// One core, in operations a microsecond: half of what a tile reaches, so that threads are not called too early.
constexpr double kFlopsPerMicrosecond = 50e3;
constexpr double kRegionMicroseconds = 4;     // to open a parallel region
constexpr double kBarrierMicroseconds = 0.3;  // one barrier, the other core a little late
// Dot products over the weights as they lie read them once for a few rows, and need no packing. Tiles are faster, and make
// up for it in the more steps the further away the weights are: those that come from memory come no faster packed. Of 16
// bits, which are packed as float32, they come twice as fast as they lie.
constexpr int64_t kNaturalRows = 4, kNaturalRowsOf16Bit = 16;  // the latter of one step
constexpr int64_t kNaturalWithinL2 = 3, kNaturalBeyondL2 = 12, kNaturalFromMemory = 64;  // steps
constexpr int64_t kMemoryBytes = 12 << 20;  // the caches beyond L2 are shared
constexpr int64_t kNaturalInputsOf16Bit = 6;  // steps for which W_ih is not worth converting for a GEMM
constexpr int64_t kOwnRows = 16;  // of a member, from which it uses the weights often enough to have all of them
// From so many rows on, a step reuses w_ih enough to multiply x within the tiles: few where L2 has room for more than the
// weights, some where it has not. Where they come from beyond L2 at every step it takes more rows, by the part of them
// that is w_ih, and by what separate gates take from a tile.
constexpr int64_t kFusedRows = 5, kFusedRowsFullL2 = 12, kFusedRowsBeyondL2 = 32;
constexpr int64_t kBf16Rows = 4;  // fewer make no use of a matrix unit
constexpr int64_t kNarrowInput = 8;  // fewer columns than a GEMM is good for
constexpr int64_t kRowsAhead = 12;  // of an input that a scan multiplies some steps at a time: whole tiles, soon there
constexpr int64_t kUnitsPerShare = 16;  // what a member must get of the units to be of use

int64_t weight_bytes(const CpuProblem& p) {
  return p.gates * p.shape.units * (p.shape.inputs + p.shape.outputs) * p.element_size;
}

// The same as they are multiplied: in so many parts of bfloat16, or in float32.
int64_t bytes_in_parts(const CpuProblem& p, int parts) {
  return parts == 0 ? weight_bytes(p) : weight_bytes(p) / 2 * parts;
}

// Are dot products over the weights as they lie the better way?
bool reads_as_stored(const CpuProblem& p, const CpuMachine& machine) {
  const bool narrow = p.weight_size < p.element_size;
  if (p.steps <= 1) return p.batch <= (narrow ? kNaturalRowsOf16Bit : kNaturalRows);
  if (p.batch > kNaturalRows) return false;
  const int64_t shares = std::clamp<int64_t>(p.shape.units / kUnitsPerShare, 1,
                                             std::max(1, machine.threads / p.directions));
  const int64_t packed = p.gates * p.shape.units * p.shape.outputs * p.element_size / shares;
  if (packed <= machine.l2_bytes / 2) return p.steps <= kNaturalWithinL2;
  if (narrow && packed >= 2 * machine.l2_bytes) return true;
  return p.steps <= (packed < kMemoryBytes ? kNaturalBeyondL2 : kNaturalFromMemory);
}

// A matrix unit takes whole tiles of rows, and its sums pass through memory. In two parts a product takes three of its
// own, at sixteen times the rate or, beside a busy neighbour, five times, and so leaves room for that. In three parts it
// takes six, and weights 6 bytes in place of 4.
bool pays_in_parts(const CpuProblem& p) {
  constexpr int64_t kRows = 12, kUnits = 64, kSteps = 4;
  constexpr int64_t kTile = 16;  // rows
  if (p.batch < kRows || p.shape.units < kUnits || p.steps < kSteps) return false;
  const int64_t tiles = (p.batch + kTile - 1) / kTile;
  return p.parts == 2 || 5 * p.batch >= 4 * tiles * kTile;
}

// A step of one direction on one thread, which multiplies so many inputs and outputs with all gates.
double step_microseconds(const CpuProblem& p, int64_t inputs, int64_t outputs) {
  const LayerShape& s = p.shape;
  const int64_t terms = p.gates * (inputs + outputs) + (s.projected ? s.outputs : 0);
  return 2.0 * static_cast<double>(p.batch * s.units * terms) / kFlopsPerMicrosecond +
         0.002 * static_cast<double>(p.batch * s.units * p.gates) / 4;  // the cell itself
}

double barriers_microseconds(const CpuProblem& p) { return kBarrierMicroseconds * (p.shape.projected ? 2 : 1); }

void share_work(const CpuProblem& p, const CpuMachine& machine, CpuPlan& plan) {
  const LayerShape& s = p.shape;
  const int threads = machine.threads;
  if (threads <= 1) return;
  const bool dots = plan.recurrent == Recurrent::kNatural && plan.fused_input;
  const double step = step_microseconds(p, dots ? s.inputs : 0, plan.recurrent == Recurrent::kProduct ? 0 : s.outputs);
  const double alone = step * static_cast<double>(p.steps * p.directions);
  if (alone < 2 * kRegionMicroseconds) return;

  // Two directions need nothing from each other.
  const int per_direction = std::max(1, threads / p.directions);
  if (p.directions == 2) plan.threads = 2;
  if (per_direction == 1) return;

  const bool enough_rows = p.batch >= per_direction * kOwnRows;
  const bool weights_fit = bytes_in_parts(p, plan.parts) <= machine.l2_bytes / 2;
  const int unit_shares = static_cast<int>(std::min<int64_t>(per_direction, s.units / kUnitsPerShare));
  const bool units_pay = unit_shares > 1 && step / unit_shares + barriers_microseconds(p) < 0.9 * step;
  // Rows of unequal length would leave members of a shared batch idle.
  const bool batch_pays = p.batch >= per_direction && !p.ragged && !(units_pay && !(enough_rows && weights_fit));
  if (batch_pays) {
    plan.threads = per_direction * p.directions;
  } else if (units_pay) {
    plan.shard_units = true;
    plan.threads = unit_shares * p.directions;
  }
}

// Gate gradients come back from cache if they are multiplied when half of L2 holds those of so many steps; or of more, as
// a GEMM needs many rows to make up for going through the weights' gradients once more. A projected layer would have more
// than them to keep, and the scans of two directions side by side don't wait for each other.
int64_t choose_window(const CpuProblem& p, const CpuMachine& machine, const CpuPlan& plan) {
  constexpr int64_t kRows = 1024;
  if (!p.backward || !p.in_windows || p.shape.projected || p.batch == 0) return 0;
  if (p.directions > 1 && plan.threads > 1) return 0;
  const int64_t row = (p.gates + p.separate) * p.shape.units * p.element_size;
  if (row == 0) return 0;
  const int64_t rows = std::max({kRows, p.shape.inputs + p.shape.outputs, machine.l2_bytes / 2 / row});
  const int64_t windows = p.steps / std::max<int64_t>(1, rows / p.batch);
  return windows > 1 ? (p.steps + windows - 1) / windows : 0;
}

}  // namespace

CpuPlan plan_cpu(const CpuProblem& p, const CpuMachine& machine) {
  CpuPlan plan;
  if (p.element_size == sizeof(float) && p.steps > 1) {
    if (machine.bf16 && p.bf16 && p.batch >= kBf16Rows) plan.parts = 1;
    if (machine.parts && p.parts > 0 && pays_in_parts(p)) plan.parts = p.parts;
  }
  if (!p.backward && plan.parts == 0) {
    if (!p.beside && reads_as_stored(p, machine)) {
      plan.recurrent = Recurrent::kNatural;
      const int64_t steps = p.weight_size < p.element_size ? kNaturalInputsOf16Bit : 1;
      plan.fused_input = p.steps <= steps || weight_bytes(p) <= machine.l2_bytes;
    } else if (p.steps == 1 && !p.shape.projected) {
      plan.recurrent = Recurrent::kProduct;
    }
  }
  share_work(p, machine, plan);
  if (plan.parts > 0) {
    // rounded, both are one product; in parts a GEMM ahead is as fast, and worth a buffer unless half of L2 has room for
    // the weights
    const int64_t bytes = bytes_in_parts(p, plan.parts) / (plan.shard_units ? plan.threads / p.directions : 1);
    plan.fused_input = !p.backward && (p.beside || plan.parts == 1 || bytes <= machine.l2_bytes / 2);
  } else if (!p.backward && plan.recurrent == Recurrent::kPacked) {
    const int members = std::max(1, plan.threads / p.directions);
    const int64_t rows = p.batch / (plan.shard_units ? 1 : members);
    const int64_t bytes = weight_bytes(p) / (plan.shard_units ? members : 1);
    const int64_t beyond_l2 = kFusedRowsBeyondL2 * (1 + p.separate) * p.shape.inputs /
                              std::max<int64_t>(1, p.shape.inputs + p.shape.outputs);
    const int64_t enough = bytes <= machine.l2_bytes / 2 ? kFusedRows
                           : bytes <= machine.l2_bytes   ? kFusedRowsFullL2
                                                         : std::max(kFusedRowsFullL2, beyond_l2);
    plan.fused_input = rows >= enough || (p.shape.inputs <= kNarrowInput && p.batch > 1);
    const bool narrow = p.weight_size < p.element_size;  // of 16 bits, an input is converted before it is multiplied
    if (p.beside && (narrow || !plan.fused_input)) {
      plan.fused_input = false;
      plan.ahead = p.batch > 0 ? (kRowsAhead + p.batch - 1) / p.batch : 1;
    }
  }
  plan.window = choose_window(p, machine, plan);
  return plan;
}

bool side_by_side(const CpuProblem& first, const CpuProblem& above, int64_t layers, const CpuMachine& machine) {
  const int64_t threads = std::min<int64_t>(machine.threads, layers);
  // Shared between two threads, weights that fill L2 fit in the L2s of both.
  const bool fit = std::max(weight_bytes(first), weight_bytes(above)) <= machine.l2_bytes;
  if (threads < 2 || first.directions > 1 || first.steps < kStepsBeside || !fit) return false;
  // a whole tile's rate, as the work is beside the barriers that it saves; whoever waits at each may wait longer
  const auto alone = [](const CpuProblem& p) { return step_microseconds(p, p.shape.inputs, p.shape.outputs) / 2; };
  const auto shared = [&](const CpuProblem& p) {
    const CpuPlan plan = plan_cpu(p, machine);
    if (plan.shard_units) return alone(p) / plan.threads * 1.05 + barriers_microseconds(p);
    const int64_t rows = (p.batch + plan.threads - 1) / plan.threads;  // of whoever has most
    return alone(p) * static_cast<double>(rows) / static_cast<double>(std::max<int64_t>(1, p.batch));
  };
  const auto times = [](int64_t count, double each) { return static_cast<double>(count) * each; };
  const int64_t of_first = (layers + threads - 1) / threads, of_second = (layers + threads - 2) / threads;
  CpuProblem beside = above;
  beside.beside = true;
  const int64_t behind = (threads - 1) * std::max(kStepsTogether, plan_cpu(beside, machine).ahead);
  const double at_once = std::max(alone(first) + times(of_first - 1, alone(above)), times(of_second, alone(above)));
  const double in_turn = shared(first) + times(layers - 1, shared(above));
  return times(first.steps, at_once) >= kRegionMicroseconds / 2 &&
         times(first.steps + behind, at_once) < times(first.steps, in_turn);
}

}  // namespace fastrnn
