// The backward scan of all steps in one launch. A block owns some units, as in the forward scan, and keeps the weights of
// their gates, transposed: W^T [H, gates of the block's units]. One step of a block:
//   gradients of the gates of its units from dh_t, element by element -> global memory, and 16-bit into shared memory
//   its part of dh_{t-1} for all units of the layer          tensor cores
//   send each unit's part to the block that owns the unit; load what the next step needs; wait for the others' parts
// and the owner adds the parts in the order of the blocks: the same bits in every run.
//
// Parts arrive in two inboxes by turns. A block sends parts of step s + 2 only when it has all of step s + 1, which every
// other block sent after all its threads had read the inbox of step s. The operand of the products is there twice too:
// what has arrived says nothing of a warp of the own block whose parts all go to others, and which may still multiply.
// A block without units waits for nothing, so it may be steps ahead: it sends nothing, and nothing is sent to it.
#pragma once

#include "persistent_launch.cuh"

namespace fastrnn {

using PersistentBackward = PersistentParams<StepBackward>;

template <int kTiles, int kGroups>
inline constexpr int kBackwardSteps = backward_register_steps(kTiles, kGroups);

// Elements of one thread: kMost at most, one unit of one row of the batch each, neighbours in the units.
template <class Cell, class T, int kMost, int kGroups>
class BackwardThread {
  static constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kSaved = Cell::kSaved;
  static constexpr ElementState kState = Cell::kState;

 public:
  // carry: shared [units * 8 * kGroups], what flows to the step before element by element.
  GPU_FN BackwardThread(const PersistentBackward& params, int rank, float* carry)
      : p_(params.step),
        plan_(params.plan),
        slice_(params, static_cast<int>(blockIdx.x) / params.plan.cluster * kMatrixColumns * kGroups),
        first_unit_(rank * params.plan.units),
        carry_(carry) {
    each([&](int i, int u, int column) {
      carry_[column * plan_.units + u] = 0.f;
      length_[i] = unit(u) < p_.units ? slice_.length(column) : -1;
    });
  }

  GPU_FN int64_t steps() const { return slice_.steps(0); }

  // What step t reads of the device's memory; what the step after it reads begins its way to L2.
  GPU_FN void load(int64_t t) {
    const bool reverse = slice_.direction() == 1;
    const int64_t ahead = reverse ? t + 1 : t - 1;
    each([&](int i, int u, int column) {
      if (u % 8 == 0 && ahead >= 0 && ahead < length_[i]) {  // 8 numbers are a sector
        const int64_t row = slice_.row(ahead, column);
        const float* from = static_cast<const float*>(p_.reserve) + row * p_.reserve_stride + unit(u);
#pragma unroll
        for (int k = 0; k < kSaved; ++k) gpu::prefetch_l2(from + k * p_.units);
        if (p_.grad_output != nullptr)
          gpu::prefetch_l2(static_cast<const T*>(p_.grad_output) + slice_.of_rows(row, unit(u)));
      }
      if (t >= length_[i]) return;
      const Sequence s = slice_.sequence(column, length_[i]);
      const bool last = s.last(t, reverse), flows = s.flows(t, reverse), enters = s.enters(t, reverse);
      const int64_t row = slice_.row(t, column), before = flows ? slice_.row(reverse ? t + 1 : t - 1, column) : 0;
      const int64_t of_rows = slice_.of_rows(row, unit(u)), of_batch = slice_.of_batch(column, unit(u));
      const float* reserve = static_cast<const float*>(p_.reserve) + unit(u);
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved_[i][k] = reserve[row * p_.reserve_stride + k * p_.units];
      grad_h_[i] = value(p_.grad_output, of_rows) + (last ? value(p_.grad_h_n, of_batch) : 0.f);
      h_before_[i] = 0.f;
      if (kState == ElementState::kHidden || p_.previous != nullptr) {
        if (flows) {
          h_before_[i] = value(p_.output, slice_.of_rows(before, unit(u)));
        } else if (enters) {
          h_before_[i] = value(p_.h0, of_batch);
        }
      }
      if constexpr (kState == ElementState::kCell) {
        c_before_[i] = 0.f;
        if (flows) {
          c_before_[i] = reserve[before * p_.reserve_stride + (kSaved - 1) * p_.units];
        } else if (enters) {
          c_before_[i] = value(p_.c0, of_batch);
        }
        grad_c_[i] = value(p_.grad_cells, of_rows) + (last ? value(p_.grad_c_n, of_batch) : 0.f);
      }
    });
  }

