// What persistent scans do element by element, forward (cells.cuh says what matters here).
#pragma once

#include "cells.cuh"

namespace fastrnn {

// kUnits units, 8 apart, in kRows rows of the batch.
template <class Cell, class T, int kUnits, int kRows, bool kEven>
class ForwardCells {
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kSaved = Cell::kSaved;
  static constexpr ElementState kState = Cell::kState;
  static constexpr bool kCountsOn = kEven && kRows > 1;  // addresses, from step to step
  static constexpr int kAhead = 2;  // steps, of what is on its way from memory to L2
  static_assert(kGates <= 8);

 public:
  using Params = PersistentParams<StepForward>;

  // unit: the thread's first; n: its rows, of which some may be beyond the batch.
  GPU_FN ForwardCells(const Params& params, int unit, const int (&n)[kRows])
      : p_(params.step), time_(params), room_(static_cast<int>(params.step.units) - unit) {
    const int units = static_cast<int>(p_.units);
    unit_ = unit < units ? unit : units - 1;  // so that every address is one
    gates_step_ = time_.stride(false) * p_.gates_stride;
    output_step_ = int64_t{time_.stride(false)} * p_.table.directions * units;
    fetched_ = kAhead * gates_step_ + unit_ % 8 * (units - 1);
    take(n);
#pragma unroll
    for (int o = 0; o < kUnits; ++o) {
#pragma unroll
      for (int i = 0; i < kRows * kGates; ++i) input_[o][i / kGates][i % kGates] = 0.f;
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
    for (int r = 0; r < kRows; ++r) {
      row_[r] = time_.packed() && t >= length_[r] ? 0 : time_.row(t, n_[r]);
      gates_[r] = gates_of(row_[r]), output_[r] = output_of(row_[r]);
    }
  }
  GPU_FN void move(int t) {
    if (time_.packed()) return seek(t);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_[r] += static_cast<unsigned>(time_.stride(false));
      gates_[r] += gates_step_, output_[r] += output_step_;
    }
  }

