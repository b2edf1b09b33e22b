// One step of one layer with weights packed beforehand, compiled once per ISA, behind one table.
#pragma once

#include <cstdint>

#include "core/cells/all.h"
#include "core/params.h"

namespace fastrnn {

// How a session keeps its weights. Sums, states and activation functions are in the type of the session.
enum class WeightType {
  kFull,      // as the session: float or double
  kBfloat16,  // rounded to bfloat16
  kInt8,      // 8-bit integers and a scale for each row of each matrix; what they multiply is quantised step by step
};
inline constexpr int kWeightTypes = 3;

// The parameters of one layer as torch lays them out.
template <class T>
struct StreamingWeights {
  LayerShape shape;
  const T* w_ih = nullptr;  // [G*H, I]
  const T* w_hh = nullptr;  // [G*H, P or H]
  const T* b_ih = nullptr;  // [G*H] or null, both biases or neither
  const T* b_hh = nullptr;  // [G*H] or null
  const T* w_hr = nullptr;  // [P, H] or null
};

// Rows of states and inputs are as wide as this: whole vectors of every ISA, zero beyond their size.
constexpr int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

// What one layer does next: a step, or what its inputs of several steps are multiplied by, ahead of those.
template <class T>
struct StreamingStep {
  LayerShape shape;
  int64_t batch = 0;             // N
  bool backwards = false;  // visit the blocks from the last: the cache still holds what the step before read last
  bool int8_dot = false;  // may the machine's own dot product of 8-bit integers be used?
  const void* packed = nullptr;  // what pack() wrote
  const T* input = nullptr;  // [N, padded(I)]; ahead: [ahead, padded(I)]
  int64_t ahead = 0;  // rows of inputs that are multiplied ahead; 0: none
  T* products = nullptr;  // product_bytes(shape, ahead): out, ahead; in, of a step after that
  int64_t first = 0;  // of those rows, the step's first
  const T* h = nullptr;  // [N, padded(P or H)]
  T* next_h = nullptr;  // [N, padded(P or H)] out
  T* c = nullptr;  // [N, padded(H)] in, out; cells with a cell state
  T* activation = nullptr;  // [N, padded(H)] projected only: o tanh(c)
  char* quantised = nullptr;  // quantised_bytes(), kInt8 only
};

// Bytes of a row of operands as 8-bit integers: them and their scale.
constexpr int64_t quantised_row(int64_t size) { return padded(size) + 16; }

// Those that int8 weights need for what they multiply: of so many rows of inputs, N or more.
constexpr int64_t quantised_bytes(const LayerShape& shape, int64_t batch, int64_t rows) {
  return rows * quantised_row(shape.inputs) + batch * (quantised_row(shape.outputs) + quantised_row(shape.units));
}

template <class T>
struct StreamingKernels {
  int64_t (*packed_bytes)(const LayerShape&) = nullptr;
  void (*pack)(const StreamingWeights<T>&, void* packed) = nullptr;  // packed: aligned to 64 bytes
  int64_t (*product_bytes)(const LayerShape&, int64_t rows) = nullptr;
  void (*multiply_inputs)(const StreamingStep<T>&) = nullptr;
  void (*step)(const StreamingStep<T>&) = nullptr;
};

struct StreamingTable {
  StreamingKernels<float> f32[kCellKinds][kWeightTypes];
  StreamingKernels<double> f64[kCellKinds];  // kFull only

  template <class T>
  const StreamingKernels<T>& get(CellKind kind, WeightType type) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32[static_cast<int>(kind)][static_cast<int>(type)];
    } else {
      return f64[static_cast<int>(kind)];
    }
  }
};

// The table for cpu_capability().
const StreamingTable& streaming_table();

}  // namespace fastrnn