  // Step t. inbox: shared [owners, kGroups, units, 8], the parts of dh_t, or null; operand: shared [kGroups, depth, 8] out.
  GPU_FN void compute(int64_t t, const float* inbox, T* operand) {
    const bool reverse = slice_.direction() == 1;
    const int units = plan_.units, depth = plan_.depth;
    each([&](int i, int u, int column) {
      T* const to = operand + (column / 8 * depth + u) * 8 + column % 8;
      float& carried = carry_[column * units + u];
      if (t >= length_[i]) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) to[g * units * 8] = gpu::from_float<T>(0.f);
        if (length_[i] < 0 || slice_.packed()) return;
        // a row without steps hands its initial state through
        if (kState == ElementState::kCell && t == 0) carried = value(p_.grad_c_n, slice_.of_batch(column, unit(u)));
        const int64_t row = slice_.row(t, column), width = kGates * p_.units;
        if (p_.previous != nullptr) static_cast<T*>(p_.previous)[row * p_.units + unit(u)] = gpu::from_float<T>(0.f);
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          const int64_t at = row * width + g * p_.units + unit(u);
          static_cast<T*>(p_.grad_gates)[at] = gpu::from_float<T>(0.f);
          if (p_.grad_recurrent != nullptr) static_cast<T*>(p_.grad_recurrent)[at] = gpu::from_float<T>(0.f);
        }
        return;
      }
      const int64_t row = slice_.row(t, column), width = kGates * p_.units;
      const Sequence s = slice_.sequence(column, length_[i]);
      const bool flows = s.flows(t, reverse), enters = s.enters(t, reverse);
      const bool on = !s.last(t, reverse) && s.flows(reverse ? t - 1 : t + 1, reverse);
      Fast saved[kSaved], grad_gate[kGates + kSeparate], previous(0.f), carry(0.f);
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved[k] = saved_[i][k];
      float grad_h = grad_h_[i];
      if (on && inbox != nullptr) {
        float sum = 0.f;
        for (int r = 0; r < plan_.owners; ++r) {
          sum += inbox[((r * kGroups + column / 8) * units + u) * 8 + column % 8];
        }
        grad_h += sum;
      }
      if constexpr (kState == ElementState::kCell) {
        previous = c_before_[i];
        carry = grad_c_[i] + (on ? carried : 0.f);
      } else if constexpr (kState == ElementState::kHidden) {
        previous = h_before_[i];
        grad_h += on ? carried : 0.f;
      }
      Cell::backward(saved, previous, Fast(grad_h), carry, grad_gate);
      carried = flows || enters ? carry.value : 0.f;
      if (p_.previous != nullptr)
        static_cast<T*>(p_.previous)[row * p_.units + unit(u)] = gpu::from_float<T>(h_before_[i]);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const T recurrent = gpu::from_float<T>(grad_gate[g < kGates - kSeparate ? g : g + kSeparate].value);
        to[g * units * 8] = recurrent;
        const int64_t at = row * width + g * p_.units + unit(u);
        static_cast<T*>(p_.grad_gates)[at] = gpu::from_float<T>(grad_gate[g].value);
        if (p_.grad_recurrent != nullptr) static_cast<T*>(p_.grad_recurrent)[at] = recurrent;
        if (p_.grad_first != nullptr && enters) {
          static_cast<T*>(p_.grad_first)[slice_.of_batch(column, 0) * kGates + g * p_.units + unit(u)] = recurrent;
        }
      }
    });
  }

  // After the last step.
  GPU_FN void store_carry() const {
    if (kState == ElementState::kNone) return;
    each([&](int i, int u, int column) {
      if (length_[i] >= 0)
        static_cast<float*>(p_.carry)[slice_.of_batch(column, unit(u))] = carry_[column * plan_.units + u];
    });
  }

 private:
  // f(index of registers, unit of the block, column: row of the batch of the cluster)
  template <class F>
  GPU_FN void each(const F& f) const {
    const int units = plan_.units, elements = units * kMatrixColumns * kGroups;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int e = i * kPersistentWarps * 32 + static_cast<int>(threadIdx.x);
      if (e < elements) f(i, e % units, e / units);
    }
  }
  GPU_FN int unit(int u) const { return first_unit_ + u; }
  static GPU_FN float value(const void* p, int64_t index) {
    return p == nullptr ? 0.f : gpu::to_float(static_cast<const T*>(p)[index]);
  }

  const StepBackward& p_;
  const CudaPlan& plan_;
  const Slice<StepBackward> slice_;
  const int first_unit_;
  float* carry_;
  int length_[kMost];  // -1 beyond the batch and beyond the units
  float saved_[kMost][kSaved], grad_h_[kMost], h_before_[kMost], c_before_[kMost], grad_c_[kMost];
};

