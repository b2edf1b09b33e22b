// The backward scan: the gradients of the gate pre-activations, step by step against the scan's direction. The gradients
// of weights, biases and input are GEMMs over all steps, and not done here.
#pragma once

#include "cpu/pairs.h"
#include "cpu/scan_common.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

template <class Cell, class T>
class BackwardScan : public ScanEntry<BackwardScan<Cell, T>, BackwardParams<T>> {
  friend ScanEntry<BackwardScan<Cell, T>, BackwardParams<T>>;
  using V = Vec<T>;
  static constexpr int kLanes = V::size();
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate;
  static constexpr int kGradients = kGates + kSeparate;  // columns of grad_gates, in units of H
  static constexpr int kVectors = 4;
  static constexpr int64_t kWidth = kVectors * kLanes;
  static constexpr int kTileRows = max_rows(kVectors);
  static constexpr ElementState kState = Cell::kState;
  static constexpr bool kHasPairs = std::is_same_v<T, float>;

  // The element state of every step: in the reserve, or the output itself.
  using State = std::conditional_t<kState == ElementState::kHidden, Stored<T>, const T*>;

  // Where one row of the batch finds and leaves things in one step.
  struct Row {
    const T* next_gates;  // [(G+S)*H] gate gradients of the step that h_t flows into, or zeros; null if rounded
    const T* saved;  // [kSaved*H]
    State previous;  // [H] the element state that entered the step
    Stored<T> grad_output;  // [outputs]
    const T* grad_h_n;  // [outputs] or null
    const T* grad_c_n;  // [H] or null
    const T* grad_cells;  // [H] or null
    const T* carry_in;  // [H] or null
    T* carry;  // [H]
    T* grad_gates;  // [(G+S)*H] or null
    at::BFloat16* rounded_gates;  // [(G+S)*H] in its place, or null
    T* grad_projected;  // [P] projected only
    at::BFloat16* operand;  // [G*H] products of bfloat16 only: for the next step's, null after the last
    bool cut;  // of those: no state flows into this step, and nothing back
  };

  struct Scratch {
    T* packed;  // [blocks of outputs][G*H][kVectors][lanes], or pairs of G*H. The last block may have fewer vectors
    Operands operands;  // products of bfloat16 only: the recurrent gate gradients
    T* projection;  // [blocks of H][P][kVectors][lanes]
    T* partial;  // [members][N][kWidth] sums over some of the chunks
    T* zeros;  // [max((G+S)*H, outputs)]
    Row* rows;  // [members][N]
  };

  const Scan& scan_;
  const LayerShape& shape_;
  const Rows& rows_;
  const BackwardParams<T>& p_;
  const Scratch& s_;
  const Place& place_;

  BackwardScan(const Scan& scan, const BackwardParams<T>& params, const Scratch& scratch, const Place& place)
      : scan_(scan), shape_(scan.shape), rows_(scan.rows), p_(params), s_(scratch), place_(place) {}

  static int64_t zeros_width(const LayerShape& shape) { return std::max(kGradients * shape.units, shape.outputs); }

  static Scratch lay_out(const Scan& scan, Arena& arena) {
    const LayerShape& shape = scan.shape;
    Scratch s;
    // a single step has no recurrent product: nothing to pack
    s.packed = arena.take<T>(scan.rows.steps > 1 ? blocks(shape.outputs, kWidth) * depth(scan) * kWidth : 0);
    if (scan.plan.parts > 0) {
      s.operands = Operands(scan.rows.batch, operand_width(scan, kGates * shape.units), scan.plan);
      s.operands.take(arena);
    }
    s.projection = arena.take<T>(shape.projected ? blocks(shape.units, kWidth) * shape.outputs * kWidth : 0);
    s.partial = arena.take<T>(scan.plan.threads * std::max(scan.rows.batch, s.operands.rows()) * kWidth);
    s.zeros = arena.take<T>(zeros_width(shape));
    s.rows = arena.take<Row>(scan.plan.threads * scan.rows.batch);
    return s;
  }

  // Of a block of packed weights, in elements of T.
  static int64_t depth(const Scan& scan) {
    const int64_t gates = kGates * scan.shape.units;
    const int parts = scan.plan.parts;
    return parts > 0 ? parts * operand_width(scan, gates) / 2 : gates;
  }

