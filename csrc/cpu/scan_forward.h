// The forward scan: for every step, a recurrent projection in register tiles, all gates of a unit together, and the cell
// on the sums while they are in L1. With a projection a second phase follows, h = W_hr (o tanh(c)).
#pragma once

#include "cpu/pairs.h"
#include "cpu/scan_common.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

template <class Cell, class T>
class ForwardScan : public ScanEntry<ForwardScan<Cell, T>, ForwardParams<T>> {
  friend ScanEntry<ForwardScan<Cell, T>, ForwardParams<T>>;
  using V = Vec<T>;
  static constexpr int kLanes = V::size();
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate;
  static constexpr int kUnitVectors = kGates == 1 ? 4 : 1;  // a tile about four vectors wide, for any number of gates
  static constexpr int kVectors = kGates * kUnitVectors;
  static constexpr int64_t kWidth = kVectors * kLanes;
  static constexpr int64_t kUnits = kUnitVectors * kLanes;  // of a block
  static constexpr int kAdding = kGates - kSeparate;  // gates whose two parts add
  // A fused input's part of the gates is a sum of its own in a cell where some gates need the parts apart.
  static constexpr bool kInputApart = kSeparate > 0;
  static constexpr int64_t kPartial = (kInputApart ? 2 : 1) * kWidth;  // of a row
  static constexpr int kTileRows = max_rows(kVectors);
  static constexpr int kFewRows = 2;  // fewer than kCellsInTurn where that is more than one
  static constexpr int kOutputVectors = 4;  // of a tile of the projection
  static constexpr int64_t kOutputs = kOutputVectors * kLanes;
  static constexpr int kOutputRows = max_rows(kOutputVectors);
  static constexpr ElementState kState = Cell::kState;
  static constexpr bool kHasPairs = std::is_same_v<T, float>;

  // Where one row of the batch finds and leaves things in one step.
  struct Row {
    const T* h;  // [outputs] the state that enters
    const T* state;  // [H] the element state that enters
    const T* input;  // [I] fused input only
    const T* product;  // [G*H] kProduct only
    T* gates;  // [G*H] the input projection; with save, the reserve; null if neither
    T* activation;  // [H] projected only: o tanh(c), before the projection
    T* next;  // [outputs] where the next step finds h, unless it has it as an operand only
    Written<T> output;  // [outputs]
    T* cell;  // [H] kCell only: c, in place
    T* cells;  // [H] or null
    T* h_n;  // [outputs] or null: not the row's last step
    at::BFloat16* operand;  // [outputs] products of bfloat16 only: h for the next step's, null after the last
    bool cut;  // of those: the next step begins anew, with zeros
  };

  // A row of some step, whose input is multiplied ahead of it.
  struct RowAhead {
    const T* input;  // [I]
    T* gates;  // [G*H]
  };

  struct Scratch {
    // Fused input: the rows of W_ih, then those of W_hh; or pairs of them. The last block has vectors_of() vectors.
    T* packed;  // [blocks][depth()][kVectors][lanes]
    // Input ahead: the rows of W_ih.
    T* packed_input;  // [blocks][I][kVectors][lanes]
    T* projections;  // [rows_ahead(), G*H] of the steps that the input is multiplied for
    RowAhead* ahead;  // [members][rows_ahead()]
    T* converted;  // [members][rows_ahead(), whole_inputs()] their inputs, where those have 16 bits
    Operands operands;  // products of bfloat16 only: x and h, each of its operand_width
    T* partial;  // [members][sums_of_member()] sums of rows, each of kPartial: of a block, or of few rows those of all
    T* projection;  // [blocks of P][H][kOutputVectors][lanes]
    T* h;  // [2][N, outputs]: read one, write the other
    T* activation;  // [N, H]
    T* zeros;  // [max(H, outputs)]
    Row* rows;  // [members][N]
  };

  const Scan& scan_;
  const LayerShape& shape_;
  const Rows& rows_;
  const ForwardParams<T>& p_;
  const Scratch& s_;
  const Place& place_;

  ForwardScan(const Scan& scan, const ForwardParams<T>& params, const Scratch& scratch, const Place& place)
      : scan_(scan), shape_(scan.shape), rows_(scan.rows), p_(params), s_(scratch), place_(place) {}

