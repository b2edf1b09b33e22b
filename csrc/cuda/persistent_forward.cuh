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

#include "cells_forward.cuh"
#include "persistent.cuh"

namespace fastrnn {

using PersistentForward = PersistentParams<StepForward>;

// The units and rows of the batch that a lane has: units 8 apart, two rows of every 8.
template <class Cell, class T, int kOctets, int kGroups>
class ForwardLane {
 public:
  static constexpr int kTiles = row_tiles_of(Cell::kGates, kOctets);
  static constexpr int kRegisterSteps = forward_register_steps(Cell::kGates, Cell::kSeparate, Cell::kSaved, kOctets,
                                                               kGroups);
  using Cells = ForwardCells<Cell, T, kOctets, 2 * kGroups>;
  using Sums = float[kTiles][kGroups][4];

  // first_row: of the batch, the cluster's.
  GPU_FN static Cells cells(const PersistentForward& params, int first_unit, int first_row) {
    int n[2 * kGroups];
#pragma unroll
    for (int r = 0; r < 2 * kGroups; ++r) n[r] = first_row + r / 2 * kMatrixColumns + lane() % 4 * 2 + r % 2;
    return Cells(params, first_unit + lane() / 4, n);
  }
  static GPU_FN float recurrent(const Sums& sums, int octet, int gate, int r) {
    const int slot = octet * Cell::kGates + gate;
    return sums[slot / 2][r / 2][slot % 2 * 2 + r % 2];
  }
  // The h of 8 rows of the batch that enters the next step, of the lane's unit: every lane of four has all of it.
  static GPU_FN uint4 published(const Cells& cells, int o, int q) {
    const uint32_t mine = gpu::pack<T>(cells.hidden(o, 2 * q), cells.hidden(o, 2 * q + 1));
    const int first = lane() / 4 * 4;
    uint4 all;
    all.x = gpu::shuffle(mine, first);
    all.y = gpu::shuffle(mine, first + 1);
    all.z = gpu::shuffle(mine, first + 2);
    all.w = gpu::shuffle(mine, first + 3);
    return all;
  }
  static GPU_FN int lane() { return static_cast<int>(threadIdx.x) % 32; }
};

template <class Cell, class T, int kOctets, int kGroups>
__global__ void __launch_bounds__(kPersistentWarps * 32, 1) persistent_forward_kernel(const PersistentForward p) {
  using Lane = ForwardLane<Cell, T, kOctets, kGroups>;
  constexpr int kColumns = kMatrixColumns * kGroups, kMostPeers = kLargestCluster / 4;
  DYN_SHARED(bytes);
  const CudaPlan& plan = p.plan;
  const int depth = plan.depth, cluster = plan.cluster, owners = plan.owners;
  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int d = static_cast<int>(blockIdx.y), warp = static_cast<int>(threadIdx.x) / 32, lane = Lane::lane();
  const int steps = plan.register_steps + plan.shared_steps, units = static_cast<int>(p.step.units);
  T* const h = reinterpret_cast<T*>(bytes);  // [2, kGroups, depth, 8]
  uint4* const weights = reinterpret_cast<uint4*>(h + 2 * depth * kColumns);
  const int tiles = plan.warps * plan.shared_steps * Lane::kTiles;
  const Turn turn(plan, rank, bytes, reinterpret_cast<uint64_t*>(weights + tiles * 32));

  // h_0, and zeros where no unit and no row of the batch is
  const StepForward& step = p.step;
  const int first_row = static_cast<int>(blockIdx.x) / cluster * kColumns;
  for (int i = static_cast<int>(threadIdx.x); i < depth * kColumns; i += static_cast<int>(blockDim.x)) {
    const int n = first_row + i / depth, k = i % depth, at = (i / depth / 8 * depth + k) * 8 + i / depth % 8;
    T initial = gpu::from_float<T>(0.f);
    if (k < units && n < step.table.batch && step.h0 != nullptr) {
      const bool dropped = d == 0 && step.table.reset != nullptr && step.table.reset[n * step.table.reset_batch_stride];
      if (!dropped) initial = static_cast<const T*>(step.h0)[(d * step.table.batch + n) * step.units + k];
    }
    h[at] = initial;
    h[depth * kColumns + at] = gpu::from_float<T>(0.f);
  }

  const int first_unit = rank * plan.units + warp * kOctets * 8;
  const bool active = first_unit < units;  // does the warp have units at all?
  const auto active_octet = [&](int o) { return first_unit + o * 8 < units; };
  typename Lane::Cells own = Lane::cells(p, first_unit, first_row);
  if (active) own.begin();
  Product<T, Lane::kTiles, kGroups, Lane::kRegisterSteps> product;
  const int64_t fragments = int64_t{steps} * Lane::kTiles * 32;
  product.load(p.packed + ((int64_t{d} * cluster + rank) * plan.warps + warp) * fragments,
               weights + warp * plan.shared_steps * Lane::kTiles * 32, steps);
  const unsigned arriving = static_cast<unsigned>((units + 7) / 8 * 8 * kColumns * sizeof(T));
  const int all = Timeline<StepForward>(p).steps(first_row);
  own.seek(d == 0 ? 0 : all - 1);
  if (active) own.load_input(d == 0 ? 0 : all - 1);
  turn.begin();
  // the four lanes of a unit share the blocks; each warp begins with another one
  gpu::ClusterAddress peers[kMostPeers];
#pragma unroll
  for (int i = 0; i < kMostPeers; ++i) {
    const int peer = lane % 4 + 4 * i;
    peers[i] = turn.peer(peer < owners ? (peer + rank + warp) % owners : 0);
  }
  for (int s = 0; s < all; ++s) {
    const int t = d == 0 ? s : all - 1 - s;
    T* const next = h + (s + 1) % 2 * depth * kColumns;
    const bool more = s + 1 < all;
    if (more) turn.expect(s + 1, arriving);
    if (active) {
      typename Lane::Sums sums;
      product.multiply(sums, h + s % 2 * depth * kColumns, depth, depth / 16);
      own.compute(t, [&](int o, int gate, int r) { return Lane::recurrent(sums, o, gate, r); });
    }
    if (more && active) {
      gpu::syncwarp();  // what any lane sends says that all lanes have read
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        if (active_octet(o)) {
#pragma unroll
          for (int q = 0; q < kGroups; ++q) {
            const uint4 values = Lane::published(own, o, q);
            const int unit = first_unit + o * 8 + lane / 4;
            uint4* const to = reinterpret_cast<uint4*>(next + (q * depth + unit) * kMatrixColumns);
            turn.send_each(to, values, peers, (owners - lane % 4 + 3) / 4, s + 1);
          }
        }
      }
    }
    if (more) turn.arrive();
    if (active) own.store(t);
    if (more) {
      const int then = d == 0 ? t + 1 : t - 1;
      own.move(then);
      if (active) own.load_input(then);
      turn.wait(s + 1);
    }
  }
}

}  // namespace fastrnn
