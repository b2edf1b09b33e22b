// One step of one layer, a template of the cell, the type and the kind of weights. Block by block of units: the weights
// of the input and of the state, all gates of a unit together, lie one after the other and are read once for all rows,
// from end to end; the cell is applied while the sums are in L1. Of several steps the inputs are multiplied ahead: their
// weights are read once.
#pragma once

#include <vector>

#include "cpu/streaming_weights.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

template <class Cell, class T, class Weights>
class StreamingLayer {
  using V = Vec<T>;
  using Operand = typename Weights::Operand;
  static constexpr int kLanes = V::size();
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kInputs = kGates + kSeparate;
  static constexpr int kUnitVectors = kGates == 1 ? 4 : 1;
  static constexpr int kVectors = kGates * kUnitVectors;
  static constexpr int64_t kWidth = kVectors * kLanes;  // of the sums of a block
  static constexpr int64_t kUnits = kUnitVectors * kLanes;  // of a block
  static constexpr int kOutputVectors = 4;  // of a block of the projection
  static constexpr int64_t kOutputs = kOutputVectors * kLanes;
  static constexpr ElementState kState = Cell::kState;

  // Where the parts of a packed layer lie, in bytes.
  struct Layout {
    int64_t input, recurrent, bias, block;  // of one block of units: its parts and its size
    int64_t blocks;
    int64_t output_block, output_blocks;  // of the projection, behind all blocks of units

    explicit Layout(const LayerShape& shape)
        : input(0),
          recurrent(Weights::template block_bytes<kVectors>(shape.inputs)),
          bias(recurrent + Weights::template block_bytes<kVectors>(shape.outputs)),
          block(bias + whole_lines(kInputs * kUnits * sizeof(T))),
          blocks(fastrnn::blocks(shape.units, kUnits)),
          output_block(shape.projected ? Weights::template block_bytes<kOutputVectors>(shape.units) : 0),
          output_blocks(shape.projected ? fastrnn::blocks(shape.outputs, kOutputs) : 0) {}
    int64_t bytes() const { return blocks * block + output_blocks * output_block; }
  };

 public:
  static int64_t packed_bytes(const LayerShape& shape) { return Layout(shape).bytes(); }

  static void pack(const StreamingWeights<T>& weights, void* packed) {
    const LayerShape& shape = weights.shape;
    const Layout layout(shape);
    char* out = static_cast<char*>(packed);
    std::vector<T> biases(kInputs * shape.units);
    sum_biases(kGates, kSeparate, shape.units, weights.b_ih, weights.b_hh, biases.data());
    for (int64_t b = 0; b < layout.blocks; ++b, out += layout.block) {
      const int64_t first = b * kUnits;
      Weights::template pack<kVectors>({weights.w_ih, shape.units, shape.inputs, first, kUnitVectors},
                                       out + layout.input);
      Weights::template pack<kVectors>({weights.w_hh, shape.units, shape.outputs, first, kUnitVectors},
                                       out + layout.recurrent);
      T* bias = reinterpret_cast<T*>(out + layout.bias);
      for (int g = 0; g < kInputs; ++g) {
        for (int64_t j = first; j < first + kUnits; ++j) *bias++ = j < shape.units ? biases[g * shape.units + j] : T(0);
      }
    }
    for (int64_t b = 0; b < layout.output_blocks; ++b, out += layout.output_block) {
      Weights::template pack<kOutputVectors>({weights.w_hr, shape.outputs, shape.units, b * kOutputs, kOutputVectors},
                                             out);
    }
  }

  // [blocks][rows][vectors][lanes]
  static int64_t product_bytes(const LayerShape& shape, int64_t rows) {
    return Layout(shape).blocks * rows * kWidth * sizeof(T);
  }

  static void multiply_inputs(const StreamingStep<T>& s) {
    const Layout layout(s.shape);
    const char* packed = static_cast<const char*>(s.packed);
    Weights::prepare(s.input, s.ahead, s.shape.inputs, s.quantised);
    for (int64_t b = 0; b < layout.blocks; ++b) {
      for_tiles<kVectors>(s.batch, s.ahead, [&]<int kPartials, int kRows>(int64_t row) {
        multiply<kPartials, kRows, kVectors>(s.products + (b * s.ahead + row) * kWidth,
                                             packed + b * layout.block + layout.input, s.input, row, s.shape.inputs,
                                             s.quantised, s.int8_dot);
      });
    }
  }

  static void step(const StreamingStep<T>& s) {
    const Layout layout(s.shape);
    const char* packed = static_cast<const char*>(s.packed);
    char* const of_h = s.quantised;
    char* const of_x = of_h == nullptr ? nullptr : of_h + s.batch * quantised_row(s.shape.outputs);
    Weights::prepare(s.h, s.batch, s.shape.outputs, of_h);
    if (s.ahead == 0) Weights::prepare(s.input, s.batch, s.shape.inputs, of_x);
    for (int64_t i = 0; i < layout.blocks; ++i) {
      const int64_t b = s.backwards ? layout.blocks - 1 - i : i;
      const char* block = packed + b * layout.block;
      for_tiles<kVectors>(s.batch, s.batch, [&]<int kPartials, int kRows>(int64_t row) {
        alignas(64) T recurrent[kRows * kWidth], of_input[kRows * kWidth];
        const T* input = of_input;
        if (s.ahead > 0) {
          input = s.products + (b * s.ahead + s.first + row) * kWidth;
        } else {
          multiply<kPartials, kRows, kVectors>(of_input, block + layout.input, s.input, row, s.shape.inputs, of_x,
                                               s.int8_dot);
        }
        multiply<kPartials, kRows, kVectors>(recurrent, block + layout.recurrent, s.h, row, s.shape.outputs, of_h,
                                             s.int8_dot);
        cells(s, row, kRows, b * kUnits, input, recurrent, reinterpret_cast<const T*>(block + layout.bias));
      });
    }
    if constexpr (Cell::kProjects) {
      if (s.shape.projected) project(s, layout);
    }
  }