  static Scratch lay_out(const Scan& scan, Arena& arena) {
    const LayerShape& shape = scan.shape;
    const int64_t batch = scan.rows.batch, wide = std::max(shape.units, shape.outputs);
    const bool packed = scan.plan.recurrent == Recurrent::kPacked;
    Scratch s;
    s.packed = arena.take<T>(blocks(shape.units, kUnits) * depth(scan) * kWidth);
    if (scan.plan.parts > 0) {
      s.operands = Operands(batch, input_width(scan) + operand_width(scan, shape.outputs), scan.plan);
      s.operands.take(arena);
    }
    const int64_t ahead = rows_ahead(scan);
    s.packed_input = arena.take<T>(scan.plan.ahead > 0 ? blocks(shape.units, kUnits) * shape.inputs * kWidth : 0);
    s.projections = arena.take<T>(ahead * kGates * shape.units);
    s.ahead = arena.take<RowAhead>(scan.plan.threads * ahead);
    s.converted = arena.take<T>(scan.plan.threads * ahead * whole_inputs(scan));
    s.partial = arena.take<T>(scan.plan.threads * sums_of_member(scan, s.operands));
    s.projection = arena.take<T>(shape.projected && packed ? blocks(shape.outputs, kOutputs) * shape.units * kOutputs
                                                           : 0);
    s.h = arena.take<T>(2 * batch * shape.outputs);
    s.activation = arena.take<T>(shape.projected ? batch * shape.units : 0);
    s.zeros = arena.take<T>(wide);
    s.rows = arena.take<Row>(scan.plan.threads * batch);
    return s;
  }

  static int64_t sums_of_member(const Scan& scan, const Operands& operands) {
    const int64_t of_few = std::min<int64_t>(scan.rows.batch, kFewRows) * blocks(scan.shape.units, kUnits);
    return std::max({scan.rows.batch, rows_ahead(scan), operands.rows(), of_few}) * kPartial;
  }
  T* sums_of_member() const { return s_.partial + place_.member * sums_of_member(scan_, s_.operands); }

  static int64_t rows_ahead(const Scan& scan) { return scan.plan.ahead * scan.rows.batch; }
  static int64_t whole_inputs(const Scan& scan) { return rounded_up(scan.shape.inputs, kLanes); }

  // Of the input as part of an operand.
  static int64_t input_width(const Scan& scan) {
    return scan.plan.fused_input ? operand_width(scan, scan.shape.inputs) : 0;
  }
  // Of a block of packed weights, in elements of T.
  static int64_t depth(const Scan& scan) {
    if (scan.plan.recurrent != Recurrent::kPacked) return 0;
    const int parts = scan.plan.parts;
    if (parts > 0) return parts * (input_width(scan) + operand_width(scan, scan.shape.outputs)) / 2;
    return (scan.plan.fused_input ? scan.shape.inputs : 0) + scan.shape.outputs;
  }

  int64_t unit_blocks() const { return blocks(shape_.units, kUnits); }

  // The last block may have units for part of a vector, and its gates then lie one behind the other in as few vectors as
  // hold them.
  int64_t units_of(int64_t block) const { return std::min(kUnits, shape_.units - block * kUnits); }
  int vectors_of(int64_t block) const {
    return scan_.plan.parts > 0 ? kVectors : static_cast<int>(blocks(kGates * units_of(block), kLanes));
  }
  // Where the next gate of a row begins in the sums of so many vectors.
  int64_t gate_stride(int64_t block, int vectors) const { return vectors == kVectors ? kUnits : units_of(block); }
  int64_t output_blocks() const { return blocks(shape_.outputs, kOutputs); }

  void visit_steps() const {
    prepare();
    place_.wait();
    Row* rows = s_.rows + place_.member * rows_.batch;
    for (int64_t s = 0; s < rows_.steps; ++s) {
      const int64_t t = p_.reverse ? rows_.steps - 1 - s : s;
      if (scan_.plan.ahead > 0 && s % scan_.plan.ahead == 0) multiply_ahead(s);
      if (scan_.plan.fused_input) await_input(s);
      const int64_t count = find_rows(t, s, rows);
      if constexpr (kHasPairs) {
        if (scan_.plan.parts > 0 && s + 1 < rows_.steps) gather_input(s + 1);
      }
      if (count > 0) units_phase(s, rows, count);
      if constexpr (Cell::kProjects) {
        if (shape_.projected) {
          place_.wait_for_units();
          if (count > 0) projection_phase(s, rows, count);
        }
      }
      place_.wait_for_units();
      if (scan_.progress != nullptr) tell_progress(s + 1);
    }
    if (scan_.plan.parts > 0) scan_.bf16->release();
  }

  // Of a layer beside others of its stack.
  void await_input(int64_t s) const {
    if (scan_.below != nullptr) scan_.below->wait_for(std::min(rounded_up(s + 1, kStepsTogether), rows_.steps));
  }
  void tell_progress(int64_t steps) const {
    if (steps % kStepsTogether == 0 || steps == rows_.steps) scan_.progress->reach(steps);
  }