  // The input projection of step t, where the cells are. What the 8 lanes with the same rows need some steps later comes to
  // L2, a gate by each.
  GPU_FN void load_input(int t) {
    const int units = static_cast<int>(p_.units);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int o = 0; o < kUnits; ++o) {
        const bool there = exists(o, r, t);  // else another's, which may be writing there
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          // zeros, or where they would cost an instruction of every step what is there: no one sees it
          if (there) {
            input_[o][r][gate] = gates(r)[gate * units + at(o)];
          } else if (!kCountsOn) {
            input_[o][r][gate] = 0.f;
          }
        }
      }
    }
    const int ahead = time_.reverse() ? t - kAhead : t + kAhead;
    if (unit_ % 8 >= kGates || time_.packed() || ahead < 0 || ahead >= static_cast<int>(p_.table.steps)) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int o = 0; o < kUnits; ++o) gpu::prefetch_l2(fetched(r) + at(o));
    }
  }

  // Step t: from the sums, recurrent(o, gate, r), to h, to what backward needs, and to what enters the next step.
  template <class Recurrent>
  GPU_FN void compute(int t, const Recurrent& recurrent) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool is_valid = valid(r, t);
      bool dropped = false;
      if (!kEven && p_.table.reset != nullptr && is_valid) {
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
        if (is_valid) {  // an initial state waits for the step that it enters
          hidden_[o][r] = dropped ? 0.f : h;
          state_[o][r] = dropped ? 0.f : kState == ElementState::kCell ? c_[o][r] : h;
        }
      }
    }
  }

  // Step t's results, to the caller, where the cells are.
  GPU_FN void store(int t) const {
    each([&](int o, int r) {
      if (!exists(o, r, t)) return;
      const bool is_valid = valid(r, t);
      T* const h = output(r) + 8 * o;
      *h = gpu::from_float<T>(is_valid ? h_[o][r] : 0.f);
      if (p_.save) {
        const int units = static_cast<int>(p_.units);
        float* const reserve = gates(r) + 8 * o;
#pragma unroll
        for (int k = 0; k < kSaved; ++k) reserve[k * units] = is_valid ? saved_[o][r][k] : 0.f;
      }
      if (kState == ElementState::kCell && p_.cells != nullptr) {
        T* const c = static_cast<T*>(p_.cells) + (h - static_cast<T*>(p_.output));
        *c = gpu::from_float<T>(is_valid ? c_[o][r] : 0.f);
      }
      if (!kEven && is_valid && t == time_.last(length_[r])) store_last(o, r);
    });
  }
  // After the last step.
  GPU_FN void finish() const {
    if constexpr (kEven) {
      each([&](int o, int r) {
        if (exists(o, r, 0)) store_last(o, r);
      });
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
  GPU_FN bool valid(int r, int t) const { return kEven || t < length_[r]; }
  // Has step t a place for it?
  GPU_FN bool exists(int o, int r, int t) const {
    return has(o) && (time_.packed() ? t < length_[r] : length_[r] >= 0);
  }
  GPU_FN void store_last(int o, int r) const {
    static_cast<T*>(p_.h_n)[of_batch(o, r)] = gpu::from_float<T>(h_[o][r]);
    if constexpr (kState == ElementState::kCell) {
      static_cast<T*>(p_.c_n)[of_batch(o, r)] = gpu::from_float<T>(c_[o][r]);
    }
  }
  // [G, H] of the step, from the first unit on: the input projection, then the reserve. And [H] of the output. Where
  // registers are short, they are found from the row in every step.
  GPU_FN float* gates_of(unsigned row) const {
    return static_cast<float*>(p_.gates) +
           time_.of_direction(row, static_cast<unsigned>(p_.gates_stride), static_cast<unsigned>(unit_));
  }
  GPU_FN T* output_of(unsigned row) const {
    return static_cast<T*>(p_.output) + time_.of_rows(row, static_cast<unsigned>(unit_));
  }
  GPU_FN float* gates(int r) const { return kCountsOn ? gates_[r] : gates_of(row_[r]); }
  GPU_FN const float* fetched(int r) const {  // what the lane brings to L2
    if constexpr (kCountsOn) {
      return gates_[r] + fetched_;
    } else {
      const unsigned row = row_[r] + static_cast<unsigned>(kAhead * time_.stride(false)), own = unsigned(unit_) % 8;
      return static_cast<const float*>(p_.gates) +
             time_.of_direction(row, static_cast<unsigned>(p_.gates_stride),
                                static_cast<unsigned>(unit_) - own + own * static_cast<unsigned>(p_.units));
    }
  }
  GPU_FN T* output(int r) const { return kCountsOn ? output_[r] : output_of(row_[r]); }
  // How far from the first unit: where there is none, one that is.
  GPU_FN int at(int o) const { return has(o) ? 8 * o : 0; }
  GPU_FN int64_t of_batch(int o, int r) const { return time_.of_batch(n_[r], p_.units, unit_ + at(o)); }
  GPU_FN Sequence sequence(int r) const { return time_.sequence(n_[r], length_[r]); }

  const StepForward& p_;
  const Timeline<StepForward, kEven> time_;
  int room_, unit_;  // units from the first on; the first
  int n_[kRows], length_[kRows];  // length: -1 beyond the batch
  unsigned row_[kRows];  // of the step
  float* gates_[kRows];  // as gates_of says
  T* output_[kRows];  // as output_of says
  int64_t gates_step_, output_step_;  // from a step to the next
  int64_t fetched_;  // from gates of a step to what the lane brings to L2
  float bias_[kUnits][kGates + kSeparate];  //
  float hidden_[kUnits][kRows];  // h that enters the next step
  float state_[kUnits][kRows];  // the element state that does
  float input_[kUnits][kRows][kGates];  //
  float saved_[kUnits][kRows][kSaved];  //
  float h_[kUnits][kRows], c_[kUnits][kRows];  // of this step
};

}  // namespace fastrnn