  // f(the gate gradients) of a row or of all, in the type that they have.
  template <class Owner, class F>
  static FASTRNN_INLINE void with_gates(const Owner& of, const F& f) {
    if (of.rounded_gates != nullptr) {
      f(of.rounded_gates);
    } else {
      f(of.grad_gates);
    }
  }

  // Where row i of step t's order has its results.
  int64_t grad_row(int64_t t, int64_t i) const {
    return p_.grad_offset == nullptr ? rows_.row(t, rows_.order[i]) : p_.grad_offset[t] + i;
  }

  // The step of visit s, and the visit of step s.
  int64_t visit(int64_t s) const { return p_.reverse ? s : rows_.steps - 1 - s; }

  int64_t unit_blocks() const { return blocks(shape_.units, kWidth); }
  int64_t output_blocks() const { return blocks(shape_.outputs, kWidth); }
  int vectors_of(int64_t block) const {  // of outputs
    return static_cast<int>(std::min<int64_t>(kVectors, blocks(shape_.outputs - block * kWidth, kLanes)));
  }

  void visit_steps() const {
    if (scan_.first_visit == 0) {
      prepare();
      place_.wait();
    }
    Row* rows = s_.rows + place_.member * rows_.batch;
    for (int64_t s = scan_.first_visit; s < std::min(scan_.end_visit, rows_.steps); ++s) {
      const int64_t t = visit(s);
      const int64_t count = find_rows(t, s, rows);
      if (!Cell::kProjects || !shape_.projected) {
        if (count > 0) phase<false>(s, rows, count);
      } else if constexpr (Cell::kProjects) {
        if (count > 0) phase<true>(s, rows, count);
        place_.wait_for_units();
        if (count > 0) projection_phase(s, rows, count);
      }
      place_.wait_for_units();
    }
    if (scan_.plan.parts > 0) scan_.bf16->release();
    finish_rows();
  }

  void prepare() const {
    if (place_.member == 0) std::fill_n(s_.zeros, zeros_width(shape_), T(0));
    if (rows_.steps > 1) {
      const Range range = share(output_blocks(), place_.member, place_.members);
      for (int64_t b = range.begin; b < range.end; ++b) {
        T* block = s_.packed + b * depth(scan_) * kWidth;
        with_stored(p_.w_hh, [&](const auto* w) {
          if constexpr (kHasPairs) {
            if (scan_.plan.parts > 0) {
              pack_columns_in_pairs<kVectors>(scan_.plan.parts, w, shape_.outputs, kGates * shape_.units, b,
                                              reinterpret_cast<at::BFloat16*>(block), s_.operands.width());
              return;
            }
          }
          with_number<kVectors>(vectors_of(b), [&]<int kUsed>() {
            pack_columns<kUsed>(w, shape_.outputs, kGates * shape_.units, b * kWidth, block);
          });
        });
      }
    }
    if (scan_.plan.parts > 0) s_.operands.clear(place_);
    if (Cell::kProjects && shape_.projected) {
      const Range range = share(unit_blocks(), place_.member, place_.members);
      for (int64_t b = range.begin; b < range.end; ++b) {
        with_stored(p_.w_hr, [&](const auto* w) {
          pack_columns<kVectors>(w, shape_.units, shape_.outputs, b * kWidth,
                                 s_.projection + b * shape_.outputs * kWidth);
        });
      }
    }
  }

