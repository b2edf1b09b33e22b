// The forward scan of all steps in one launch. One step of a warp, which owns kOctets groups of 8 units:
//   pre[gate, unit][n] = sum_k W[gate, unit][k] h[k][n]       tensor cores, into registers
//   the cell, all gates of a unit and a row of the batch in one lane
//   send h to every block of the cluster that has units; store outputs and reserve; load the next inputs; wait for the
//   others' h
//
// Lane (g = lane / 4, t = lane % 4) of mma.m16n8k16 gets rows g and g + 8, columns 2t and 2t + 1. The 8 rows of a half tile
// are one gate of one group of 8 units, so the lane has unit g of each group, with all gates, for two rows of the batch.
//
// h is there twice. A warp sends h_t only after its own reads of h_{t-1}, so whoever has all of h_t may overwrite
// h_{t-1}: one synchronisation a step. Warps without units neither read nor send.
#pragma once

#include "persistent.cuh"

namespace fastrnn {

using PersistentForward = PersistentParams<StepForward>;

// Elements of one lane: kOctets units, 2 * kGroups rows of the batch.
template <class Cell, class T, int kOctets, int kGroups>
class ForwardLane {
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kSaved = Cell::kSaved;
  static constexpr ElementState kState = Cell::kState;

 public:
  static constexpr int kTiles = row_tiles_of(kGates, kOctets);
  static constexpr int kRegisterSteps = forward_register_steps(kGates, kSeparate, kSaved, kOctets, kGroups);
  using Sums = float[kTiles][kGroups][4];

