// One step of one layer, a template of the cell, the type and the kind of weights. Block by block of units: the weights
// of the input and of the state, all gates of a unit together, are read once for all rows; the cell is applied while the
// sums are in L1. Of several steps the inputs are multiplied ahead: their weights are read once.
#pragma once

#include <new>
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
  static constexpr int kTileRows = std::min(Weights::kMostRows, max_rows(kVectors));  // at most
  static constexpr int kWaiting = kTurns > 1 ? 16 : 1;  // rows whose cells follow together, or a few more

  // A block of units, or the last one: as few vectors as hold its units, with the gates one behind the other.
  struct Block {
    int vectors;
    int64_t gate_units;  // from a gate to the next, in lanes
  };

  // Blocks of a kind, one behind the other, in bytes.
  struct Section {
    int64_t begin, block;

    int64_t at(int64_t b) const { return begin + b * block; }
  };

  // A packed layer, in bytes: this, what the input is multiplied by, what the state is, biases, and a projection. Up to
  // 1 MiB of weights lie section after section: steps whose inputs are multiplied ahead read one stream, up to 1.1 times
  // as fast. Others lie block after block: a single step reads one stream, from memory 1.05 times as fast.
  struct Layout {
    int64_t blocks, output_blocks;
    Block last;
    Section input, recurrent, bias, output;
    int64_t bytes;

    explicit Layout(const LayerShape& shape)
        : blocks(fastrnn::blocks(shape.units, kUnits)),
          output_blocks(shape.projected ? fastrnn::blocks(shape.outputs, kOutputs) : 0),
          last{kVectors, kUnits} {
      constexpr int64_t kSmall = 1 << 20, kBiases = whole_lines(kInputs * kUnits * sizeof(T));
      const int64_t left = shape.units - (blocks - 1) * kUnits;
      if (const int vectors = vectors_for<kVectors>(kGates * left); vectors < kVectors) last = {vectors, left};
      const int64_t x = Weights::block_bytes(shape.inputs, kVectors), h = Weights::block_bytes(shape.outputs, kVectors);
      const int64_t block = x + h + kBiases, all = blocks * block;
      const int64_t begin = whole_lines(sizeof(Layout));
      if (all <= kSmall) {
        input = {begin, x}, recurrent = {begin + blocks * x, h}, bias = {begin + blocks * (x + h), kBiases};
      } else {
        input = {begin, block}, recurrent = {begin + x, block}, bias = {begin + x + h, block};
      }
      output = {begin + all, Weights::block_bytes(shape.units, kOutputVectors)};
      bytes = output.at(output_blocks);
    }

    Block block(int64_t b) const { return b + 1 < blocks ? Block{kVectors, kUnits} : last; }
  };

  // Of blocks of at most kMost.
  template <int kMost>
  static int vectors_for(int64_t lanes) {
    return static_cast<int>(std::min<int64_t>(kMost, fastrnn::blocks(lanes, kLanes)));
  }
  static int output_vectors(const LayerShape& shape, int64_t b) {
    return vectors_for<kOutputVectors>(shape.outputs - b * kOutputs);
  }

 public:
  static int64_t packed_bytes(const LayerShape& shape) { return Layout(shape).bytes; }

  static void pack(const StreamingWeights<T>& weights, void* packed) {
    const LayerShape& shape = weights.shape;
    const Layout& layout = *new (packed) Layout(shape);
    char* const out = static_cast<char*>(packed);
    std::vector<T> biases(kInputs * shape.units);
    sum_biases(kGates, kSeparate, shape.units, weights.b_ih, weights.b_hh, biases.data());
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const int64_t first = b * kUnits;
      const Block block = layout.block(b);
      const auto pack_part = [&](const T* w, int64_t depth, char* part) {
        Weights::pack({w, kGates, shape.units, depth, first, block.vectors, block.gate_units}, part);
      };
      pack_part(weights.w_ih, shape.inputs, out + layout.input.at(b));
      pack_part(weights.w_hh, shape.outputs, out + layout.recurrent.at(b));
      T* bias = reinterpret_cast<T*>(out + layout.bias.at(b));
      for (int g = 0; g < kInputs; ++g) {
        for (int64_t j = first; j < first + kUnits; ++j) *bias++ = j < shape.units ? biases[g * shape.units + j] : T(0);
      }
    }
    for (int64_t b = 0; b < layout.output_blocks; ++b) {
      Weights::pack({weights.w_hr, 1, shape.outputs, shape.units, b * kOutputs, output_vectors(shape, b), kOutputs},
                    out + layout.output.at(b));
    }
  }

  // [blocks][rows][vectors][lanes]
  static int64_t product_bytes(const LayerShape& shape, int64_t rows) {
    return Layout(shape).blocks * rows * kWidth * sizeof(T);
  }

  static void multiply_inputs(const StreamingStep<T>& s) {
    const Layout& layout = *static_cast<const Layout*>(s.packed);
    const char* packed = static_cast<const char*>(s.packed);
    Weights::prepare(s.input, s.ahead, s.shape.inputs, s.quantised);
    for (int64_t b = 0; b < layout.blocks; ++b) {
      T* const products = s.products + b * s.ahead * kWidth;
      const char* const weights = packed + layout.input.at(b);
      const char* const next = packed + layout.input.at(std::min(b + 1, layout.blocks - 1));
      for_tiles<kVectors>(s.batch, s.ahead, layout.block(b).vectors,
                          [&]<int kPartials, int kRows, int kOf>(RowTile tile) {
                            multiply<kPartials, kRows, kOf>(products + tile.first * kOf * kLanes, weights, next,
                                                            s.input, tile, s.shape.inputs, s.quantised, s.int8_dot);
                          });
    }
  }

  static void step(const StreamingStep<T>& s) {
    const Layout& layout = *static_cast<const Layout*>(s.packed);
    char* const of_h = s.quantised;
    char* const of_x = of_h == nullptr ? nullptr : of_h + s.batch * quantised_row(s.shape.outputs);
    Weights::prepare(s.h, s.batch, s.shape.outputs, of_h);
    if (s.ahead == 0) Weights::prepare(s.input, s.batch, s.shape.inputs, of_x);
    const bool each = s.batch <= kTileRows || s.shape.inputs + s.shape.outputs > kManyK;
    if constexpr (kWaiting > 1) {
      if (!each) units<false>(s, layout, of_h, of_x);
    }
    if (kWaiting == 1 || each) units<true>(s, layout, of_h, of_x);
    if constexpr (Cell::kProjects) {
      if (s.shape.projected) project(s, layout);
    }
  }

 private:
  // The weights of a block, and those that follow.
  struct Operands {
    const char *input, *next_input, *recurrent, *next_recurrent;
  };

  template <int kPartials, int kRows, int kOf>
  static FASTRNN_INLINE void multiply_both(const StreamingStep<T>& s, const Operands& w, RowTile tile, T* of_input,
                                           T* recurrent, const char* of_x, const char* of_h) {
    if (s.ahead == 0) {
      multiply<kPartials, kRows, kOf>(of_input, w.input, w.next_input, s.input, tile, s.shape.inputs, of_x, s.int8_dot);
    }
    multiply<kPartials, kRows, kOf>(recurrent, w.recurrent, w.next_recurrent, s.h, tile, s.shape.outputs, of_h,
                                    s.int8_dot);
  }

  // All blocks of units. kEach: cells follow each tile. That has a loop of its own: the other's rows that wait made a
  // single step 1.03 times as slow.
  template <bool kEach>
  static FASTRNN_INLINE void units(const StreamingStep<T>& s, const Layout& layout, char* of_h, char* of_x) {
    const char* packed = static_cast<const char*>(s.packed);
    for (int64_t i = 0; i < layout.blocks; ++i) {
      const auto visited = [&](int64_t at) { return s.backwards ? layout.blocks - 1 - at : at; };
      const int64_t b = visited(i), after = visited(std::min(i + 1, layout.blocks - 1));
      const Block block = layout.block(b);
      const T* const bias = reinterpret_cast<const T*>(packed + layout.bias.at(b));
      const T* const products = s.products + b * s.ahead * kWidth;
      const Operands w{packed + layout.input.at(b), packed + layout.input.at(after), packed + layout.recurrent.at(b),
                       packed + layout.recurrent.at(after)};
      if constexpr (kEach) {
        for_tiles<kVectors>(s.batch, s.batch, block.vectors, [&]<int kPartials, int kRows, int kOf>(RowTile tile) {
          constexpr int64_t kStride = kOf * kLanes;
          // a vector more: a narrow block's last gate is read whole
          alignas(64) T recurrent[kRows * kStride + kLanes], of_input[kRows * kStride + kLanes];
          multiply_both<kPartials, kRows, kOf>(s, w, tile, of_input, recurrent, of_x, of_h);
          const T* const input = s.ahead > 0 ? products + (s.first + tile.first) * kStride : of_input;
          if constexpr (kOf == kVectors) {
            cells<kUnitVectors>(s, tile.first, kRows, b * kUnits, input, recurrent, kStride, kUnits, bias);
          } else {
            shared_cells(s, tile.first, kRows, b * kUnits, input, recurrent, kStride, block.gate_units, bias);
          }
        });
      } else {
        constexpr int64_t kSums = (kWaiting - 1 + kTileRows) * kWidth + kLanes;
        alignas(64) T recurrent[kSums], of_input[kSums];
        int64_t waiting = 0;  // rows
        for_tiles<kVectors>(s.batch, s.batch, block.vectors, [&]<int kPartials, int kRows, int kOf>(RowTile tile) {
          constexpr int64_t kStride = kOf * kLanes;
          multiply_both<kPartials, kRows, kOf>(s, w, tile, of_input + waiting * kStride, recurrent + waiting * kStride,
                                               of_x, of_h);
          waiting += kRows;
          if (waiting >= kWaiting || tile.index + 1 == tile.count) {
            const int64_t first = tile.first + kRows - waiting;
            shared_cells(s, first, waiting, b * kUnits, s.ahead > 0 ? products + (s.first + first) * kStride : of_input,
                         recurrent, kStride, block.gate_units, bias);
            waiting = 0;
          }
        });
      }
    }
  }

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
      const char* const weights = packed + layout.output.at(b);
      const char* const next = packed + layout.output.at(std::min(b + 1, layout.output_blocks - 1));
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
      for_tiles<kOutputVectors>(s.batch, s.batch, output_vectors(s.shape, b), multiplied);
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

  // The same of a whole block or a last one. Behind the units of that lie lanes of other gates, and mean nothing.
  [[gnu::noinline]] static void shared_cells(const StreamingStep<T>& s, int64_t row, int64_t count, int64_t first,
                                             const T* input, const T* recurrent, int64_t stride, int64_t gate_units,
                                             const T* bias) {
    for (int64_t j = 0; j < kUnits && first + j < s.shape.units; j += kLanes) {
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