  // Packs this member's part of the weights, and gives rows without a single step their final state.
  void prepare() const {
    if (place_.member == 0) std::fill_n(s_.zeros, std::max(shape_.units, shape_.outputs), T(0));
    if (scan_.plan.recurrent == Recurrent::kPacked) {
      const Range units = share(unit_blocks(), place_.member, place_.members);
      for (int64_t b = units.begin; b < units.end; ++b) {
        T* block = s_.packed + b * depth(scan_) * kWidth;
        if constexpr (kHasPairs) {
          if (scan_.plan.parts > 0) {
            pack_pairs(b, block);
            continue;
          }
        }
        if (scan_.plan.ahead > 0) pack(p_.w_ih, shape_.inputs, b, s_.packed_input + b * shape_.inputs * kWidth);
        if (scan_.plan.fused_input) {
          pack(p_.w_ih, shape_.inputs, b, block);
          block += shape_.inputs * vectors_of(b) * kLanes;
        }
        pack(p_.w_hh, shape_.outputs, b, block);
      }
      if (Cell::kProjects && shape_.projected) {
        const Range outputs = share(output_blocks(), place_.member, place_.members);
        for (int64_t b = outputs.begin; b < outputs.end; ++b) {
          with_stored(p_.w_hr, [&](const auto* w) {
            pack_transposed<1, kOutputVectors, AsStored<T>>(w, shape_.outputs, shape_.units, b,
                                                            s_.projection + b * shape_.units * kOutputs);
          });
        }
      }
    }
    if constexpr (kHasPairs) {
      if (scan_.plan.parts > 0) {
        s_.operands.clear(place_);
        place_.wait();
        if (place_.member == 0 || !place_.shard_units) enter_states();
        if (rows_.steps > 0) gather_input(0);
      }
    }
    const Range batch = share(rows_.batch, place_.member, place_.members);
    for (int64_t n = batch.begin; n < batch.end; ++n) {
      if (rows_.length[n] > 0) continue;
      copy_or_zero(p_.h_n + n * shape_.outputs, p_.h0, n, shape_.outputs);
      if (kState == ElementState::kCell) copy_or_zero(p_.c_n + n * shape_.units, p_.c0, n, shape_.units);
    }
  }

  // Block b of a matrix [G*H, depth].
  void pack(const Stored<T>& matrix, int64_t depth, int64_t b, T* block) const {
    const int vectors = vectors_of(b);
    with_stored(matrix, [&](const auto* w) {
      if (vectors == kVectors) {
        pack_transposed<kGates, kUnitVectors, AsStored<T>>(w, shape_.units, depth, b, block);
      } else {
        pack_narrow<kGates>(w, shape_.units, depth, b * kUnits, vectors, block);
      }
    });
  }

  void pack_pairs(int64_t b, T* block) const {
    std::fill_n(block, depth(scan_) * kWidth, T(0));
    const int64_t apart = s_.operands.width() / 2 * kWidth;
    const auto pack_all = [&](const Stored<T>& matrix, int64_t columns, T* out) {
      with_stored(matrix, [&](const auto* w) {
        for (int part = 0; part < scan_.plan.parts; ++part) {
          pack_transposed<kGates, kUnitVectors>(w, shape_.units, columns, b, out + part * apart,
                                                Pair{scan_.plan.parts, part});
        }
      });
    };
    if (scan_.plan.fused_input) pack_all(p_.w_ih, shape_.inputs, block);
    pack_all(p_.w_hh, shape_.outputs, block + input_width(scan_) / 2 * kWidth);
  }

