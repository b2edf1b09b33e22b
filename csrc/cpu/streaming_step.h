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
  static constexpr int kTurns = kUnitVectors == 1 ? kCellsInTurn : 1;  // cells of one gate are short: 0.9 in turns

  // A block of units: how wide it is, and where its parts lie and end, in bytes.
  struct Block {
    int vectors;
    int64_t gate_units;  // from a gate to the next, in lanes
    int64_t recurrent, bias, bytes;  // the input's are at 0
  };

  // A packed layer: blocks of units, and behind them those of the projection. The last of each has as few vectors as hold
  // its units, with the gates one behind the other.
  struct Layout {
    LayerShape shape;
    int64_t blocks, output_blocks;
    Block whole, last;

    explicit Layout(const LayerShape& of)
        : shape(of),
          blocks(fastrnn::blocks(shape.units, kUnits)),
          output_blocks(shape.projected ? fastrnn::blocks(shape.outputs, kOutputs) : 0),
          whole(block_of(kVectors, kUnits)),
          last(whole) {
      const int64_t left = shape.units - (blocks - 1) * kUnits;
      if (const int vectors = vectors_for<kVectors>(kGates * left); vectors < kVectors) last = block_of(vectors, left);
    }

    const Block& block(int64_t b) const { return b + 1 < blocks ? whole : last; }
    int64_t begin(int64_t b) const { return b * whole.bytes; }

    int output_vectors(int64_t b) const { return vectors_for<kOutputVectors>(shape.outputs - b * kOutputs); }
    int64_t output_begin(int64_t b) const {
      return begin(blocks) + b * Weights::block_bytes(shape.units, kOutputVectors);
    }
    int64_t bytes() const { return output_begin(output_blocks); }

   private:
    template <int kMost>
    static int vectors_for(int64_t lanes) {
      return static_cast<int>(std::min<int64_t>(kMost, fastrnn::blocks(lanes, kLanes)));
    }
    Block block_of(int vectors, int64_t gate_units) const {
      const int64_t recurrent = Weights::block_bytes(shape.inputs, vectors);
      const int64_t bias = recurrent + Weights::block_bytes(shape.outputs, vectors);
      return {vectors, gate_units, recurrent, bias, bias + whole_lines(kInputs * kUnits * sizeof(T))};
    }
  };

 public:
  static int64_t packed_bytes(const LayerShape& shape) { return Layout(shape).bytes(); }

  static void pack(const StreamingWeights<T>& weights, void* packed) {
    const LayerShape& shape = weights.shape;
    const Layout layout(shape);
    char* const out = static_cast<char*>(packed);
    std::vector<T> biases(kInputs * shape.units);
    sum_biases(kGates, kSeparate, shape.units, weights.b_ih, weights.b_hh, biases.data());
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const int64_t first = b * kUnits;
      const Block& block = layout.block(b);
      char* const to = out + layout.begin(b);
      const auto pack_part = [&](const T* w, int64_t depth, char* part) {
        Weights::pack({w, kGates, shape.units, depth, first, block.vectors, block.gate_units}, part);
      };
      pack_part(weights.w_ih, shape.inputs, to);
      pack_part(weights.w_hh, shape.outputs, to + block.recurrent);
      T* bias = reinterpret_cast<T*>(to + block.bias);
      for (int g = 0; g < kInputs; ++g) {
        for (int64_t j = first; j < first + kUnits; ++j) *bias++ = j < shape.units ? biases[g * shape.units + j] : T(0);
      }
    }
    for (int64_t b = 0; b < layout.output_blocks; ++b) {
      Weights::pack({weights.w_hr, 1, shape.outputs, shape.units, b * kOutputs, layout.output_vectors(b), kOutputs},
                    out + layout.output_begin(b));
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
      T* const products = s.products + b * s.ahead * kWidth;
      const char* const weights = packed + layout.begin(b);
      const char* const next = packed + layout.begin(std::min(b + 1, layout.blocks - 1));
      for_tiles<kVectors>(s.batch, s.ahead, layout.block(b).vectors,
                          [&]<int kPartials, int kRows, int kOf>(RowTile tile) {
                            multiply<kPartials, kRows, kOf>(products + tile.first * kOf * kLanes, weights, next,
                                                            s.input, tile, s.shape.inputs, s.quantised, s.int8_dot);
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
      const auto visited = [&](int64_t at) { return s.backwards ? layout.blocks - 1 - at : at; };
      const int64_t b = visited(i), after = visited(std::min(i + 1, layout.blocks - 1));
      const Block& block = layout.block(b);
      const char* const weights = packed + layout.begin(b);
      const char* const next = packed + layout.begin(after);
      const int64_t next_recurrent = layout.block(after).recurrent;
      const T* const products = s.products + b * s.ahead * kWidth;
      for_tiles<kVectors>(s.batch, s.batch, block.vectors, [&]<int kPartials, int kRows, int kOf>(RowTile tile) {
        constexpr int64_t kStride = kOf * kLanes;
        // a vector more: a narrow block's last gate is read whole
        alignas(64) T recurrent[kRows * kStride + kLanes], of_input[kRows * kStride + kLanes];
        const T* input = of_input;
        if (s.ahead > 0) {
          input = products + (s.first + tile.first) * kStride;
        } else {
          multiply<kPartials, kRows, kOf>(of_input, weights, next, s.input, tile, s.shape.inputs, of_x, s.int8_dot);
        }
        multiply<kPartials, kRows, kOf>(recurrent, weights + block.recurrent, next + next_recurrent, s.h, tile,
                                        s.shape.outputs, of_h, s.int8_dot);
        const T* const bias = reinterpret_cast<const T*>(weights + block.bias);
        if constexpr (kOf == kVectors) {
          cells<kUnitVectors>(s, tile.first, kRows, b * kUnits, input, recurrent, kStride, kUnits, bias);
        } else {
          narrow_cells(s, tile.first, kRows, b * kUnits, input, recurrent, kStride, block.gate_units, bias);
        }
      });
    }
    if constexpr (Cell::kProjects) {
      if (s.shape.projected) project(s, layout);
    }
  }

 private:
  // Calls f.template operator()<kPartials, kRows, kOf>(tile) for tiles of `rows` rows and a block of kOf = `vectors`
  // vectors, kMost in a whole one. A sum has its parts by the session's batch, not by the rows of a tile: several steps
  // together give what they give one by one.
  template <int kMost, class F>
  static FASTRNN_INLINE void for_tiles(int64_t batch, int64_t rows, int vectors, const F& f) {
    constexpr int kFew = kAccumulators / (2 * kMost);  // whose sums have room for two parts
    constexpr int kMostRows = std::min(Weights::kMostRows, max_rows(kMost));
    const auto tiles = [&]<int kOf>() __attribute__((always_inline)) {
      if constexpr (kFew > 0) {
        if (batch <= kFew) {
          for_row_tiles<kFew>(rows, [&]<int kRows>(RowTile tile) { f.template operator()<2, kRows, kOf>(tile); });
          return;
        }
      }
      for_row_tiles<kMostRows>(rows, [&]<int kRows>(RowTile tile) { f.template operator()<1, kRows, kOf>(tile); });
    };
    if (vectors == kMost) {
      tiles.template operator()<kMost>();
    } else {
      with_number<kMost - 1>(vectors, tiles);
    }
  }

  // sums [kRows][kOf][lanes] = a block times the rows of a tile of [.., padded(depth)]. `next` is multiplied after it.
  template <int kPartials, int kRows, int kOf>
  static FASTRNN_INLINE void multiply(T* sums, const char* block, const char* next, const T* rows, RowTile tile,
                                      int64_t depth, const char* quantised, bool int8_dot) {
    Operand a[kRows];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) a[r] = Weights::operand(rows, tile.first + r, depth, quantised);
    Weights::template multiply<kPartials, kRows, kOf>(sums, block, next, tile, a, depth, int8_dot);
  }

  // The second phase: h = W_hr (o tanh(c)).
  static void project(const StreamingStep<T>& s, const Layout& layout) {
    const char* packed = static_cast<const char*>(s.packed);
    const int64_t outputs = padded(s.shape.outputs);
    Weights::prepare(s.activation, s.batch, s.shape.units, s.quantised);
    for (int64_t b = 0; b < layout.output_blocks; ++b) {
      const char* const weights = packed + layout.output_begin(b);
      const char* const next = packed + layout.output_begin(std::min(b + 1, layout.output_blocks - 1));
      const auto multiplied = [&]<int kPartials, int kRows, int kOf>(RowTile tile) {
        alignas(64) T sums[kRows * kOf * kLanes];
        multiply<kPartials, kRows, kOf>(sums, weights, next, s.activation, tile, s.shape.units, s.quantised,
                                        s.int8_dot);
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kOf; ++v) {
            leave(s.next_h + (tile.first + r) * outputs, V::loadu(sums + (r * kOf + v) * kLanes),
                  b * kOutputs + v * kLanes, s.shape.outputs);
          }
        }
      };
      for_tiles<kOutputVectors>(s.batch, s.batch, layout.output_vectors(b), multiplied);
    }
  }

  // What lies beyond `size` stays zero: it is multiplied with zero weights, and must be no NaN.
  static FASTRNN_INLINE void leave(T* row, V value, int64_t j, int64_t size) {
    if (j < size) store(row + j, value, size - j);
  }

  // The cells of a block of `count` rows, kOfGate vectors of units, on what their inputs and states are multiplied by:
  // [count][stride] each, gates gate_units apart.
  template <int kOfGate>
  static FASTRNN_INLINE void cells(const StreamingStep<T>& s, int64_t row, int64_t count, int64_t first, const T* input,
                                   const T* recurrent, int64_t stride, int64_t gate_units, const T* bias) {
    for_row_tiles<kTurns>(count, [&]<int K>(RowTile tile) {
#pragma GCC unroll 32
      for (int u = 0; u < kOfGate; ++u) {
        Several<T, K> gate[kInputs];
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i) {
          const int64_t at = (tile.first + i) * stride + u * kLanes;
#pragma GCC unroll 32
          for (int g = 0; g < kInputs; ++g) gate[g].v[i] = V::loadu(bias + g * kUnits + u * kLanes);
#pragma GCC unroll 32
          for (int g = 0; g < kGates; ++g) {
            const V x = V::loadu(input + at + g * gate_units), h = V::loadu(recurrent + at + g * gate_units);
            if (g < kGates - kSeparate) {
              gate[g].v[i] = gate[g].v[i] + (x + h);
            } else {
              gate[g].v[i] = gate[g].v[i] + x;
              gate[g + kSeparate].v[i] = gate[g + kSeparate].v[i] + h;
            }
          }
        }
        cells_in_turn(s, row + tile.first, first + u * kLanes, gate);
      }
    });
  }

  // Those of a last block. Behind its units lie lanes of other gates, and mean nothing.
  [[gnu::noinline]] static void narrow_cells(const StreamingStep<T>& s, int64_t row, int64_t count, int64_t first,
                                             const T* input, const T* recurrent, int64_t stride, int64_t gate_units,
                                             const T* bias) {
    for (int64_t j = 0; first + j < s.shape.units; j += kLanes) {
      cells<1>(s, row, count, first + j, input + j, recurrent + j, stride, gate_units, bias + j);
    }
  }

  // Those of K rows from n on and of the units from j on.
  template <int K>
  static FASTRNN_INLINE void cells_in_turn(const StreamingStep<T>& s, int64_t n, int64_t j,
                                           const Several<T, K> (&gate)[kInputs]) {
    const int64_t units = padded(s.shape.units), outputs = padded(s.shape.outputs);
    Several<T, K> state(0), saved[Cell::kSaved];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      if constexpr (kState == ElementState::kCell) state.v[i] = V::loadu(s.c + (n + i) * units + j);
      if constexpr (kState == ElementState::kHidden) state.v[i] = V::loadu(s.h + (n + i) * outputs + j);
    }
    const Several<T, K> h = Cell::forward(gate, state, saved);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      if constexpr (kState == ElementState::kCell) store(s.c + (n + i) * units + j, state.v[i], s.shape.units - j);
      leave(s.shape.projected ? s.activation + (n + i) * units : s.next_h + (n + i) * outputs, h.v[i], j,
            s.shape.units);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
