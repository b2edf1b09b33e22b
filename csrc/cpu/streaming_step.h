// One step of one layer, a template of the cell, the type and the kind of weights. Block by block of units: the weights
// of the input and of the state, all gates of a unit together, lie one after the other and are read once, from end to
// end; the cell is applied while the sums are in registers.
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
  static constexpr int kSeparateVectors = kSeparate * kUnitVectors;
  static constexpr int64_t kUnits = kUnitVectors * kLanes;  // of a block
  static constexpr int kRowsOfTile = std::min(4, max_rows(kVectors));  // sessions have few rows
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

  static void step(const StreamingStep<T>& s) {
    const Layout layout(s.shape);
    const char* packed = static_cast<const char*>(s.packed);
    char* quantised = static_cast<char*>(s.quantised);
    const int64_t inputs = padded(s.shape.inputs), outputs = padded(s.shape.outputs);
    for_row_tiles<kRowsOfTile>(s.batch, [&]<int kRows>(RowTile tile) {
      const int64_t row = tile.first;
      Operand x[kRows], h[kRows];
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        x[r] = Weights::operand(s.input + (row + r) * inputs, s.shape.inputs, quantised);
        h[r] = Weights::operand(s.h + (row + r) * outputs, s.shape.outputs, quantised);
      }
      for (int64_t i = 0; i < layout.blocks; ++i) {
        const int64_t b = s.backwards ? layout.blocks - 1 - i : i;
        units_block<kRows>(s, layout, packed + b * layout.block, x, h, row, b * kUnits);
      }
    });
    if constexpr (Cell::kProjects) {
      if (s.shape.projected) project(s, layout);
    }
  }

 private:
  // The second phase: h = W_hr (o tanh(c)).
  static void project(const StreamingStep<T>& s, const Layout& layout) {
    const char* packed = static_cast<const char*>(s.packed) + layout.blocks * layout.block;
    char* quantised = static_cast<char*>(s.quantised);
    const int64_t outputs = padded(s.shape.outputs), units = padded(s.shape.units);
    for_row_tiles<kRowsOfTile>(s.batch, [&]<int kRows>(RowTile tile) {
      const int64_t row = tile.first;
      Operand activation[kRows];
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        activation[r] = Weights::operand(s.activation + (row + r) * units, s.shape.units, quantised);
      }
      for (int64_t b = 0; b < layout.output_blocks; ++b) {
        V sum[kRows][kOutputVectors];
        set_zero(sum);
        Weights::multiply(sum, packed + b * layout.output_block, activation, s.shape.units, s.int8_dot);
#pragma GCC unroll 32
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
          for (int v = 0; v < kOutputVectors; ++v) {
            leave(s.next_h + (row + r) * outputs, sum[r][v], b * kOutputs + v * kLanes, s.shape.outputs);
          }
        }
      }
    });
  }

  // What lies beyond `size` stays zero: it is multiplied with zero weights, and must be no NaN.
  static FASTRNN_INLINE void leave(T* row, V value, int64_t j, int64_t size) {
    if (j < size) store(row + j, value, size - j);
  }

  template <int kRows>
  static FASTRNN_INLINE void units_block(const StreamingStep<T>& s, const Layout& layout, const char* block,
                                         const Operand (&x)[kRows], const Operand (&h)[kRows], int64_t row,
                                         int64_t first) {
    V sum[kRows][kVectors];
    V input_part[kRows][kSeparate > 0 ? kSeparateVectors : 1];
    set_zero(sum);
    Weights::multiply(sum, block + layout.input, x, s.shape.inputs, s.int8_dot);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
      for (int v = 0; v < kSeparateVectors; ++v) {  // the separate gates begin again
        input_part[r][v] = sum[r][kVectors - kSeparateVectors + v];
        sum[r][kVectors - kSeparateVectors + v] = V(0);
      }
    }
    Weights::multiply(sum, block + layout.recurrent, h, s.shape.outputs, s.int8_dot);
    const T* bias = reinterpret_cast<const T*>(block + layout.bias);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
      for (int u = 0; u < kUnitVectors; ++u) {
        const int64_t j = first + u * kLanes;
        if (j >= s.shape.units) continue;
        V gate[kInputs];
#pragma GCC unroll 32
        for (int g = 0; g < kInputs; ++g) gate[g] = V::loadu(bias + g * kUnits + u * kLanes);
#pragma GCC unroll 32
        for (int g = 0; g < kGates; ++g) {
          const bool apart = g >= kGates - kSeparate;
          gate[apart ? g + kSeparate : g] = gate[apart ? g + kSeparate : g] + sum[r][g * kUnitVectors + u];
          if (apart) gate[g] = gate[g] + input_part[r][(g - kGates + kSeparate) * kUnitVectors + u];
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