  int64_t find_rows(int64_t t, int64_t s, Row* rows) const {
    const Range range = place_.rows(rows_.batch);
    const int64_t end = std::min(range.end, rows_.active[t]);
    const int64_t outputs = shape_.outputs, units = shape_.units;
    const int64_t next = p_.reverse ? t - 1 : t + 1, before = p_.reverse ? t + 1 : t - 1;
    at::BFloat16* operands = s_.operands.of_step(s + 1, place_);
    for (int64_t i = range.begin; i < end; ++i) {
      const int64_t n = rows_.order[i], row = rows_.row(t, n);
      const Sequence sequence = rows_.sequence(n);
      const bool last = sequence.last(t, p_.reverse);
      const bool flows_on = !last && sequence.flows(next, p_.reverse);
      Row& r = rows[i - range.begin];
      const auto gates_of = [&](auto* all, int64_t step) {
        return all == nullptr ? nullptr : all + grad_row(step, i) * kGradients * units;
      };
      r.next_gates = flows_on ? gates_of(p_.grad_gates, next) : s_.zeros;
      r.carry = p_.carry + n * units;
      r.carry_in = flows_on ? r.carry : nullptr;
      r.saved = p_.reserve + row * p_.reserve_stride;
      const bool flows = sequence.flows(t, p_.reverse), enters = sequence.enters(t, p_.reverse);
      if constexpr (kState == ElementState::kCell) {
        r.previous = flows ? p_.reserve + rows_.row(before, n) * p_.reserve_stride + (Cell::kSaved - 1) * units
                     : enters && p_.c0 != nullptr ? p_.c0 + n * units
                                                  : s_.zeros;
      } else if constexpr (kState == ElementState::kHidden) {
        r.previous = flows                        ? p_.output.from(rows_.row(before, n) * p_.output_stride)
                     : enters && p_.h0 != nullptr ? p_.h0 + n * outputs
                                                  : s_.zeros;
      }
      r.grad_output = p_.grad_output.data == nullptr ? s_.zeros : p_.grad_output.from(row * p_.grad_output_stride);
      r.grad_cells = p_.grad_cells == nullptr ? nullptr : p_.grad_cells + row * p_.grad_cells_stride;
      r.grad_h_n = last && p_.grad_h_n != nullptr ? p_.grad_h_n + n * outputs : nullptr;
      r.grad_c_n = last && p_.grad_c_n != nullptr ? p_.grad_c_n + n * units : nullptr;
      r.grad_gates = gates_of(p_.grad_gates, t);
      r.rounded_gates = gates_of(p_.rounded_gates, t);
      r.grad_projected = shape_.projected ? p_.grad_projected + grad_row(t, i) * outputs : nullptr;
      r.operand = nullptr;
      if (scan_.plan.parts > 0 && s + 1 < rows_.steps && i < rows_.active[before]) {
        r.operand = operands + (i - range.begin) * s_.operands.stride();
        r.cut = !flows;
      }
    }
    return std::max<int64_t>(0, end - range.begin);
  }

  // grad_h_t for one block of its columns. Unprojected, these are units, and the cell follows while it is in L1.
  template <bool kProjected>
  void phase(int64_t s, const Row* rows, int64_t count) const {
    const int64_t depth = s > 0 ? kGates * shape_.units : 0;
    zigzag(place_.blocks(output_blocks()), s, [&](int64_t block, int64_t next) {
      if (scan_.plan.parts > 0) {
        if constexpr (kHasPairs) products<kProjected>(s, rows, count, block);
        return;
      }
      with_vectors<kVectors>(vectors_of(block), [&](auto vectors) {
        for_chunks<kWidth * sizeof(T)>(depth, [&](const Chunk& chunk) {
          const Part part = part_of(block, vectors, next, chunk);
          for_row_tiles<kTileRows>(count, [&]<int kRows>(RowTile tile) {
            T* const sums = s_.partial + (place_.member * rows_.batch + tile.first) * kWidth;
            this->template hidden_tile<kRows>(rows + tile.first, tile, part, vectors, sums);
            if (chunk.last) hidden_sums<kProjected, false>(rows + tile.first, kRows, sums, vectors * kLanes, block);
          });
        });
      });
    });
  }

  // The same from products of bfloat16.
  template <bool kProjected>
  void products(int64_t s, const Row* rows, int64_t count, int64_t block) const {
    T* sums = s_.partial + place_.member * s_.operands.rows() * kWidth;
    const int64_t width = s_.operands.width();
    const auto* w = reinterpret_cast<const at::BFloat16*>(s_.packed + block * depth(scan_) * kWidth);
    for_products(scan_.plan, count, [&](int64_t first, int64_t some, int64_t height) {
      if (!kProjected) {
        for (int64_t i = first; i < first + some; ++i) prefetch_row(rows[i], block * kWidth);
      }
      if (s == 0) {
        std::fill_n(sums, some * kWidth, T(0));
      } else {
        const at::BFloat16* gates = s_.operands.of_step(s, place_) + first * s_.operands.stride();
        multiply_rows(scan_, height, some, kWidth, width, s_.operands, gates, w, sums, kWidth);
      }
      if (p_.rounded_gates != nullptr) {
        hidden_sums<kProjected, true>(rows + first, some, sums, kWidth, block);
      } else {
        hidden_sums<kProjected, false>(rows + first, some, sums, kWidth, block);
      }
      if (!kProjected) leave_operands(rows + first, some, block);
    });
  }

