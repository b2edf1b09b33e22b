// What persistent scans do element by element, whoever holds the weights: a thread's units and rows of the batch, from the
// sums of a step's products to what the next step, the caller and the backward pass need, and back again.
//
// A warp has its scheduler almost for itself here, so a step costs what its instructions cost, one after another, and hardly
// anything for their arithmetic. What holds for all steps is therefore computed before the first, addresses are one
// row, which fits 32 bits (rows_fit), times a width, and nothing that rows without resets or padding do not need
// stands outside of a branch.
#pragma once

#include <type_traits>

#include "gpu.h"
#include "persistent.h"

namespace fastrnn {

// What a kernel gets; Step is StepForward or StepBackward.
template <class Step>
struct PersistentParams {
  Step step;
  CudaPlan plan;
  const uint4* packed;  // [D, cluster, warps, steps, row_tiles, 32 lanes]
  int64_t step_stride;
  const int64_t* offset;
};

// The value type of the cells for 16-bit layers: float32, with exp2 and reciprocal of the hardware (relative error about
// 2^-22) where the standard library's functions would be the longest part of a step.
struct Fast {
  float value;
  Fast() = default;
  GPU_FN Fast(float v) : value(v) {}  // NOLINT: a number is one
  friend GPU_FN Fast operator+(Fast a, Fast b) { return a.value + b.value; }
  friend GPU_FN Fast operator-(Fast a, Fast b) { return a.value - b.value; }
  friend GPU_FN Fast operator*(Fast a, Fast b) { return a.value * b.value; }
  GPU_FN operator float() const { return value; }  // NOLINT
};

template <>
struct Math<Fast> {
  static constexpr float kLog2E = 1.4426950408889634f;
  static GPU_FN Fast sigmoid(Fast x) { return gpu::reciprocal_approx(1.f + gpu::exp2_approx(-kLog2E * x.value)); }
  // Around zero the quotient would cancel; beyond 0.25 it has lost at most three bits.
  static GPU_FN Fast tanh(Fast x) {
    const float v = x.value, square = v * v;
    const float near = v +
                       v * square * (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315 + square * (62.f / 2835))));
    const float far = 1.f - 2.f * gpu::reciprocal_approx(1.f + gpu::exp2_approx(2 * kLog2E * v));
    return fabsf(v) < 0.25f ? near : far;
  }
  static GPU_FN Fast relu(Fast x) { return x.value < 0.f ? 0.f : x.value; }
  static GPU_FN Fast positive(Fast y) { return y.value <= 0.f ? 0.f : 1.f; }
};

template <class T>
using CellValue = std::conditional_t<gpu::kIs16Bit<T>, Fast, float>;

// The rows of the batch in time, of the block's direction.
template <class Step>
class Timeline {
 public:
  GPU_FN explicit Timeline(const PersistentParams<Step>& params)
      : p_(params),
        d_(static_cast<int>(blockIdx.y)),
        packed_(params.offset != nullptr),
        stride_(static_cast<unsigned>(params.step.table.batch_stride)),
        step_(static_cast<unsigned>(params.step_stride)),
        begin_(static_cast<unsigned>(d_ * params.step.table.total)) {}

