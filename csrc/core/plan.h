// The choice of algorithm: a pure function of the cell, the shape and the machine, testable without either.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace fastrnn {

// A layer beside others of its stack waits, and is waited for, so many steps at a time: the cache lines of each step would
// go from core to core one after another.
inline constexpr int64_t kStepsTogether = 4;
// Fewer are over before the last layer of a stack has begun.
inline constexpr int64_t kStepsBeside = 16;

struct CpuMachine {
  int threads = 1;  // that may be used
  int64_t l2_bytes = 0;  // of one core
  bool bf16 = false;  // products of bfloat16 by instructions of its own
  bool parts = false;  // and of float32 in several parts of bfloat16
};

struct CpuProblem {
  int gates = 1;  // G
  int separate = 0;  // S
  int64_t steps = 1;  // T
  int64_t batch = 1;  // N
  LayerShape shape;
  int directions = 1;  // D
  int element_size = 4;  // bytes, of what is computed with
  bool ragged = false;  // lengths, or a packed batch
  bool backward = false;
  int weight_size = 4;  // bytes, of a weight as it is stored
  bool bf16 = false;  // what is multiplied may be rounded to bfloat16
  int parts = 0;  // or is to be in so many parts of it, 2 or 3
  bool in_windows = false;  // gate gradients may be multiplied some steps at a time
  bool beside = false;  // a layer of a stack beside the others: its input comes some steps at a time
};

struct CpuPlan {
  Recurrent recurrent = Recurrent::kPacked;
  bool fused_input = false;  // a step multiplies its input too: no buffer of projections
  int threads = 1;  // of the region, all directions together
  bool shard_units = false;  // members share the units, with a barrier a step; else they share the batch
  int64_t window = 0;  // steps of a backward scan, after which the GEMMs take their gate gradients; 0: all
  int parts = 0;  // products of bfloat16 in place of the tiles, in so many parts; 1: rounded
  int64_t ahead = 0;  // where nothing is saved: the scan multiplies the input of so many steps at a time

  bool multiplies_input() const { return fused_input || ahead > 0; }
};

CpuPlan plan_cpu(const CpuProblem& problem, const CpuMachine& machine);

// Whether the layers of a stack had better run beside one another, each on a thread some steps behind the one below, than
// one after another. `above`: each but the first.
bool side_by_side(const CpuProblem& first, const CpuProblem& above, int64_t layers, const CpuMachine& machine);

}  // namespace fastrnn
