// What persistent scans do element by element, backward (cells.cuh says what matters here).
#pragma once

#include "cells.cuh"

namespace fastrnn {

// kMost elements of a block's [units, 8 * kGroups rows of the batch], at most.
template <class Cell, class T, int kMost, int kGroups, bool kEven>
class BackwardCells {
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kSaved = Cell::kSaved;
  static constexpr ElementState kState = Cell::kState;

 public:
  using Params = PersistentParams<StepBackward>;

  // first_unit of the block; first_row of the slice of the batch; carry: shared [units * 8 * kGroups], what flows to the
  // step before element by element.
  GPU_FN BackwardCells(const Params& params, int first_unit, int first_row, float* carry)
      : p_(params.step),
        time_(params),
        units_(params.plan.units),
        first_unit_(first_unit),
        stride_(time_.stride(true)),
        has_grad_output_(p_.grad_output != nullptr),
        has_grad_cells_(p_.grad_cells != nullptr),
        wants_previous_(p_.previous != nullptr),
        wants_recurrent_(p_.grad_recurrent != nullptr) {
    take(first_row, carry);
  }

  // Another slice of the batch.
  GPU_FN void take(int first_row, float* carry) {
    first_row_ = first_row, carry_ = carry;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      row_[i] = 0, reserve_[i] = static_cast<const float*>(p_.reserve), gates_[i] = static_cast<T*>(p_.grad_gates);
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
    each([&](int i) {
      row_[i] = t < length_[i] || !time_.packed() ? time_.row(t, n(i)) : 0;
      reserve_[i] = reserve_of(row_[i], i);
      gates_[i] = static_cast<T*>(p_.grad_gates) +
                  time_.of_direction(row_[i], static_cast<unsigned>(kGates * p_.units), static_cast<unsigned>(unit(i)));
    });
  }
  GPU_FN void move(int t) {
    if (time_.packed()) {
      seek(t);
    } else {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        row_[i] += static_cast<unsigned>(stride_);
        reserve_[i] += stride_ * p_.reserve_stride;
        gates_[i] += stride_ * (kGates * p_.units);
      }
    }
  }

  // What step t, where the cells are, reads of the device's memory; what the step before it reads begins its way to L2.
  GPU_FN void load(int t) {
    const int units = static_cast<int>(p_.units);
    const int ahead = time_.reverse() ? t + 1 : t - 1;  // the step before in the direction of the data too
    each([&](int i) {
      if (!time_.valid(t, length_[i])) return;
      const unsigned at = static_cast<unsigned>(unit(i));
      const bool some = ahead >= 0 && ahead < length(i);
      const float* before = reserve_[i];
      unsigned then = row_[i];
      if (some && time_.packed()) {
        then = time_.row(ahead, n(i));
        before = reserve_of(then, i);
      } else if (some) {
        then += static_cast<unsigned>(stride_);
        before += stride_ * p_.reserve_stride;
      }
      const uint64_t rows_before = time_.of_rows(then, at);
      if (const int own = element(i).u % 8; own < kSaved && some) {  // 8 numbers are a sector
        gpu::prefetch_l2(before + own * (units - 1));
        if (own == 0 && has_grad_output_) gpu::prefetch_l2(static_cast<const T*>(p_.grad_output) + rows_before);
      }
      // nothing here uses what it loads, so nothing waits: what is not meant to be seen, compute does not look at
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved_[i][k] = reserve_[i][k * units];
      const uint64_t of_rows = time_.of_rows(row_[i], at);
      grad_output_[i] = has_grad_output_ ? static_cast<const T*>(p_.grad_output)[of_rows] : gpu::from_float<T>(0.f);
      if (kState == ElementState::kHidden || wants_previous_) {
        h_before_[i] = static_cast<const T*>(p_.output)[rows_before];
      }
      if constexpr (kState == ElementState::kCell) {
        c_before_[i] = before[(kSaved - 1) * units];
        grad_cells_[i] = has_grad_cells_ ? static_cast<const T*>(p_.grad_cells)[of_rows] : gpu::from_float<T>(0.f);
      }
    });
  }

  // Step t. incoming(u, column): the part of dh_t that comes from the step after; emit(i, gate, u, column, value): the
  // gradient that the step before needs, zero where there is none.
  template <class Incoming, class Emit>
  GPU_FN void compute(int t, const Incoming& incoming, const Emit& emit) {
    const bool reverse = time_.reverse();
    each([&](int i) {
      const bool valid = time_.valid(t, length_[i]);
      T(&of_input)[kGates] = of_input_[i], (&of_recurrent)[kGates] = of_recurrent_[i];
      T& h_before = h_entered_[i];
      h_before = gpu::from_float<T>(0.f);
      bool enters = false;  // does the initial state?
      if (valid) {
        const bool ends = t == time_.last(length(i));
        bool on = !ends,
             flows = t != (reverse ? length(i) - 1 : 0);  // the state, into the step after and into this one
        enters = !flows;
        if (!kEven && p_.table.reset != nullptr) {
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
      if (enters && p_.grad_first != nullptr) {
        T* const to = static_cast<T*>(p_.grad_first) + time_.of_batch(n(i), kGates * p_.units, unit(i));
#pragma unroll
        for (int g = 0; g < kGates; ++g) to[g * p_.units] = of_recurrent[g];
      }
    });
  }

  // Step t's results, to the caller, where the cells are.
  GPU_FN void store(int t) const {
    const int units = static_cast<int>(p_.units);
    each([&](int i) {
      const bool valid = time_.valid(t, length_[i]);
      if (length_[i] < 0 || (time_.packed() && !valid)) return;
      if (wants_previous_) {
        static_cast<T*>(p_.previous)[time_.of_direction(row_[i], units, unit(i))] = h_entered_[i];
      }
#pragma unroll
      for (int g = 0; g < kGates; ++g) gates_[i][g * units] = of_input_[i][g];
      if (wants_recurrent_) {
        T* const recurrent = static_cast<T*>(p_.grad_recurrent) + (gates_[i] - static_cast<T*>(p_.grad_gates));
#pragma unroll
        for (int g = 0; g < kGates; ++g) recurrent[g * units] = of_recurrent_[i][g];
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
  GPU_FN const float* reserve_of(unsigned row, int i) const {
    return static_cast<const float*>(p_.reserve) +
           time_.of_direction(row, static_cast<unsigned>(p_.reserve_stride), static_cast<unsigned>(unit(i)));
  }
  // Of a valid row.
  GPU_FN int length(int i) const { return kEven ? static_cast<int>(p_.table.steps) : length_[i]; }
  GPU_FN float& carried(int i) const { return carry_[index(i)]; }
  GPU_FN int64_t of_batch(int i) const { return time_.of_batch(n(i), p_.units, unit(i)); }

  const StepBackward& p_;
  const Timeline<StepBackward, kEven> time_;
  const int units_, first_unit_;
  const int64_t stride_;  // rows to the step before
  const bool has_grad_output_, has_grad_cells_, wants_previous_, wants_recurrent_;
  int first_row_;
  float* carry_;
  int length_[kMost];  // -1 beyond the batch and beyond the units
  unsigned row_[kMost];  // of the step
  const float* reserve_[kMost];  // of the step, at the unit; gates_ too
  T* gates_[kMost];
  float saved_[kMost][kSaved], c_before_[kMost];
  T grad_output_[kMost], grad_cells_[kMost], h_before_[kMost];
  T of_input_[kMost][kGates], of_recurrent_[kMost][kGates], h_entered_[kMost];  // what compute found
};

}  // namespace fastrnn
