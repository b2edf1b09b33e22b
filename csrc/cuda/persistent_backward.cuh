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

template <int kTiles>
inline constexpr int kBackwardSteps = backward_register_steps(kTiles);

template <class Cell, class T, int kTiles, bool kEven>
__global__ void __launch_bounds__(kPersistentWarps * 32, 1) persistent_backward_kernel(const PersistentBackward p) {
  DYN_SHARED(bytes);
  const CudaPlan& plan = p.plan;
  const int depth = plan.depth, units = plan.units, cluster = plan.cluster, owners = plan.owners;
  const int rank = static_cast<int>(blockIdx.x) % cluster, d = static_cast<int>(blockIdx.y);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int steps = plan.register_steps + plan.shared_steps, of_block = units * kMatrixColumns;
  const bool multiplies = warp < plan.warps && rank < owners;  // the others at most have elements
  T* const operand = reinterpret_cast<T*>(bytes);  // [2, depth, 8]
  float* const inbox = reinterpret_cast<float*>(operand + 2 * depth * kMatrixColumns);  // [2, owners, units, 8]
  const int of_inbox = owners * of_block;
  float* const carry = inbox + 2 * of_inbox;  // [units, 8]
  uint4* const weights = reinterpret_cast<uint4*>(carry + of_block);
  const int tiles = plan.warps * plan.shared_steps * kTiles;
  const Turn turn(plan, rank, bytes, reinterpret_cast<uint64_t*>(weights + tiles * 32));

  const int used = Cell::kGates * of_block, zeros = depth * kMatrixColumns - used;  // behind the block's gates
  for (int i = static_cast<int>(threadIdx.x); i < 2 * zeros; i += static_cast<int>(blockDim.x)) {
    operand[i / zeros * depth * kMatrixColumns + used + i % zeros] = gpu::from_float<T>(0.f);
  }
  const int first_row = static_cast<int>(blockIdx.x) / cluster * kMatrixColumns;
  BackwardCells<Cell, T, kElementsOfThread, 1, kEven> own(p, rank * units, first_row, carry);
  own.begin();
  Product<T, kTiles, kBackwardSteps<kTiles>> product;
  if (multiplies) {
    product.load(p.packed + ((int64_t{d} * cluster + rank) * plan.warps + warp) * steps * kTiles * 32,
                 weights + warp * plan.shared_steps * kTiles * 32, steps);
  }
  const int octets = static_cast<int>((p.step.units + 7) / 8), left = octets * 8 - rank * units;
  const unsigned arriving = static_cast<unsigned>(owners * (left < units ? left : units) * kMatrixColumns) * 4;
  const int all = Timeline<StepBackward, kEven>(p).steps(first_row);
  own.seek(d == 0 ? all - 1 : 0);
  own.load(d == 0 ? all - 1 : 0);
  turn.begin();
  // Of two neighbours one takes four columns of row g of a tile, the other those of row g + 8: to whom, and to which place.
  gpu::ClusterAddress peers[kTiles][1];
  int place[kTiles];  // in bytes, in the first inbox
  const int first_octet = warp * kTiles * 2 + lane % 2, room = octets - first_octet;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int octet = first_octet + 2 * m, owner = 2 * m < room ? octet * 8 / units : 0;
    peers[m][0] = turn.peer(owner);
    const int at = rank * of_block + (octet * 8 - owner * units + lane / 4) * kMatrixColumns + lane % 4 / 2 * 4;
    place[m] = static_cast<int>(reinterpret_cast<unsigned char*>(inbox + at) - bytes);
  }
  for (int s = 0; s < all; ++s) {
    const int t = d == 0 ? all - 1 - s : s, before = d == 0 ? t - 1 : t + 1;
    const bool more = s + 1 < all;
    T* const own_gates = operand + s % 2 * depth * kMatrixColumns;
    const float* const parts = inbox + s % 2 * of_inbox;
    own.compute(
        t,
        [&](int u, int column) {
          float sum = 0.f;
          if (s == 0) return sum;
          const float* const from = parts + u * kMatrixColumns + column;
#pragma unroll 8
          for (int r = 0; r < owners; ++r) sum += from[r * of_block];
          return sum;
        },
        [&](int, int gate, int u, int column, T value) {
          own_gates[(gate * units + u) * kMatrixColumns + column] = value;
        });
    gpu::syncthreads();
    if (!more) {
      own.store(t);
      break;
    }
    if (multiplies) {
      float sums[kTiles][4];
      product.multiply(sums, own_gates, depth / 16);
      gpu::syncwarp();  // what any lane sends says that all lanes have read
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const bool odd = lane % 2 == 1;
        const float (&v)[4] = sums[m];
        const float other0 = gpu::shuffle_xor(odd ? v[0] : v[2], 1), other1 = gpu::shuffle_xor(odd ? v[1] : v[3], 1);
        const float four[4] = {odd ? other0 : v[0], odd ? other1 : v[1], odd ? v[2] : other0, odd ? v[3] : other1};
        uint4 bits;
        memcpy(&bits, four, sizeof bits);
        turn.send(place[m] + (s + 1) % 2 * of_inbox * 4, bits, peers[m], 2 * m < room, s + 1);
      }
    }
    turn.expect(s + 1, arriving);
    own.store(t);
    own.move(before);
    own.load(before);
    turn.wait(s + 1);
  }
  own.store_carry();
}

}  // namespace fastrnn