  GPU_FN int direction() const { return d_; }
  GPU_FN bool reverse() const { return d_ == 1; }
  // Has it no rows beyond the lengths?
  GPU_FN bool packed() const { return packed_; }
  // Valid steps; -1 beyond the batch.
  GPU_FN int length(int n) const {
    const StepTable& table = p_.step.table;
    if (n >= table.batch) return -1;
    const int64_t length = table.lengths == nullptr ? table.steps : table.lengths[n];
    return static_cast<int>(length < table.steps ? length : table.steps);
  }
  // Steps that some row of the batch from n on visits, padding included.
  GPU_FN int steps(int n) const { return packed() ? length(n) : static_cast<int>(p_.step.table.steps); }
  GPU_FN Sequence sequence(int n, int length) const {
    const StepTable& table = p_.step.table;
    return {length, table.reset == nullptr ? nullptr : table.reset + n * table.reset_batch_stride,
            table.reset_step_stride};
  }
  // The row of (t, n), where there is one. Unsigned numbers: their product of 64 bits is one instruction.
  GPU_FN unsigned row(int t, int n) const {
    const unsigned first = packed_ ? static_cast<unsigned>(gpu::load_readonly(p_.offset + t)) : unsigned(t) * step_;
    return first + unsigned(n) * stride_;
  }
  // From a row to that of the next step of a scan with or against the direction, where data are not packed.
  GPU_FN unsigned stride(bool against) const { return reverse() != against ? 0u - step_ : step_; }
  // Of a tensor [D, rows, width], column j of a row.
  GPU_FN uint64_t of_direction(unsigned row, unsigned width, unsigned j) const {
    return uint64_t{begin_ + row} * width + j;
  }
  // Of a tensor [rows, D, H].
  GPU_FN uint64_t of_rows(unsigned row, unsigned unit) const {
    const unsigned units = static_cast<unsigned>(p_.step.units);
    return uint64_t{row} * (p_.step.table.directions * units) + (d_ * units + unit);
  }
  // Of a tensor [D, N, width].
  GPU_FN int64_t of_batch(int n, int64_t width, int j) const { return (d_ * p_.step.table.batch + n) * width + j; }

 private:
  const PersistentParams<Step>& p_;
  int d_;
  bool packed_;
  unsigned stride_, step_, begin_;  // rows from n to n + 1, and from t to t + 1; the direction's first
};

// Element `index` of an array of T as float32; zero where there is no array.
template <class T>
GPU_FN float value_of(const void* p, int64_t index) {
  return p == nullptr ? 0.f : gpu::to_float(static_cast<const T*>(p)[index]);
}

// kUnits units, 8 apart, in kRows rows of the batch.
template <class Cell, class T, int kUnits, int kRows>
class ForwardCells {
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kSaved = Cell::kSaved;
  static constexpr ElementState kState = Cell::kState;
  static constexpr int kAhead = 2;  // steps, of what is on its way from memory to L2
  static_assert(kGates <= 8);

 public:
  using Params = PersistentParams<StepForward>;