  GPU_FN ForwardLane(const PersistentForward& params, int rank)
      : p_(params.step), slice_(params, first_row(params) + static_cast<int>(threadIdx.x) % 4 * 2) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    first_ = rank * params.plan.units + warp * kOctets * 8;
    g_ = lane / 4;
    each_row([&](int q, int j) { length_[q][j] = slice_.length(column(q, j)); });
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      const void* const b_ih = reverse() ? p_.b_ih[1] : p_.b_ih[0];
      const void* const b_hh = reverse() ? p_.b_hh[1] : p_.b_hh[0];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const float input = has(o) ? bias(b_ih, o, gate) : 0.f, hidden = has(o) ? bias(b_hh, o, gate) : 0.f;
        constexpr int kAdded = kGates - kSeparate;
        bias_[o][gate] = gate < kAdded ? input + hidden : input;
        if (gate >= kAdded) bias_[o][gate + kSeparate] = hidden;
      }
    }
    each([&](int o, int q, int j) {
      const bool there = has(o) && length_[q][j] > 0 && (reverse() || !sequence(q, j).resets(0));
      const int64_t at = slice_.of_batch(column(q, j), unit(o));
      hidden_[o][q][j] = there && p_.h0 != nullptr ? value(p_.h0, at) : 0.f;
      state_[o][q][j] = 0.f;
      if constexpr (kState == ElementState::kCell) {
        if (there && p_.c0 != nullptr) state_[o][q][j] = value(p_.c0, at);
      } else {
        state_[o][q][j] = hidden_[o][q][j];
      }
    });
  }

  // Of the batch, the cluster's.
  static GPU_FN int first_row(const PersistentForward& params) {
    return static_cast<int>(blockIdx.x) / params.plan.cluster * kMatrixColumns * kGroups;
  }
  // Does the warp have units at all?
  GPU_FN bool active() const { return first_ < p_.units; }
  GPU_FN bool octet_active(int o) const { return first_ + o * 8 < p_.units; }
  GPU_FN int unit(int o) const { return first_ + o * 8 + g_; }

  // The input projection of step t; that of the step after it begins its way from memory to L2.
  GPU_FN void load_input(int64_t t) {
    const int64_t ahead = reverse() ? t - 1 : t + 1;
    each([&](int o, int q, int j) {
      const bool valid = has(o) && t < length_[q][j];
      const float* from = static_cast<const float*>(p_.gates) + slice_.row(t, column(q, j)) * p_.gates_stride + unit(o);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) input_[o][q][j][gate] = valid ? from[gate * p_.units] : 0.f;
      if (g_ == 0 && has(o) && ahead >= 0 && ahead < length_[q][j]) {
        const float* next = static_cast<const float*>(p_.gates) + slice_.row(ahead, column(q, j)) * p_.gates_stride +
                            unit(o);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) gpu::prefetch_l2(next + gate * p_.units);
      }
    });
  }

  // Step t: from the sums to h, to what backward needs, and to what enters the next step.
  GPU_FN void compute(int64_t t, const Sums& sums) {
    each([&](int o, int q, int j) {
      Fast gate[kGates + kSeparate], saved[kSaved];
#pragma unroll
      for (int i = 0; i < kGates; ++i) {
        const int slot = o * kGates + i;
        const float recurrent = sums[slot / 2][q][slot % 2 * 2 + j];
        if (i < kGates - kSeparate) {
          gate[i] = recurrent + (input_[o][q][j][i] + bias_[o][i]);
        } else {
          gate[i] = input_[o][q][j][i] + bias_[o][i];
          gate[i + kSeparate] = recurrent + bias_[o][i + kSeparate];
        }
      }
      Fast state(state_[o][q][j]);
      const float h = Cell::forward(gate, state, saved).value;
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved_[o][q][j][k] = saved[k].value;
      h_[o][q][j] = h;
      c_[o][q][j] = state.value;
      if (t < length_[q][j] && has(o)) {  // an initial state waits for the step that it enters
        const Sequence s = sequence(q, j);
        const bool on = !s.last(t, reverse()) && s.flows(reverse() ? t - 1 : t + 1, reverse());
        hidden_[o][q][j] = on ? h : 0.f;
        state_[o][q][j] = on ? (kState == ElementState::kCell ? state.value : h) : 0.f;
      }
    });
  }

  // The h of 8 rows of the batch that enters the next step, of the lane's unit: every lane of four has all of it.
  GPU_FN uint4 published(int o, int q) const {
    const uint32_t mine = gpu::pack<T>(hidden_[o][q][0], hidden_[o][q][1]);
    const int first = static_cast<int>(threadIdx.x) % 32 / 4 * 4;
    uint4 all;
    all.x = gpu::shuffle(mine, first);
    all.y = gpu::shuffle(mine, first + 1);
    all.z = gpu::shuffle(mine, first + 2);
    all.w = gpu::shuffle(mine, first + 3);
    return all;
  }

  GPU_FN void store(int64_t t) const {
    each([&](int o, int q, int j) {
      if (!has(o) || length_[q][j] < 0) return;
      const bool valid = t < length_[q][j];
      if (!valid && slice_.packed()) return;
      const int64_t row = slice_.row(t, column(q, j)), of_rows = slice_.of_rows(row, unit(o));
      static_cast<T*>(p_.output)[of_rows] = gpu::from_float<T>(valid ? h_[o][q][j] : 0.f);
      if (p_.save) {
        float* to = static_cast<float*>(p_.gates) + row * p_.gates_stride + unit(o);
#pragma unroll
        for (int k = 0; k < kSaved; ++k) to[k * p_.units] = valid ? saved_[o][q][j][k] : 0.f;
      }
      const bool last = valid && sequence(q, j).last(t, reverse());
      const bool empty = length_[q][j] == 0 && t == 0;  // the initial state is the final one
      const int64_t at = slice_.of_batch(column(q, j), unit(o));
      if (last || empty) {
        const float h0 = p_.h0 == nullptr ? 0.f : value(p_.h0, at);
        static_cast<T*>(p_.h_n)[at] = gpu::from_float<T>(last ? h_[o][q][j] : h0);
      }
      if constexpr (kState == ElementState::kCell) {
        if (p_.cells != nullptr) {
          static_cast<T*>(p_.cells)[of_rows] = gpu::from_float<T>(valid ? c_[o][q][j] : 0.f);
        }
        if (last || empty) {
          const float c0 = p_.c0 == nullptr ? 0.f : value(p_.c0, at);
          static_cast<T*>(p_.c_n)[at] = gpu::from_float<T>(last ? c_[o][q][j] : c0);
        }
      }
    });
  }

 private:
  // f(octet, group of the batch, row of two): unrolled, so that all indices of registers are constants.
  template <class F>
  static GPU_FN void each(const F& f) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) each_row([&](int q, int j) { f(o, q, j); });
  }
  template <class F>
  static GPU_FN void each_row(const F& f) {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
#pragma unroll
      for (int j = 0; j < 2; ++j) f(q, j);
    }
  }

  GPU_FN bool has(int o) const { return unit(o) < p_.units; }
  GPU_FN bool reverse() const { return slice_.direction() == 1; }
  static GPU_FN int column(int q, int j) { return q * kMatrixColumns + j; }
  GPU_FN Sequence sequence(int q, int j) const { return slice_.sequence(column(q, j), length_[q][j]); }
  static GPU_FN float value(const void* p, int64_t index) { return gpu::to_float(static_cast<const T*>(p)[index]); }
  GPU_FN float bias(const void* p, int o, int gate) const {
    return p == nullptr ? 0.f : value(p, gate * p_.units + unit(o));
  }

  const StepForward& p_;
  const Slice<StepForward> slice_;  // the lane's rows of the batch
  int first_, g_;  // of the warp's units
  int length_[kGroups][2];  // -1 beyond the batch
  float bias_[kOctets][kGates + kSeparate];  //
  float hidden_[kOctets][kGroups][2];  // h that enters the next step
  float state_[kOctets][kGroups][2];  // the element state that does
  float input_[kOctets][kGroups][2][kGates];  //
  float saved_[kOctets][kGroups][2][kSaved];  //
  float h_[kOctets][kGroups][2], c_[kOctets][kGroups][2];  // of this step
};