template <class Cell, class T, int kTiles, int kGroups>
__global__ void __launch_bounds__(kPersistentWarps * 32, 1) persistent_backward_kernel(const PersistentBackward p) {
  constexpr int kColumns = kMatrixColumns * kGroups, kRegisterSteps = kBackwardSteps<kTiles, kGroups>;
  DYN_SHARED(bytes);
  const CudaPlan& plan = p.plan;
  const int depth = plan.depth, units = plan.units, cluster = plan.cluster, owners = plan.owners;
  const int rank = static_cast<int>(blockIdx.x) % cluster, d = static_cast<int>(blockIdx.y);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int steps = plan.register_steps + plan.shared_steps, inbox_size = owners * units * kColumns;
  const bool multiplies = warp < plan.warps && rank < owners;  // the others at most have elements
  T* const operand = reinterpret_cast<T*>(bytes);  // [2, kGroups, depth, 8]
  float* const inbox = reinterpret_cast<float*>(operand + 2 * depth * kColumns);  // [2, owners, kGroups, units, 8]
  float* const carry = inbox + 2 * inbox_size;  // [units * kColumns]
  uint4* const weights = reinterpret_cast<uint4*>(carry + units * kColumns);
  const int tiles = plan.warps * plan.shared_steps * kTiles;
  const Turn turn(plan, rank, reinterpret_cast<uint64_t*>(weights + tiles * 32));

  const int from = 8 * Cell::kGates * units;  // zeros behind the gates of the block's units
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kGroups * (depth * 8 - from); i += static_cast<int>(blockDim.x)) {
    const int q = i / (depth * 8 - from);  // of both buffers
    operand[q * depth * 8 + from + i % (depth * 8 - from)] = gpu::from_float<T>(0.f);
  }
  BackwardThread<Cell, T, kElementsOfThread, kGroups> own(p, rank, carry);
  Product<T, kTiles, kGroups, kRegisterSteps> product;
  if (multiplies) {
    product.load(p.packed + ((int64_t{d} * cluster + rank) * plan.warps + warp) * steps * kTiles * 32,
                 weights + warp * plan.shared_steps * kTiles * 32, steps);
  }
  const int octets = static_cast<int>((p.step.units + 7) / 8), left = octets * 8 - rank * units;
  const unsigned arriving = static_cast<unsigned>(owners * (left < units ? left : units) * kColumns * sizeof(float));
  const int64_t all = own.steps();
  own.load(d == 0 ? all - 1 : 0);
  turn.begin();
  for (int64_t s = 0; s < all; ++s) {
    const int64_t t = d == 0 ? all - 1 - s : s;
    const bool more = s + 1 < all;
    T* const own_gates = operand + s % 2 * depth * kColumns;
    own.compute(t, s == 0 ? nullptr : inbox + s % 2 * inbox_size, own_gates);
    gpu::syncthreads();
    if (!more) break;
    turn.expect(s + 1, arriving);
    if (multiplies) {
      float sums[kTiles][kGroups][4];
      product.multiply(sums, own_gates, depth, depth / 16);
      gpu::syncwarp();  // what any lane sends says that all lanes have read
      float* const place = inbox + (s + 1) % 2 * inbox_size + rank * units * kColumns;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int q = 0; q < kGroups; ++q) {
          // of two neighbours one takes four columns of row g, the other those of row g + 8
          const bool odd = lane % 2 == 1;
          const float (&v)[4] = sums[m][q];
          const float other0 = gpu::shuffle_xor(odd ? v[0] : v[2], 1), other1 = gpu::shuffle_xor(odd ? v[1] : v[3], 1);
          const float four[4] = {odd ? other0 : v[0], odd ? other1 : v[1], odd ? v[2] : other0, odd ? v[3] : other1};
          const int octet = (warp * kTiles + m) * 2 + lane % 2;
          if (octet < octets) {
            const int owner = octet * 8 / units, u = octet * 8 % units + lane / 4;
            uint4 bits;
            memcpy(&bits, four, sizeof bits);
            float* const to = place + (q * units + u) * 8 + lane % 4 / 2 * 4;
            turn.send(reinterpret_cast<uint4*>(to), bits, owner, s + 1);
          }
        }
      }
    }
    turn.arrive();
    own.load(d == 0 ? t - 1 : t + 1);
    turn.wait(s + 1);
  }
  own.store_carry();
}

// For choose_kernel: the tiles of that many groups of the batch.
template <int kGroups>
struct BackwardKernels {
  using Kernel = PersistentKernel<StepBackward>;

  template <class Cell, class T, int kTiles = least_backward_tiles(kGroups)>
  static Kernel of(const CudaPlan& plan) {
    if (plan.row_tiles == kTiles) return persistent_backward_kernel<Cell, T, kTiles, kGroups>;
    if constexpr (kTiles < most_backward_tiles(Cell::kGates)) {
      return of<Cell, T, kTiles + 2>(plan);
    }
    return nullptr;
  }
};

PersistentKernel<StepBackward> backward_kernel_of_16_rows(CellKind kind, Storage storage, const CudaPlan& plan);

}  // namespace fastrnn