  // unit: the thread's first; n: its rows, of which some may be beyond the batch.
  GPU_FN ForwardCells(const Params& params, int unit, const int (&n)[kRows])
      : p_(params.step), time_(params), room_(static_cast<int>(params.step.units) - unit) {
    const int units = static_cast<int>(p_.units);
    unit_ = unit < units ? unit : units - 1;  // so that every address is one
    take(n);
#pragma unroll
    for (int o = 0; o < kUnits; ++o) {
      const void* const b_ih = time_.reverse() ? p_.b_ih[1] : p_.b_ih[0];
      const void* const b_hh = time_.reverse() ? p_.b_hh[1] : p_.b_hh[0];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const int j = gate * units + unit_ + at(o);
        const float input = value_of<T>(b_ih, j), hidden = value_of<T>(b_hh, j);
        constexpr int kAdded = kGates - kSeparate;
        bias_[o][gate] = gate < kAdded ? input + hidden : input;
        if (gate >= kAdded) bias_[o][gate + kSeparate] = hidden;
      }
    }
  }

  // Other rows, whose states are to be set next.
  GPU_FN void take(const int (&n)[kRows]) {
    const int batch = static_cast<int>(p_.table.batch);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      length_[r] = time_.length(n[r]);
      n_[r] = n[r] < batch ? n[r] : batch - 1;
    }
  }

  // The states before the first step; final states of rows without steps.
  GPU_FN void begin() {
    each([&](int o, int r) {
      const int64_t at_batch = of_batch(o, r);
      const float h0 = value_of<T>(p_.h0, at_batch);
      const bool enters = length_[r] > 0 && (time_.reverse() || !sequence(r).resets(0));
      hidden_[o][r] = enters ? h0 : 0.f;
      state_[o][r] = hidden_[o][r];
      if (length_[r] == 0 && has(o)) static_cast<T*>(p_.h_n)[at_batch] = gpu::from_float<T>(h0);
      if constexpr (kState == ElementState::kCell) {
        const float c0 = value_of<T>(p_.c0, at_batch);
        state_[o][r] = enters ? c0 : 0.f;
        if (length_[r] == 0 && has(o)) static_cast<T*>(p_.c_n)[at_batch] = gpu::from_float<T>(c0);
      }
    });
  }

  GPU_FN bool has(int o) const { return 8 * o < room_; }
  // The h that enters the next step, zero beyond the units, and the element state that does.
  GPU_FN float hidden(int o, int r) const { return has(o) ? hidden_[o][r] : 0.f; }
  GPU_FN float state(int o, int r) const { return state_[o][r]; }
  GPU_FN void restore(int o, int r, float hidden, float state) { hidden_[o][r] = hidden, state_[o][r] = state; }

  // Goes to step t, from anywhere or, if data are not packed, from the step before.
  GPU_FN void seek(int t) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_[r] = time_.packed() && t >= length_[r] ? 0 : time_.row(t, n_[r]);
  }
  GPU_FN void move(int t) {
    if (time_.packed()) {
      seek(t);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) row_[r] += time_.stride(false);
    }
  }

  // The input projection of step t, where the cells are. What the 8 lanes with the same rows need some steps later comes to
  // L2, a gate by each.
  GPU_FN void load_input(int t) {
    const int units = static_cast<int>(p_.units);
    const unsigned width = static_cast<unsigned>(p_.gates_stride);
    const auto* const gates = static_cast<const float*>(p_.gates);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float* const from = gates + time_.of_direction(row_[r], width, unit_);
#pragma unroll
      for (int o = 0; o < kUnits; ++o) {
        // a lane without such a row or unit does not read another's, which may be writing there
        const bool there = has(o) && (time_.packed() ? t < length_[r] : length_[r] >= 0);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) input_[o][r][gate] = there ? from[gate * units + at(o)] : 0.f;
      }
    }
    const int ahead = time_.reverse() ? t - kAhead : t + kAhead, own = unit_ % 8;
    if (own >= kGates || time_.packed() || ahead < 0 || ahead >= p_.table.steps) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const unsigned row = row_[r] + kAhead * time_.stride(false);
      const float* const from = gates + time_.of_direction(row, width, unit_ - own + own * units);
#pragma unroll
      for (int o = 0; o < kUnits; ++o) gpu::prefetch_l2(from + at(o));
    }
  }

  // Step t: from the sums, recurrent(o, gate, r), to h, to what backward needs, and to what enters the next step.
  template <class Recurrent>
  GPU_FN void compute(int t, const Recurrent& recurrent) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool valid = t < length_[r];
      bool dropped = false;
      if (p_.table.reset != nullptr && valid) {
        const Sequence s = sequence(r);
        dropped = !s.last(t, time_.reverse()) && !s.flows(time_.reverse() ? t - 1 : t + 1, time_.reverse());
      }