 private:
  // Calls f.template operator()<kPartials, kRows>(row) for tiles of `rows` rows. A sum has its parts by the session's
  // batch, not by the rows of a tile: several steps together give what they give one by one.
  template <int kOfBlock, class F>
  static FASTRNN_INLINE void for_tiles(int64_t batch, int64_t rows, const F& f) {
    constexpr int kFew = kAccumulators / (2 * kOfBlock);  // whose sums have room for two parts
    constexpr int kMost = std::min(Weights::kMostRows, max_rows(kOfBlock));
    if constexpr (kFew > 0) {
      if (batch <= kFew) {
        for_row_tiles<kFew>(rows, [&]<int kRows>(RowTile tile) { f.template operator()<2, kRows>(tile.first); });
        return;
      }
    }
    for_row_tiles<kMost>(rows, [&]<int kRows>(RowTile tile) { f.template operator()<1, kRows>(tile.first); });
  }

  // sums [kRows][kOfBlock][lanes] = a block times some rows of [.., padded(depth)], from `first` on.
  template <int kPartials, int kRows, int kOfBlock>
  static FASTRNN_INLINE void multiply(T* sums, const char* block, const T* rows, int64_t first, int64_t depth,
                                      const char* quantised, bool int8_dot) {
    Operand a[kRows];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) a[r] = Weights::operand(rows, first + r, depth, quantised);
    Weights::template multiply<kPartials, kRows, kOfBlock>(sums, block, a, depth, int8_dot);
  }

  // The second phase: h = W_hr (o tanh(c)).
  static void project(const StreamingStep<T>& s, const Layout& layout) {
    const char* packed = static_cast<const char*>(s.packed) + layout.blocks * layout.block;
    const int64_t outputs = padded(s.shape.outputs);
    Weights::prepare(s.activation, s.batch, s.shape.units, s.quantised);
    for (int64_t b = 0; b < layout.output_blocks; ++b) {
      for_tiles<kOutputVectors>(s.batch, s.batch, [&]<int kPartials, int kRows>(int64_t row) {
        alignas(64) T sums[kRows * kOutputs];
        multiply<kPartials, kRows, kOutputVectors>(sums, packed + b * layout.output_block, s.activation, row,
                                                   s.shape.units, s.quantised, s.int8_dot);
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kOutputVectors; ++v) {
            leave(s.next_h + (row + r) * outputs, V::loadu(sums + r * kOutputs + v * kLanes), b * kOutputs + v * kLanes,
                  s.shape.outputs);
          }
        }
      });
    }
  }

  // What lies beyond `size` stays zero: it is multiplied with zero weights, and must be no NaN.
  static FASTRNN_INLINE void leave(T* row, V value, int64_t j, int64_t size) {
    if (j < size) store(row + j, value, size - j);
  }

  // The cells of a block of some rows, on what their inputs and states are multiplied by, [rows][vectors][lanes] each.
  static FASTRNN_INLINE void cells(const StreamingStep<T>& s, int64_t row, int64_t count, int64_t first, const T* input,
                                   const T* recurrent, const T* bias) {
#pragma GCC unroll 1
    for (int64_t r = 0; r < count; ++r, input += kWidth, recurrent += kWidth) {
#pragma GCC unroll 32
      for (int u = 0; u < kUnitVectors; ++u) {
        const int64_t j = first + u * kLanes;
        if (j >= s.shape.units) continue;
        V gate[kInputs];
#pragma GCC unroll 32
        for (int g = 0; g < kInputs; ++g) gate[g] = V::loadu(bias + g * kUnits + u * kLanes);
#pragma GCC unroll 32
        for (int g = 0; g < kGates; ++g) {
          const V x = V::loadu(input + (g * kUnitVectors + u) * kLanes);
          const V h = V::loadu(recurrent + (g * kUnitVectors + u) * kLanes);
          if (g < kGates - kSeparate) {
            gate[g] = gate[g] + (x + h);
          } else {
            gate[g] = gate[g] + x;
            gate[g + kSeparate] = gate[g + kSeparate] + h;
          }
        }
        cell(s, row + r, j, gate);
      }
    }
  }

  static FASTRNN_INLINE void cell(const StreamingStep<T>& s, int64_t n, int64_t j, const V (&gate)[kInputs]) {
    const int64_t units = padded(s.shape.units), outputs = padded(s.shape.outputs);
    T* c = kState == ElementState::kCell ? s.c + n * units + j : nullptr;
    V state(0), saved[Cell::kSaved];
    if constexpr (kState == ElementState::kCell) state = V::loadu(c);
    if constexpr (kState == ElementState::kHidden) state = V::loadu(s.h + n * outputs + j);
    const V h = Cell::forward(gate, state, saved);
    if constexpr (kState == ElementState::kCell) state.store(c);
    leave(s.shape.projected ? s.activation + n * units : s.next_h + n * outputs, h, j, s.shape.units);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
