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

#include "cells_backward.cuh"
#include "persistent_launch.cuh"

namespace fastrnn {

using PersistentBackward = PersistentParams<StepBackward>;

template <int kTiles, int kGroups>
inline constexpr int kBackwardSteps = backward_register_steps(kTiles, kGroups);
template <int kGroups>
inline constexpr int kBackwardElements = elements_of_thread(kGroups);

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
  const Turn turn(plan, rank, bytes, reinterpret_cast<uint64_t*>(weights + tiles * 32));

  const int from = 8 * Cell::kGates * units;  // zeros behind the gates of the block's units
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kGroups * (depth * 8 - from); i += static_cast<int>(blockDim.x)) {
    const int q = i / (depth * 8 - from);  // of both buffers
    operand[q * depth * 8 + from + i % (depth * 8 - from)] = gpu::from_float<T>(0.f);
  }
  const int first_row = static_cast<int>(blockIdx.x) / cluster * kColumns;
  BackwardCells<Cell, T, kBackwardElements<kGroups>, kGroups> own(p, rank * units, first_row, carry);
  own.begin();
  Product<T, kTiles, kGroups, kRegisterSteps> product;
  if (multiplies) {
    product.load(p.packed + ((int64_t{d} * cluster + rank) * plan.warps + warp) * steps * kTiles * 32,
                 weights + warp * plan.shared_steps * kTiles * 32, steps);
  }
  // octet / (units / 8), without a division in a step: both are less than 2^8
  const int octets_of_block = units / 8, inverse = ((1 << 16) + octets_of_block - 1) / octets_of_block;
  const auto owner_of = [&](int octet) { return octet * inverse >> 16; };
  const int octets = static_cast<int>((p.step.units + 7) / 8), left = octets * 8 - rank * units;
  const unsigned arriving = static_cast<unsigned>(owners * (left < units ? left : units) * kColumns * sizeof(float));
  const int all = Timeline<StepBackward>(p).steps(first_row);
  own.seek(d == 0 ? all - 1 : 0);
  own.load(d == 0 ? all - 1 : 0);
  turn.begin();
  for (int s = 0; s < all; ++s) {
    const int t = d == 0 ? all - 1 - s : s;
    const bool more = s + 1 < all;
    T* const own_gates = operand + s % 2 * depth * kColumns;
    const float* const parts = inbox + s % 2 * inbox_size;
    own.compute(
        t,
        [&](int u, int column) {
          float sum = 0.f;
          if (s == 0) return sum;
          const float* const from = parts + (column / 8 * units + u) * 8 + column % 8;
#pragma unroll 8
          for (int r = 0; r < owners; ++r) sum += from[r * (units * kColumns)];
          return sum;
        },
        [&](int, int gate, int u, int column, T value) {
          own_gates[(column / 8 * depth + gate * units + u) * 8 + column % 8] = value;
        });
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
            const int owner = owner_of(octet), u = octet * 8 - owner * units + lane / 4;
            uint4 bits;
            memcpy(&bits, four, sizeof bits);
            float* const to = place + (q * units + u) * 8 + lane % 4 / 2 * 4;
            turn.send(reinterpret_cast<uint4*>(to), bits, turn.peer(owner), s + 1);
          }
        }
      }
    }
    turn.arrive();
    own.move(d == 0 ? t - 1 : t + 1);
    own.load(d == 0 ? t - 1 : t + 1);
    turn.wait(s + 1);
  }
  own.store_carry();
}

}  // namespace fastrnn