#pragma unroll
      for (int o = 0; o < kUnits; ++o) {
        CellValue<T> gate[kGates + kSeparate], saved[kSaved], state(state_[o][r]);
#pragma unroll
        for (int i = 0; i < kGates; ++i) {
          const float sum = recurrent(o, i, r);
          if (i < kGates - kSeparate) {
            gate[i] = sum + (input_[o][r][i] + bias_[o][i]);
          } else {
            gate[i] = input_[o][r][i] + bias_[o][i];
            gate[i + kSeparate] = sum + bias_[o][i + kSeparate];
          }
        }
        const float h = Cell::forward(gate, state, saved);
#pragma unroll
        for (int k = 0; k < kSaved; ++k) saved_[o][r][k] = saved[k];
        h_[o][r] = h;
        c_[o][r] = state;
        if (valid) {  // an initial state waits for the step that it enters
          hidden_[o][r] = dropped ? 0.f : h;
          state_[o][r] = dropped ? 0.f : kState == ElementState::kCell ? c_[o][r] : h;
        }
      }
    }
  }

  // Step t's results, to the caller, where the cells are.
  GPU_FN void store(int t) const {
    const int units = static_cast<int>(p_.units);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool valid = t < length_[r];
      if (length_[r] < 0 || (time_.packed() && !valid)) continue;
      const uint64_t of_rows = time_.of_rows(row_[r], unit_);
      float* const gates = static_cast<float*>(p_.gates) +
                           time_.of_direction(row_[r], static_cast<unsigned>(p_.gates_stride), unit_);
      const bool last = valid && t == (time_.reverse() ? 0 : length_[r] - 1);
#pragma unroll
      for (int o = 0; o < kUnits; ++o) {
        if (!has(o)) continue;
        static_cast<T*>(p_.output)[of_rows + 8 * o] = gpu::from_float<T>(valid ? h_[o][r] : 0.f);
        if (p_.save) {
#pragma unroll
          for (int k = 0; k < kSaved; ++k) gates[k * units + 8 * o] = valid ? saved_[o][r][k] : 0.f;
        }
        if (last) static_cast<T*>(p_.h_n)[of_batch(o, r)] = gpu::from_float<T>(h_[o][r]);
        if constexpr (kState == ElementState::kCell) {
          if (p_.cells != nullptr) {
            static_cast<T*>(p_.cells)[of_rows + 8 * o] = gpu::from_float<T>(valid ? c_[o][r] : 0.f);
          }
          if (last) static_cast<T*>(p_.c_n)[of_batch(o, r)] = gpu::from_float<T>(c_[o][r]);
        }
      }
    }
  }

 private:
  // f(unit, row): unrolled, so that all indices of registers are constants.
  template <class F>
  static GPU_FN void each(const F& f) {
#pragma unroll
    for (int o = 0; o < kUnits; ++o) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) f(o, r);
    }
  }
  // How far from the first unit: where there is none, one that is.
  GPU_FN int at(int o) const { return has(o) ? 8 * o : 0; }
  GPU_FN int64_t of_batch(int o, int r) const { return time_.of_batch(n_[r], p_.units, unit_ + at(o)); }
  GPU_FN Sequence sequence(int r) const { return time_.sequence(n_[r], length_[r]); }

  const StepForward& p_;
  const Timeline<StepForward> time_;
  int room_, unit_;  // units from the first on; the first
  int n_[kRows], length_[kRows];  // length: -1 beyond the batch
  unsigned row_[kRows];  // of the step
  float bias_[kUnits][kGates + kSeparate];  //
  float hidden_[kUnits][kRows];  // h that enters the next step
  float state_[kUnits][kRows];  // the element state that does
  float input_[kUnits][kRows][kGates];  //
  float saved_[kUnits][kRows][kSaved];  //
  float h_[kUnits][kRows], c_[kUnits][kRows];  // of this step
};

// Where the e-th element of a block's [units, columns] is: a warp has 8 units, a sector of memory, of 4 rows of the batch,
// which in shared arrays [unit, 8 columns] lie in different banks but for pairs.
template <int kColumns>
struct Element {
  int u, column;
  GPU_FN explicit Element(int e)
      : u(e / 32 / (kColumns / 4) * 8 + e % 8), column(e / 32 % (kColumns / 4) * 4 + e % 32 / 8) {}
};

// kMost elements of a block's [units, 8 * kGroups rows of the batch], at most.
template <class Cell, class T, int kMost, int kGroups>
class BackwardCells {
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kSaved = Cell::kSaved;
  static constexpr ElementState kState = Cell::kState;

 public:
  using Params = PersistentParams<StepBackward>;

  // first_unit of the block; first_row of the slice of the batch; carry: shared [units * 8 * kGroups], what flows to the
  // step before element by element.
  GPU_FN BackwardCells(const Params& params, int first_unit, int first_row, float* carry)
      : p_(params.step), time_(params), units_(params.plan.units), first_unit_(first_unit) {
    take(first_row, carry);
  }