template <class Cell, class T, int kOctets, int kGroups>
__global__ void __launch_bounds__(kPersistentWarps * 32, 1) persistent_forward_kernel(const PersistentForward p) {
  using Lane = ForwardLane<Cell, T, kOctets, kGroups>;
  constexpr int kColumns = kMatrixColumns * kGroups;
  DYN_SHARED(bytes);
  const CudaPlan& plan = p.plan;
  const int depth = plan.depth, cluster = plan.cluster, owners = plan.owners;
  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int d = static_cast<int>(blockIdx.y), warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, steps = plan.register_steps + plan.shared_steps;
  T* const h = reinterpret_cast<T*>(bytes);  // [2, kGroups, depth, 8]
  uint4* const weights = reinterpret_cast<uint4*>(h + 2 * depth * kColumns);
  const int tiles = plan.warps * plan.shared_steps * Lane::kTiles;
  const Turn turn(plan, rank, reinterpret_cast<uint64_t*>(weights + tiles * 32));

  // h_0, and zeros where no unit and no row of the batch is
  const StepForward& step = p.step;
  const int first_row = Lane::first_row(p);
  for (int i = static_cast<int>(threadIdx.x); i < depth * kColumns; i += static_cast<int>(blockDim.x)) {
    const int n = first_row + i / depth, k = i % depth, at = (i / depth / 8 * depth + k) * 8 + i / depth % 8;
    T initial = gpu::from_float<T>(0.f);
    if (k < step.units && n < step.table.batch && step.h0 != nullptr) {
      const bool dropped = d == 0 && step.table.reset != nullptr && step.table.reset[n * step.table.reset_batch_stride];
      if (!dropped) initial = static_cast<const T*>(step.h0)[(d * step.table.batch + n) * step.units + k];
    }
    h[at] = initial;
    h[depth * kColumns + at] = gpu::from_float<T>(0.f);
  }

  Lane own(p, rank);
  Product<T, Lane::kTiles, kGroups, Lane::kRegisterSteps> product;
  const int64_t fragments = int64_t{steps} * Lane::kTiles * 32;
  product.load(p.packed + ((int64_t{d} * cluster + rank) * plan.warps + warp) * fragments,
               weights + warp * plan.shared_steps * Lane::kTiles * 32, steps);
  const unsigned arriving = static_cast<unsigned>((step.units + 7) / 8 * 8 * kColumns * sizeof(T));
  const int64_t all = Slice<StepForward>(p, first_row).steps(0);
  own.load_input(d == 0 ? 0 : all - 1);
  turn.begin();
  for (int64_t s = 0; s < all; ++s) {
    const int64_t t = d == 0 ? s : all - 1 - s;
    T* const next = h + (s + 1) % 2 * depth * kColumns;
    const bool more = s + 1 < all;
    if (more) turn.expect(s + 1, arriving);
    if (own.active()) {
      typename Lane::Sums sums;
      product.multiply(sums, h + s % 2 * depth * kColumns, depth, depth / 16);
      own.compute(t, sums);
    }
    if (more && own.active()) {
      gpu::syncwarp();  // what any lane sends says that all lanes have read
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        if (own.octet_active(o)) {
#pragma unroll
          for (int q = 0; q < kGroups; ++q) {
            const uint4 values = own.published(o, q);
            uint4* const to = reinterpret_cast<uint4*>(next + (q * depth + own.unit(o)) * kMatrixColumns);
            // the four lanes of a unit share the blocks; each warp begins with another one
            for (int i = lane % 4; i < owners; i += 4) turn.send(to, values, (i + rank + warp) % owners, s + 1);
          }
        }
      }
    }
    if (more) turn.arrive();
    if (own.active()) own.store(t);
    if (more) {
      if (own.active()) own.load_input(d == 0 ? t + 1 : t - 1);
      turn.wait(s + 1);
    }
  }
}

}  // namespace fastrnn