  // The recurrent gate gradients of a block of units, for the products of the next step.
  void leave_operands(const Row* rows, int64_t count, int64_t block) const {
    const int64_t units = shape_.units, begin = block * kWidth, width = std::min(kWidth, units - begin);
    for (const Row* row = rows; row < rows + count; ++row) {
      for (int g = 0; g < kGates && row->operand != nullptr; ++g) {
        // the separate gates have their recurrent parts behind those of all gates
        const int from = g < kGates - kSeparate ? g : g + kSeparate;
        with_gates(*row, [&](const auto* gates) {
          leave_operand(scan_.plan.parts, row->operand + g * units + begin, s_.operands.width(),
                        gates + from * units + begin, width, row->cut);
        });
      }
    }
  }

  // What the tiles of a chunk have in common. The separate gates have their recurrent parts behind those of all gates.
  struct Part {
    PackedChunk<T> weights;
    Segment together, apart;
    int64_t asked;  // the unit from which on rows are asked for what the cells load, or -1
  };

  FASTRNN_INLINE Part part_of(int64_t block, int vectors, int64_t next, const Chunk& chunk) const {
    const int64_t units = shape_.units, adding = (kGates - kSeparate) * units;
    const int64_t together = std::clamp<int64_t>(adding - chunk.begin, 0, chunk.depth());
    return {packed_chunk<kVectors>(s_.packed, kGates * units, block, vectors, next, chunk),
            {chunk.begin, together, !chunk.first},
            {chunk.begin + together + kSeparate * units, chunk.depth() - together, true},
            chunk.last && !shape_.projected ? block * kWidth : -1};
  }

