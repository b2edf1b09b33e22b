#include "core/plan.h"

#include <algorithm>

namespace fastrnn {
namespace {

// One core, in operations a microsecond: half of what a tile reaches, so that threads are not called too early.
constexpr double kFlopsPerMicrosecond = 50e3;
constexpr double kRegionMicroseconds = 4;     // to open a parallel region
constexpr double kBarrierMicroseconds = 0.3;  // one barrier, the other core a little late
// Dot products read the weights once for a few rows. A product by GEMM wants them converted first, if they are 16 bits wide.
constexpr int64_t kNaturalRows = 4, kNaturalRowsOf16Bit = 16;
constexpr int64_t kOwnRows = 16;  // of a member, from which it uses the weights often enough to have all of them
// From so many rows on, a step reuses w_ih enough to multiply x within the tiles. Where the weights come from beyond L2
// at every step it takes more of them, by the part of them that is w_ih, and by what separate gates take from a tile.
constexpr int64_t kFusedRows = 12, kFusedRowsBeyondL2 = 32;
constexpr int64_t kBf16Rows = 4;  // fewer make no use of a matrix unit
constexpr int64_t kNarrowInput = 8;  // fewer columns than a GEMM is good for
constexpr int64_t kUnitsPerShare = 16;  // what a member must get of the units to be of use

int64_t weight_bytes(const CpuProblem& p) {
  return p.gates * p.shape.units * (p.shape.inputs + p.shape.outputs) * p.element_size;
}

void share_work(const CpuProblem& p, const CpuMachine& machine, CpuPlan& plan) {
  const LayerShape& s = p.shape;
  const int threads = machine.threads;
  if (threads <= 1) return;
  const double inputs = plan.recurrent == Recurrent::kNatural ? static_cast<double>(s.inputs) : 0;
  double step = 2.0 * static_cast<double>(p.batch * s.units) *
                (p.gates * (inputs + (plan.recurrent == Recurrent::kProduct ? 0.0 : static_cast<double>(s.outputs))) +
                 (s.projected ? static_cast<double>(s.outputs) : 0.0)) /
                kFlopsPerMicrosecond;
  step += 0.002 * static_cast<double>(p.batch * s.units * p.gates) / 4;  // the cell itself
  const double alone = step * static_cast<double>(p.steps * p.directions);
  if (alone < 2 * kRegionMicroseconds) return;

  // Two directions need nothing from each other.
  const int per_direction = std::max(1, threads / p.directions);
  if (p.directions == 2) plan.threads = 2;
  if (per_direction == 1) return;

  const bool enough_rows = p.batch >= per_direction * kOwnRows;
  const bool weights_fit = weight_bytes(p) / (plan.bf16 ? 2 : 1) <= machine.l2_bytes / 2;
  const int unit_shares = static_cast<int>(std::min<int64_t>(per_direction, s.units / kUnitsPerShare));
  const double barriers = kBarrierMicroseconds * (s.projected ? 2 : 1);
  const bool units_pay = unit_shares > 1 && step / unit_shares + barriers < 0.9 * step;
  // Rows of unequal length would leave members of a shared batch idle.
  const bool batch_pays = p.batch >= per_direction && !p.ragged && !(units_pay && !(enough_rows && weights_fit));
  if (batch_pays) {
    plan.threads = per_direction * p.directions;
  } else if (units_pay) {
    plan.shard_units = true;
    plan.threads = unit_shares * p.directions;
  }
}

}  // namespace

CpuPlan plan_cpu(const CpuProblem& p, const CpuMachine& machine) {
  CpuPlan plan;
  const bool one_step = p.steps == 1 && !p.backward;
  if (one_step && p.batch <= (p.weight_size == 2 ? kNaturalRowsOf16Bit : kNaturalRows)) {
    plan.recurrent = Recurrent::kNatural;
  } else if (one_step && !p.shape.projected) {
    plan.recurrent = Recurrent::kProduct;
  }
  plan.bf16 = machine.bf16 && p.bf16 && plan.recurrent == Recurrent::kPacked && p.batch >= kBf16Rows &&
              p.element_size == sizeof(float) && (p.steps > 1 || !p.backward);
  share_work(p, machine, plan);
  if (plan.bf16) {
    plan.fused_input = !p.backward;
  } else if (!p.backward && plan.recurrent == Recurrent::kPacked) {
    const int members = std::max(1, plan.threads / p.directions);
    const int64_t rows = p.batch / (plan.shard_units ? 1 : members);
    const bool fit = weight_bytes(p) / (plan.shard_units ? members : 1) <= machine.l2_bytes;
    const int64_t beyond_l2 = kFusedRowsBeyondL2 * (1 + p.separate) * p.shape.inputs /
                              (p.shape.inputs + p.shape.outputs);
    const int64_t enough = fit ? kFusedRows : std::max(kFusedRows, beyond_l2);
    plan.fused_input = rows >= enough || (p.shape.inputs <= kNarrowInput && p.batch > 1);
  }
  return plan;
}

}  // namespace fastrnn