  // Another slice of the batch.
  GPU_FN void take(int first_row, float* carry) {
    first_row_ = first_row, carry_ = carry;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      row_[i] = 0;
      length_[i] = exists(i) && unit(i) < p_.units ? time_.length(n(i)) : -1;
    }
  }

  // Before the first step.
  GPU_FN void begin() {
    each([&](int i) {
      carried(i) = 0.f;
      // a row without steps hands its initial state through
      if (kState == ElementState::kCell && length_[i] == 0) carried(i) = value_of<T>(p_.grad_c_n, of_batch(i));
    });
  }

  // Goes to step t, from anywhere or, if data are not packed, from the step after.
  GPU_FN void seek(int t) {
    each([&](int i) { row_[i] = t < length_[i] || !time_.packed() ? time_.row(t, n(i)) : 0; });
  }
  GPU_FN void move(int t) {
    if (time_.packed()) {
      seek(t);
    } else {
#pragma unroll
      for (int i = 0; i < kMost; ++i) row_[i] += time_.stride(true);
    }
  }

  // What step t, where the cells are, reads of the device's memory; what the step before it reads begins its way to L2.
  GPU_FN void load(int t) {
    const bool reverse = time_.reverse();
    const unsigned width = static_cast<unsigned>(p_.reserve_stride);
    const int units = static_cast<int>(p_.units);
    const int ahead = reverse ? t + 1 : t - 1;  // the step before in the direction of the data too
    const auto* const reserve = static_cast<const float*>(p_.reserve);
    each([&](int i) {
      if (t >= length_[i]) return;
      const bool some = ahead >= 0 && ahead < length_[i];
      const unsigned row = row_[i];
      const unsigned then = !some ? row : time_.packed() ? time_.row(ahead, n(i)) : row + time_.stride(true);
      const float* const before = reserve + time_.of_direction(then, width, unit(i));
      if (element(i).u % 8 < kSaved && some) {  // 8 numbers are a sector
        const int own = element(i).u % 8;
        gpu::prefetch_l2(before - own + own * units);
        if (own == 0 && p_.grad_output != nullptr)
          gpu::prefetch_l2(static_cast<const T*>(p_.grad_output) + time_.of_rows(then, unit(i)));
      }
      // nothing here uses what it loads, so nothing waits: what is not meant to be seen, compute does not look at
      const float* const from = reserve + time_.of_direction(row, width, unit(i));
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved_[i][k] = from[k * units];
      const uint64_t of_rows = time_.of_rows(row, unit(i));
      grad_output_[i] = raw(p_.grad_output, of_rows);
      if (kState == ElementState::kHidden || p_.previous != nullptr) {
        h_before_[i] = raw(p_.output, time_.of_rows(then, unit(i)));
      }
      if constexpr (kState == ElementState::kCell) {
        c_before_[i] = before[(kSaved - 1) * units];
        grad_cells_[i] = raw(p_.grad_cells, of_rows);
      }
    });
  }

  // Step t. incoming(u, column): the part of dh_t that comes from the step after; emit(i, gate, u, column, value): the
  // gradient that the step before needs, zero where there is none.
  template <class Incoming, class Emit>
  GPU_FN void compute(int t, const Incoming& incoming, const Emit& emit) {
    const bool reverse = time_.reverse();
    const int units = static_cast<int>(p_.units), width = kGates * units;
    each([&](int i) {
      const bool valid = t < length_[i];
      T of_input[kGates], of_recurrent[kGates], h_before = gpu::from_float<T>(0.f);
      bool enters = false;  // does the initial state?
      if (valid) {
        const bool ends = t == (reverse ? 0 : length_[i] - 1);
        bool on = !ends,
             flows = t != (reverse ? length_[i] - 1 : 0);  // the state, into the step after and into this one
        enters = !flows;
        if (p_.table.reset != nullptr) {
          const Sequence s = time_.sequence(n(i), length_[i]);
          on = on && s.flows(reverse ? t - 1 : t + 1, reverse);
          flows = s.flows(t, reverse), enters = s.enters(t, reverse);
        }
        CellValue<T> saved[kSaved], grad_gate[kGates + kSeparate], previous(0.f), carry(0.f);
#pragma unroll
        for (int k = 0; k < kSaved; ++k) saved[k] = saved_[i][k];
        if (flows) h_before = h_before_[i];
        if (enters) h_before = raw(p_.h0, of_batch(i));
        float grad_h = gpu::to_float(grad_output_[i]);
        if (ends) grad_h += value_of<T>(p_.grad_h_n, of_batch(i));
        if (on) grad_h += incoming(element(i).u, element(i).column);
        if constexpr (kState == ElementState::kCell) {
          if (flows) previous = c_before_[i];
          if (enters) previous = value_of<T>(p_.c0, of_batch(i));
          float grad_c = gpu::to_float(grad_cells_[i]);
          if (ends) grad_c += value_of<T>(p_.grad_c_n, of_batch(i));
          carry = grad_c + (on ? carried(i) : 0.f);
        } else if constexpr (kState == ElementState::kHidden) {
          previous = gpu::to_float(h_before);
          grad_h += on ? carried(i) : 0.f;
        }
        Cell::backward(saved, previous, CellValue<T>(grad_h), carry, grad_gate);
        if (kState != ElementState::kNone) carried(i) = flows || enters ? float(carry) : 0.f;
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          of_input[g] = gpu::from_float<T>(grad_gate[g]);
          of_recurrent[g] = gpu::from_float<T>(grad_gate[g < kGates - kSeparate ? g : g + kSeparate]);
        }
      } else {
#pragma unroll
        for (int g = 0; g < kGates; ++g) of_input[g] = of_recurrent[g] = gpu::from_float<T>(0.f);
      }
#pragma unroll
      for (int g = 0; g < kGates; ++g) emit(i, g, element(i).u, element(i).column, of_recurrent[g]);
      if (length_[i] < 0 || (time_.packed() && !valid)) return;
      const unsigned row = row_[i];
      if (p_.previous != nullptr) {
        const uint64_t at = time_.of_direction(row, units, unit(i));
        static_cast<T*>(p_.previous)[at] = h_before;
      }
      const uint64_t at = time_.of_direction(row, width, unit(i));
#pragma unroll
      for (int g = 0; g < kGates; ++g) static_cast<T*>(p_.grad_gates)[at + g * units] = of_input[g];
      if (p_.grad_recurrent != nullptr) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) static_cast<T*>(p_.grad_recurrent)[at + g * units] = of_recurrent[g];
      }
      if (p_.grad_first != nullptr && enters) {
        T* const to = static_cast<T*>(p_.grad_first) + time_.of_batch(n(i), width, unit(i));
#pragma unroll
        for (int g = 0; g < kGates; ++g) to[g * units] = of_recurrent[g];
      }
    });
  }

  // After the last step.
  GPU_FN void store_carry() const {
    if (kState == ElementState::kNone) return;
    each([&](int i) {
      if (length_[i] >= 0) static_cast<float*>(p_.carry)[of_batch(i)] = carried(i);
    });
  }

 private:
  // f(index of registers), for the elements that there are.
  template <class F>
  GPU_FN void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (exists(i)) f(i);
    }
  }
  static GPU_FN int index(int i) { return i * kPersistentWarps * 32 + static_cast<int>(threadIdx.x); }
  GPU_FN bool exists(int i) const { return index(i) < units_ * kMatrixColumns * kGroups; }
  static GPU_FN Element<kMatrixColumns * kGroups> element(int i) { return Element<kMatrixColumns * kGroups>(index(i)); }
  static GPU_FN T raw(const void* p, uint64_t index) {
    return p == nullptr ? gpu::from_float<T>(0.f) : static_cast<const T*>(p)[index];
  }
  GPU_FN int unit(int i) const { return first_unit_ + element(i).u; }
  GPU_FN int n(int i) const { return first_row_ + element(i).column; }
  GPU_FN float& carried(int i) const { return carry_[index(i)]; }
  GPU_FN int64_t of_batch(int i) const { return time_.of_batch(n(i), p_.units, unit(i)); }

  const StepBackward& p_;
  const Timeline<StepBackward> time_;
  const int units_, first_unit_;
  int first_row_;
  float* carry_;
  int length_[kMost];  // -1 beyond the batch and beyond the units
  unsigned row_[kMost];  // of the step
  float saved_[kMost][kSaved], c_before_[kMost];
  T grad_output_[kMost], grad_cells_[kMost], h_before_[kMost];
};

}  // namespace fastrnn