  template <int kRows, class Vectors>
  [[gnu::noinline]] void hidden_tile(const Row* rows, const RowTile& tile, const Part& part, Vectors vectors,
                                     T* partial) const {
    if (part.asked >= 0) {
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) prefetch_row(rows[r], part.asked);
    }
    const Packed<T> w = part.weights.template of<kVectors>(tile);
    const auto gates = [&](int r) { return rows[r].next_gates; };
    accumulate<kRows, kVectors>(vectors, partial, w, part.together, gates);
    if constexpr (kSeparate > 0) {
      accumulate<kRows, kVectors>(vectors, partial, w.from(part.together.depth, vectors), part.apart, gates);
    }
  }

  // What follows on the sums of a tile, [rows][width]. A loop of its own: unrolled within each tile it would be
  // more code than the processor keeps decoded.
  template <bool kProjected, bool kRounded>
  [[gnu::noinline]] void hidden_sums(const Row* rows, int64_t row_count, const T* sums, int64_t width,
                                     int64_t block) const {
#pragma GCC unroll 1
    for (int64_t r = 0; r < row_count; ++r, sums += width) {
#pragma GCC unroll 1
      for (int64_t k = 0; k < width; k += kLanes) {
        const int64_t j = block * kWidth + k, count = shape_.outputs - j;
        if (count <= 0) break;
        const V grad_h = V::loadu(sums + k) + incoming(rows[r], j, count);
        if constexpr (kProjected) {
          store(rows[r].grad_projected + j, grad_h, count);
        } else {
          finish<kRounded>(rows[r], j, grad_h, count);
        }
      }
    }
  }

  FASTRNN_INLINE void prefetch_row(const Row& row, int64_t j) const {
    prefetch<Cell::kSaved, kVectors>(row.saved + j, shape_.units);
    const auto ahead = [&](const Stored<T>& of) {
      with_stored(of, [&](const auto* p) { prefetch<1, kVectors * sizeof(*p) / sizeof(T)>(p + j, 0); });
    };
    if (kState != ElementState::kNone) ahead(row.previous);
    ahead(row.grad_output);
  }

  // What reaches h_t but by the recurrent product.
  FASTRNN_INLINE V incoming(const Row& row, int64_t j, int64_t count) const {
    V x = load(row.grad_output, j, count);
    if (row.grad_h_n != nullptr) x = x + load(row.grad_h_n + j, count);
    if (kState == ElementState::kHidden && row.carry_in != nullptr) x = x + load(row.carry_in + j, count);
    return x;
  }

  void projection_phase(int64_t s, const Row* rows, int64_t count) const {
    zigzag(place_.blocks(unit_blocks()), s, [&](int64_t block, int64_t next) {
      for_row_tiles<kTileRows>(count, [&]<int kRows>(RowTile i) { projection_tile<kRows>(rows, i, block, next); });
      if constexpr (kHasPairs) {
        if (scan_.plan.parts > 0) leave_operands(rows, count, block);
      }
    });
  }

  template <int kRows>
  void projection_tile(const Row* all_rows, RowTile tile, int64_t block, int64_t next) const {
    const Row* rows = all_rows + tile.first;
    T sums[kRows][kWidth];
    const auto weights = packed_chunk<kVectors>(s_.projection, shape_.outputs, block, kVectors, next,
                                                Chunk{0, shape_.outputs});
    accumulate<kRows, kVectors>(kVectors, sums[0], weights.template of<kVectors>(tile), {0, shape_.outputs, false},
                                [&](int r) { return rows[r].grad_projected; });
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t j = block * kWidth + v * kLanes, count = shape_.units - j;
        if (count <= 0) break;
        const V grad_h = V::loadu(sums[r] + v * kLanes);
        if constexpr (kHasPairs) {
          if (rows[r].rounded_gates != nullptr) {
            finish<true>(rows[r], j, grad_h, count);
            continue;
          }
        }
        finish<false>(rows[r], j, grad_h, count);
      }
    }
  }

  // The cell. kRounded: its results are in rounded_gates.
  template <bool kRounded>
  FASTRNN_INLINE void finish(const Row& row, int64_t j, V grad_h, int64_t count) const {
    const int64_t units = shape_.units;
    V saved[Cell::kSaved];
#pragma GCC unroll 32
    for (int c = 0; c < Cell::kSaved; ++c) saved[c] = load(row.saved + c * units + j, count);
    const V previous = kState == ElementState::kNone ? V(0) : load(row.previous, j, count);
    V carry(0);
    if constexpr (kState == ElementState::kCell) {
      if (row.carry_in != nullptr) carry = carry + load(row.carry_in + j, count);
      if (row.grad_c_n != nullptr) carry = carry + load(row.grad_c_n + j, count);
      if (row.grad_cells != nullptr) carry = carry + load(row.grad_cells + j, count);
    }
    V grad_gate[kGradients];
    Cell::backward(saved, previous, grad_h, carry, grad_gate);
#pragma GCC unroll 32
    for (int g = 0; g < kGradients; ++g) {
      if constexpr (kRounded) {
        store(row.rounded_gates + g * units + j, grad_gate[g], count);
      } else {
        store(row.grad_gates + g * units + j, grad_gate[g], count);
      }
    }
    if (kState != ElementState::kNone) store(row.carry + j, carry, count);
  }

  // What flows into the initial states: the gate gradients and the carry of each row's first step, if they enter there. Of
  // rows with no step after the last visit.
  void finish_rows() const {
    if (p_.grad_first == nullptr) return;
    place_.wait();
    const int64_t units = shape_.units;
    const Range batch = share(rows_.batch, place_.member, place_.members);
    for (int64_t i = batch.begin; i < batch.end; ++i) {
      const int64_t n = rows_.order[i];
      const Sequence sequence = rows_.sequence(n);
      const int64_t length = sequence.length, t = p_.reverse ? length - 1 : 0;
      const int64_t s = length > 0 ? visit(t) : rows_.steps - 1;
      if (s < scan_.first_visit || s >= scan_.end_visit) continue;
      T* first = p_.grad_first + n * kGates * units;
      T* carry = p_.carry + n * units;
      if (length > 0 && sequence.enters(t, p_.reverse)) {
        constexpr int kAdding = kGates - kSeparate;
        with_gates(p_, [&](const auto* all) {
          const auto* gates = all + grad_row(t, i) * kGradients * units;
          std::copy_n(gates, kAdding * units, first);
          std::copy_n(gates + kGates * units, kSeparate * units, first + kAdding * units);
        });
      } else {
        std::fill_n(first, kGates * units, T(0));
        const bool passes = length == 0 && kState == ElementState::kCell && p_.grad_c_n != nullptr;
        for (int64_t j = 0; j < units; ++j) carry[j] = passes ? p_.grad_c_n[n * units + j] : T(0);
      }
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