  // The states that enter, as operands: each row has them until its first step writes others.
  void enter_states() const {
    if (p_.h0 == nullptr) return;
    const Range range = place_.rows(rows_.batch);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t n = rows_.order[i];
      const Sequence sequence = rows_.sequence(n);
      if (sequence.length == 0 || !sequence.enters(p_.reverse ? sequence.length - 1 : 0, p_.reverse)) continue;
      for (int64_t s = 0; s < 2; ++s) {
        copy_parts(scan_.plan.parts, operand(s, i), s_.operands.width(), p_.h0 + n * shape_.outputs, shape_.outputs);
      }
    }
  }

  // Where row i of the batch, in the order of the scan, has h for step s; x lies before it.
  at::BFloat16* operand(int64_t s, int64_t i) const {
    const int64_t row = i - place_.rows(rows_.batch).begin;
    return s_.operands.of_step(s, place_) + row * s_.operands.stride() + input_width(scan_);
  }

  // The input of step s as operands: this member's rows, or its part of those that it shares.
  void gather_input(int64_t s) const {
    if (!scan_.plan.fused_input) return;
    await_input(s);
    const int64_t t = p_.reverse ? rows_.steps - 1 - s : s;
    const Range range = share(rows_.batch, place_.member, place_.members);
    const int64_t end = std::min(range.end, rows_.active[t]);
    with_stored(p_.input, [&](const auto* x) {
      for (int64_t i = range.begin; i < end; ++i) {
        copy_parts(scan_.plan.parts, operand(s, i) - input_width(scan_), s_.operands.width(),
                   x + rows_.row(t, rows_.order[i]) * shape_.inputs, shape_.inputs);
      }
    });
  }

  static void copy_or_zero(T* to, const T* from, int64_t n, int64_t width) {
    for (int64_t j = 0; j < width; ++j) to[j] = from == nullptr ? T(0) : from[n * width + j];
  }

  // The rows of this member that step t visits, into `rows`; how many there are. `s` counts steps in scan order.
  int64_t find_rows(int64_t t, int64_t s, Row* rows) const {
    const Range range = place_.rows(rows_.batch);
    const int64_t end = std::min(range.end, rows_.active[t]);
    const int64_t outputs = shape_.outputs, units = shape_.units;
    const T* now = s_.h + (s % 2) * rows_.batch * outputs;
    T* next = s_.h + (1 - s % 2) * rows_.batch * outputs;
    const int64_t after = p_.reverse ? t - 1 : t + 1;
    const bool fused = scan_.plan.fused_input && scan_.plan.parts == 0;
    const auto* input = fused ? static_cast<const T*>(p_.input.data) : nullptr;
    const bool follows = s + 1 < rows_.steps;
    // Of less than a vector a row costs more to ask for than to wait for; more than this would push weights out of L2.
    constexpr int64_t kMostBytes = 128 << 10;
    const bool ahead = follows && input != nullptr && shape_.inputs >= kLanes &&
                       (end - range.begin) * shape_.inputs * static_cast<int64_t>(sizeof(T)) <= kMostBytes;
    for (int64_t i = range.begin; i < end; ++i) {
      const int64_t n = rows_.order[i], row = rows_.row(t, n);
      const Sequence sequence = rows_.sequence(n);
      const bool flows = sequence.flows(t, p_.reverse), enters = sequence.enters(t, p_.reverse);
      Row& r = rows[i - range.begin];
      r.h = flows ? now + n * outputs : enters && p_.h0 != nullptr ? p_.h0 + n * outputs : s_.zeros;
      r.gates = scan_.plan.ahead > 0  ? gates_ahead(s, i)
                : p_.gates == nullptr ? nullptr
                                      : p_.gates + row * p_.gates_stride;
      r.input = input == nullptr ? nullptr : input + row * shape_.inputs;
      if (ahead && i < rows_.active[after]) prefetch_input(input + rows_.row(after, n) * shape_.inputs);
      r.product = p_.product == nullptr || !enters ? nullptr : p_.product + n * kGates * units;
      r.activation = s_.activation + n * units;
      r.next = next + n * outputs;
      r.output = p_.output.from(row * p_.output_stride);
      r.h_n = sequence.last(t, p_.reverse) ? p_.h_n + n * outputs : nullptr;
      r.operand = nullptr;
      if (scan_.plan.parts > 0 && follows && i < rows_.active[after]) {
        r.operand = operand(s + 1, i);
        r.cut = !sequence.flows(after, p_.reverse);
      }
      r.cells = p_.cells == nullptr ? nullptr : p_.cells + row * p_.cells_stride;
      if constexpr (kState == ElementState::kCell) {
        r.cell = p_.c_n + n * units;
        r.state = flows ? r.cell : enters && p_.c0 != nullptr ? p_.c0 + n * units : s_.zeros;
      } else {
        r.cell = nullptr;
        r.state = r.h;
      }
    }
    return std::max<int64_t>(0, end - range.begin);
  }

  // Asks for what the next step multiplies: a step is long enough for it to arrive.
  FASTRNN_INLINE void prefetch_input(const T* x) const {
    for (int64_t k = 0; k < shape_.inputs; k += kLanes) __builtin_prefetch(x + k, 0, 2);
  }

  // The input projection of row i, in the order of the scan, of step s.
  T* gates_ahead(int64_t s, int64_t i) const {
    return s_.projections + (s % scan_.plan.ahead * rows_.batch + i) * kGates * shape_.units;
  }

  // The input projections of the steps from s on, so many as are multiplied ahead: of this member's rows or units, which
  // no other reads.
  void multiply_ahead(int64_t s) const {
    const int64_t end = std::min(s + scan_.plan.ahead, rows_.steps), count_of_all = rows_ahead(scan_);
    await_input(end - 1);
    const Range range = place_.rows(rows_.batch);
    RowAhead* const rows = s_.ahead + place_.member * count_of_all;
    T* converted = s_.converted + place_.member * count_of_all * whole_inputs(scan_);
    int64_t count = 0;
    with_stored(p_.input, [&](const auto* input) {
      for (int64_t of = s; of < end; ++of) {
        const int64_t t = p_.reverse ? rows_.steps - 1 - of : of, active = std::min(range.end, rows_.active[t]);
        for (int64_t i = range.begin; i < active; ++i) {
          const auto* x = input + rows_.row(t, rows_.order[i]) * shape_.inputs;
          if constexpr (std::is_same_v<decltype(x), const T*>) {
            rows[count++] = {x, gates_ahead(of, i)};
          } else {
            AsStored<T>::copy(x, shape_.inputs, converted);
            rows[count++] = {converted, gates_ahead(of, i)};
            converted += whole_inputs(scan_);
          }
        }
      }
    });
    zigzag(place_.blocks(unit_blocks()), s / scan_.plan.ahead, [&](int64_t block, int64_t next) {
      const Sums sums = sums_of(sums_of_member(), count, block);
      with_vectors<kVectors>(vectors_of(block), [&](auto vectors) {
        for_chunks<kWidth * sizeof(T)>(shape_.inputs, [&](const Chunk& chunk) {
          const auto weights = packed_chunk<kVectors>(s_.packed_input, shape_.inputs, block, vectors, next, chunk);
          for_row_tiles<kTileRows>(count, [&]<int kRows>(RowTile tile) {
            accumulate<kRows, kVectors>(vectors, sums.from(tile.first).sums, weights.template of<kVectors>(tile),
                                        {chunk.begin, chunk.depth(), !chunk.first},
                                        [&](int r) { return rows[tile.first + r].input; });
          });
        });
      });
      for (int64_t r = 0; r < count; ++r) {
        for (int g = 0; g < kGates; ++g) {
          store_sums(rows[r].gates + g * shape_.units + block * kUnits, sums.from(r).sums + g * sums.gate_stride,
                     units_of(block), false);
        }
      }
    });
  }

  // What cells are applied to.
  struct Sums {
    T* sums;  // [rows, stride], or of one row [blocks, stride]
    int64_t stride;
    int64_t gate_stride;  // from a gate to the next
    T* input_part;  // as sums; means something where a fused input is apart

    FASTRNN_INLINE Sums from(int64_t i) const {
      return {sums + i * stride, stride, gate_stride, input_part + i * stride};
    }
  };

  // Those that so many rows have of a block.
  Sums sums_of(T* partial, int64_t rows, int64_t block) const {
    const int vectors = vectors_of(block);
    return {partial, vectors * kLanes, gate_stride(block, vectors), partial + rows * vectors * kLanes};
  }

  void units_phase(int64_t s, const Row* rows, int64_t count) const {
    const bool multiplies = scan_.plan.parts == 0 && scan_.plan.recurrent != Recurrent::kProduct;
    with_fused([&]<bool kFused>() {
      if (multiplies && count <= kFewRows) {
        few_rows<kFused>(s, rows, count);
        return;
      }
      zigzag(place_.blocks(unit_blocks()), s, [&](int64_t block, int64_t next) {
        if (multiplies) {
          block_of_units<kFused>(rows, count, block, next);
        } else if (scan_.plan.parts > 0) {
          if constexpr (kHasPairs) products<kFused>(s, rows, count, block);
        } else {
          products_of_caller(rows, count, block);
        }
      });
    });
  }

  template <class F>
  FASTRNN_INLINE void with_fused(const F& f) const {
    if (scan_.plan.fused_input) {
      f.template operator()<true>();
    } else {
      f.template operator()<false>();
    }
  }

  // One row's cells at a time would each wait for themselves, so those of several blocks take turns, after the sums of all
  // blocks. A single tile of rows reads each block: there is no use in chunks of it.
  template <bool kFused>
  void few_rows(int64_t s, const Row* rows, int64_t count) const {
    const Range range = place_.blocks(unit_blocks());
    const int64_t of_block = count * kPartial;
    T* const all = sums_of_member();
    const auto sums_at = [&](int64_t block) { return sums_of(all + (block - range.begin) * of_block, count, block); };
    const bool natural = scan_.plan.recurrent == Recurrent::kNatural;
    with_number<kFewRows>(static_cast<int>(count), [&]<int kRows>() {
      if (natural) {  // gate after gate, as they lie in memory; odd steps begin with the last of W_hh
        int done = 0;
        zigzag({0, kMatrixGates<kFused>}, s, [&](int64_t gate, int64_t) {
          const bool add = done++ >= kGates;
          for (int64_t block = range.begin; block < range.end; ++block) {
            this->template natural_gate<kFused, kRows>(rows, block, static_cast<int>(gate), add, sums_at(block));
          }
        });
        return;
      }
      zigzag(range, s, [&](int64_t block, int64_t next) {
        with_vectors<kVectors>(vectors_of(block), [&](auto vectors) {
          const Part part = part_of<kFused>(block, vectors, next, Chunk{0, depth(scan_)});
          this->template tile<kFused, kRows>(rows, RowTile{0, 0, 1}, part, vectors, sums_at(block));
        });
      });
    });
    const int64_t whole = std::min(range.end, shape_.units / kUnits);  // blocks before it are
    for (int64_t r = 0; r < count; ++r) {
      Sums sums = sums_at(range.begin).from(r);
      sums.stride = of_block;  // no longer from row to row
      cells_along<kFused>(rows[r], whole - range.begin, sums, range.begin * kUnits);
    }
    for (int64_t b = whole; b < range.end; ++b) cells<kFused>(rows, count, sums_at(b), b * kUnits);
  }

  // Gate pre-activations of one block of units from products of bfloat16, and the cell on them.
  template <bool kFused>
  void products(int64_t s, const Row* rows, int64_t count, int64_t block) const {
    const int64_t inputs = input_width(scan_), width = s_.operands.width();
    const auto* w = reinterpret_cast<const at::BFloat16*>(s_.packed + block * depth(scan_) * kWidth);
    T* const sums = sums_of_member();
    for_products(scan_.plan, count, [&](int64_t first, int64_t some, int64_t height) {
      const at::BFloat16* x = s_.operands.of_step(s, place_) + first * s_.operands.stride();
      if (p_.gates != nullptr) {
        for (int64_t i = first; i < first + some; ++i) {
          prefetch<kGates, kUnitVectors>(rows[i].gates + block * kUnits, shape_.units);
        }
      }
      const auto multiply = [&](int64_t k, const at::BFloat16* a, const at::BFloat16* b, T* c) {
        multiply_rows(scan_, height, some, kWidth, k, s_.operands, a, b, c, kPartial);
      };
      // A matrix unit is set up anew whenever a product is of another kind than the one before: one for x and h together,
      // or two alike.
      if (kInputApart && kFused) {
        multiply(inputs, x, w, sums + kWidth);
        multiply(width - inputs, x + inputs, w + inputs * kWidth, sums);
      } else {
        multiply(width, x, w, sums);
      }
      cells<kFused>(rows + first, some, {sums, kPartial, kUnits, sums + kWidth}, block * kUnits);
    });
  }

  // The cell on products that the caller has computed.
  void products_of_caller(const Row* rows, int64_t count, int64_t block) const {
    const int64_t units = shape_.units, begin = block * kUnits;
    T* const sums = sums_of_member();
    T* to = sums;
    for (const Row* row = rows; row < rows + count; ++row) {
      for (int v = 0; v < kVectors; ++v, to += kLanes) {
        const int64_t j = begin + v % kUnitVectors * kLanes, left = units - j;
        const bool none = row->product == nullptr || left <= 0;
        (none ? V(0) : load(row->product + v / kUnitVectors * units + j, left)).store(to);
      }
    }
    cells<false>(rows, count, {sums, kWidth, kUnits, sums}, begin);
  }

  // The sums of a block of units, a few rows at a time, and the cells on them, of each tile or of all.
  template <bool kFused>
  void block_of_units(const Row* rows, int64_t count, int64_t block, int64_t next) const {
    const Sums sums = sums_of(sums_of_member(), count, block);
    const bool each = depth(scan_) > kManyK;  // never where nothing is packed
    if (scan_.plan.recurrent == Recurrent::kNatural) {
      for_row_tiles<kDotInputs>(count, [&]<int kRows>(RowTile tile) {
        natural_tile<kFused, kRows>(rows + tile.first, block, sums.from(tile.first));
      });
    } else {
      with_vectors<kVectors>(vectors_of(block), [&](auto vectors) {
        for_chunks<kWidth * sizeof(T)>(depth(scan_), [&](const Chunk& chunk) {
          const Part part = part_of<kFused>(block, vectors, next, chunk);
          for_row_tiles<kTileRows>(count, [&]<int kRows>(RowTile tile) {
            const Sums of_tile = sums.from(tile.first);
            this->template tile<kFused, kRows>(rows + tile.first, tile, part, vectors, of_tile);
            if (each && chunk.last) cells<kFused>(rows + tile.first, kRows, of_tile, block * kUnits);
          });
        });
      });
    }
    if (!each) cells<kFused>(rows, count, sums, block * kUnits);
  }

  // What the tiles of a chunk have in common, found once: after the loops of a tile a processor foresees no branch.
  struct Part {
    PackedChunk<T> weights;
    Segment x, h;
    int64_t asked;  // the unit from which on rows are asked for what the cells load, or -1
  };

  template <bool kFused>
  FASTRNN_INLINE Part part_of(int64_t block, int vectors, int64_t next, const Chunk& chunk) const {
    const int64_t inputs = kFused ? shape_.inputs : 0;
    const int64_t of_x = std::clamp<int64_t>(inputs - chunk.begin, 0, chunk.depth());
    const int64_t h = std::max<int64_t>(0, chunk.begin - inputs);
    return {packed_chunk<kVectors>(s_.packed, depth(scan_), block, vectors, next, chunk),
            {chunk.begin, of_x, !chunk.first},
            {h, chunk.depth() - of_x, h > 0 || (kFused && !kInputApart)},
            chunk.last && p_.gates != nullptr ? block * kUnits : -1};
  }

  // The sums of kRows rows.
  template <bool kFused, int kRows, class Vectors>
  [[gnu::noinline]] void tile(const Row* rows, const RowTile& tile, const Part& part, Vectors vectors,
                              const Sums& sums) const {
    if (part.asked >= 0) {
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) prefetch<kGates, kUnitVectors>(rows[r].gates + part.asked, shape_.units);
    }
    const Packed<T> w = part.weights.template of<kVectors>(tile);
    if constexpr (kFused) {
      accumulate<kRows, kVectors>(vectors, kInputApart ? sums.input_part : sums.sums, w, part.x,
                                  [&](int r) { return rows[r].input; });
    }
    accumulate<kRows, kVectors>(vectors, sums.sums, w.from(kFused ? part.x.depth : 0, vectors), part.h,
                                [&](int r) { return rows[r].h; });
  }

  // The cell on the sums of some rows. A loop of its own: unrolled within each tile it would be more code than the
  // processor keeps decoded.
  template <bool kFused>
  [[gnu::noinline]] void cells(const Row* rows, int64_t row_count, Sums sums, int64_t begin) const {
    for_row_tiles<kCellsInTurn>(row_count, [&]<int K>(RowTile tile) {
      cells_of<kFused, false, K>(rows + tile.first, sums.from(tile.first), begin);
    });
  }

  // The same of whole blocks of one row.
  template <bool kFused>
  [[gnu::noinline]] void cells_along(const Row& row, int64_t block_count, Sums sums, int64_t begin) const {
    for_row_tiles<kCellsInTurn>(block_count, [&]<int K>(RowTile tile) {
      cells_of<kFused, true, K>(&row, sums.from(tile.first), begin + tile.first * kUnits);
    });
  }

  // Of K rows, or with kAlong of K blocks of a row.
  template <bool kFused, bool kAlong, int K>
  FASTRNN_INLINE void cells_of(const Row* rows, const Sums& sums, int64_t begin) const {
#pragma GCC unroll 32
    for (int u = 0; u < kUnitVectors; ++u) {
      const int64_t count = shape_.units - begin - u * kLanes;
      if (kAlong || count >= kLanes) {  // known to be whole, a vector takes no mask and no branch
        vector_of_units<kFused, kAlong, K>(rows, sums, begin, u, kLanes);
      } else if (count > 0) {
        vector_of_units<kFused, kAlong, K>(rows, sums, begin, u, count);
      }
    }
  }

  // Vector u of the units of a block, `count` of them.
  template <bool kFused, bool kAlong, int K>
  FASTRNN_INLINE void vector_of_units(const Row* rows, const Sums& sums, int64_t begin, int u, int64_t count) const {
    const int64_t units = shape_.units;
    Several<T, K> gate[kGates + kSeparate];
#pragma GCC unroll 32
    for (int i = 0; i < K; ++i) {
      const int64_t j = begin + u * kLanes + (kAlong ? i * kUnits : 0);
#pragma GCC unroll 32
      for (int g = 0; g < kGates; ++g) {
        const int64_t at = i * sums.stride + g * sums.gate_stride + u * kLanes;
        const V product = load(sums.sums + at, count);
        V input = bias(g, j, count);
        if constexpr (!kFused) input = input + load(rows[kAlong ? 0 : i].gates + g * units + j, count);
        if constexpr (kFused && kInputApart) input = input + load(sums.input_part + at, count);
        if (g < kAdding) {
          gate[g].v[i] = input + product;
        } else {
          gate[g].v[i] = input;
          gate[g + kSeparate].v[i] = bias(g + kSeparate, j, count) + product;
        }
      }
    }
    finish<kAlong>(rows, begin + u * kLanes, count, gate);
  }

  // Of gate g; those of the recurrent parts of separate gates lie behind the gates.
  FASTRNN_INLINE V bias(int g, int64_t j, int64_t count) const { return load(p_.bias + g * shape_.units + j, count); }

  // The cell of K rows or blocks, and where its results go.
  template <bool kAlong, int K>
  FASTRNN_INLINE void finish(const Row* rows, int64_t first, int64_t count,
                             const Several<T, K> (&gate)[kGates + kSeparate]) const {
    const int64_t units = shape_.units;
    const auto row_of = [&](int i) -> const Row& { return rows[kAlong ? 0 : i]; };
    const auto unit_of = [&](int i) { return first + (kAlong ? i * kUnits : 0); };
    Several<T, K> state(0), saved[Cell::kSaved];
#pragma GCC unroll 8
    for (int i = 0; i < K && kState != ElementState::kNone; ++i) {
      state.v[i] = load(row_of(i).state + unit_of(i), count);
    }
    const Several<T, K> h = Cell::forward(gate, state, saved);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      const Row& row = row_of(i);
      const int64_t j = unit_of(i);
      if (p_.save) {
#pragma GCC unroll 32
        for (int c = 0; c < Cell::kSaved; ++c) store(row.gates + c * units + j, saved[c].v[i], count);
        if (Cell::kProjects && shape_.projected) store(row.gates + Cell::kSaved * units + j, h.v[i], count);
      }
      if constexpr (kState == ElementState::kCell) {
        store(row.cell + j, state.v[i], count);
        if (row.cells != nullptr) store(row.cells + j, state.v[i], count);
      }
      if (Cell::kProjects && shape_.projected) {
        store(row.activation + j, h.v[i], count);
      } else {
        leave(row, j, h.v[i], count);
      }
    }
  }

  // h for the caller and the next step.
  FASTRNN_INLINE void leave(const Row& row, int64_t j, V h, int64_t count) const {
    if (kHasPairs && scan_.plan.parts > 0) {
      if constexpr (kHasPairs) {
        if (row.operand != nullptr) {
          store_parts(scan_.plan.parts, row.operand + j, s_.operands.width(), row.cut ? V(0) : h, count);
        }
      }
      if (kState == ElementState::kHidden) store(row.next + j, h, count);
    } else {
      store(row.next + j, h, count);
    }
    store(row.output, j, h, count);
    if (row.h_n != nullptr) store(row.h_n + j, h, count);
  }

  // Gates whose weights a step reads: of W_ih, if x is multiplied with them, and W_hh.
  template <bool kFused>
  static constexpr int kMatrixGates = (kFused ? 2 : 1) * kGates;

  // A few rows and one block with the weights as they lie: nothing is packed for a single step.
  template <bool kFused, int kRows>
  void natural_tile(const Row* rows, int64_t block, const Sums& sums) const {
    for (int gate = 0; gate < kMatrixGates<kFused>; ++gate) {
      natural_gate<kFused, kRows>(rows, block, gate, gate >= kGates, sums);
    }
  }

  // The same of a gate, of those of W_ih, if there are, and then W_hh. add: to what the other matrix has made of it, unless
  // they are apart.
  template <bool kFused, int kRows>
  void natural_gate(const Row* rows, int64_t block, int gate, bool add, const Sums& sums) const {
    const bool of_input = kFused && gate < kGates;
    const int64_t g = gate % kGates, depth = of_input ? shape_.inputs : shape_.outputs;
    T* const to = (of_input && kInputApart ? sums.input_part : sums.sums) + g * sums.gate_stride;
    const T* x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = of_input ? rows[r].input : rows[r].h;
    with_stored(of_input ? p_.w_ih : p_.w_hh, [&](const auto* w) {
      for (int64_t u = 0; u < units_of(block); u += kLanes) {
        const int64_t first = g * shape_.units + block * kUnits + u;
        const int64_t count = std::min<int64_t>(kLanes, units_of(block) - u);
        T part[kRows][kLanes] = {};
        dots(part, w + first * depth, x, depth, count);
        for (int r = 0; r < kRows; ++r) {
          store_sums(to + r * sums.stride + u, part[r], count, add && !kInputApart);
        }
      }
    });
  }

  void projection_phase(int64_t s, const Row* rows, int64_t count) const {
    const bool natural = scan_.plan.recurrent == Recurrent::kNatural;
    zigzag(place_.blocks(output_blocks()), s, [&](int64_t block, int64_t next) {
      if (natural) {
        for_row_tiles<kDotInputs>(count,
                                  [&]<int kRows>(RowTile i) { natural_projection<kRows>(rows + i.first, block); });
      } else {
        for_row_tiles<kOutputRows>(count, [&]<int kRows>(RowTile i) { project<kRows>(rows, i, block, next); });
      }
    });
  }

  template <int kRows>
  void project(const Row* all_rows, RowTile tile, int64_t block, int64_t next) const {
    const Row* rows = all_rows + tile.first;
    T sums[kRows][kOutputs];
    const auto weights = packed_chunk<kOutputVectors>(s_.projection, shape_.units, block, kOutputVectors, next,
                                                      Chunk{0, shape_.units});
    accumulate<kRows, kOutputVectors>(kOutputVectors, sums[0], weights.template of<kOutputVectors>(tile),
                                      {0, shape_.units, false}, [&](int r) { return rows[r].activation; });
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kOutputVectors; ++v) {
        const int64_t j = block * kOutputs + v * kLanes, count = shape_.outputs - j;
        if (count > 0) leave(rows[r], j, V::loadu(sums[r] + v * kLanes), count);
      }
    }
  }

  template <int kRows>
  void natural_projection(const Row* rows, int64_t block) const {
    const T* activation[kRows];
    for (int r = 0; r < kRows; ++r) activation[r] = rows[r].activation;
    for (int v = 0; v < kOutputVectors; ++v) {
      const int64_t j = block * kOutputs + v * kLanes, count = std::min<int64_t>(kLanes, shape_.outputs - j);
      if (count <= 0) return;
      T sums[kRows][kLanes] = {};
      with_stored(p_.w_hr, [&](const auto* w) { dots(sums, w + j * shape_.units, activation, shape_.units, count); });
      for (int r = 0; r < kRows; ++r) leave(rows[r], j, load(sums[r], kLanes), count);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
