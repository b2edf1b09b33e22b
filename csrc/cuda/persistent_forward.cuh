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

// The units and rows of the batch that a lane has: units 8 apart, two rows of the cluster's 8.
template <class Cell, class T, int kOctets, bool kEven>
class ForwardLane {
 public:
  static constexpr int kTiles = row_tiles_of(Cell::kGates, kOctets);
  static constexpr int kRegisterSteps = forward_register_steps(Cell::kGates, Cell::kSeparate, Cell::kSaved, kOctets);
  using Cells = ForwardCells<Cell, T, kOctets, 2, kEven>;
  using Sums = float[kTiles][4];

  // first_row: of the batch, the cluster's.
  GPU_FN static Cells cells(const PersistentForward& params, int first_unit, int first_row) {
    const int first = first_row + lane() % 4 * 2, n[2] = {first, first + 1};
    return Cells(params, first_unit + lane() / 4, n);
  }
  static GPU_FN float recurrent(const Sums& sums, int octet, int gate, int r) {
    const int slot = octet * Cell::kGates + gate;
    return sums[slot / 2][slot % 2 * 2 + r];
  }
  // The h of the 8 rows that enters the next step, of the lane's unit: every lane of four has all of it.
  static GPU_FN uint4 published(const Cells& cells, int o) {
    const uint32_t mine = gpu::pack<T>(cells.hidden(o, 0), cells.hidden(o, 1));
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

template <class Cell, class T, int kOctets, bool kEven>
__global__ void __launch_bounds__(kPersistentWarps * 32, 1) persistent_forward_kernel(const PersistentForward p) {
  using Lane = ForwardLane<Cell, T, kOctets, kEven>;
  constexpr int kMostPeers = kLargestCluster / 4;
  DYN_SHARED(bytes);
  const CudaPlan& plan = p.plan;
  const int depth = plan.depth, cluster = plan.cluster, owners = plan.owners;
  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int d = static_cast<int>(blockIdx.y), warp = static_cast<int>(threadIdx.x) / 32, lane = Lane::lane();
  const int steps = plan.register_steps + plan.shared_steps, units = static_cast<int>(p.step.units);
  T* const h = reinterpret_cast<T*>(bytes);  // [2, depth, 8]
  uint4* const weights = reinterpret_cast<uint4*>(h + 2 * depth * kMatrixColumns);
  const int tiles = plan.warps * plan.shared_steps * Lane::kTiles;
  const Turn turn(plan, rank, bytes, reinterpret_cast<uint64_t*>(weights + tiles * 32));

  // h_0, and zeros where no unit and no row of the batch is
  const StepForward& step = p.step;
  const int first_row = static_cast<int>(blockIdx.x) / cluster * kMatrixColumns;
  for (int i = static_cast<int>(threadIdx.x); i < depth * kMatrixColumns; i += static_cast<int>(blockDim.x)) {
    const int n = first_row + i / depth, k = i % depth, at = k * kMatrixColumns + i / depth;
    T initial = gpu::from_float<T>(0.f);
    if (k < units && n < step.table.batch && step.h0 != nullptr) {
      const bool dropped = d == 0 && step.table.reset != nullptr && step.table.reset[n * step.table.reset_batch_stride];
      if (!dropped) initial = static_cast<const T*>(step.h0)[(d * step.table.batch + n) * step.units + k];
    }
    h[at] = initial;
    h[depth * kMatrixColumns + at] = gpu::from_float<T>(0.f);
  }

  const int first_unit = rank * plan.units + warp * kOctets * 8;
  const bool active = first_unit < units;  // does the warp have units at all?
  typename Lane::Cells own = Lane::cells(p, first_unit, first_row);
  if (active) own.begin();
  Product<T, Lane::kTiles, Lane::kRegisterSteps> product;
  const int64_t fragments = int64_t{steps} * Lane::kTiles * 32;
  product.load(p.packed + ((int64_t{d} * cluster + rank) * plan.warps + warp) * fragments,
               weights + warp * plan.shared_steps * Lane::kTiles * 32, steps);
  const unsigned arriving = static_cast<unsigned>((units + 7) / 8 * 8 * kMatrixColumns * sizeof(T));
  const int all = Timeline<StepForward, kEven>(p).steps(first_row);
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
  const int of_lane = (owners - lane % 4 + 3) / 4;
  const int of_h = depth * kMatrixColumns * static_cast<int>(sizeof(T));
  const int place = (first_unit + lane / 4) * kMatrixColumns * static_cast<int>(sizeof(T));  // of the lane's unit
  for (int s = 0, t = d == 0 ? 0 : all - 1; s < all; ++s) {
    const bool more = s + 1 < all;
    if (active) {
      typename Lane::Sums sums;
      product.multiply(sums, h + s % 2 * depth * kMatrixColumns, depth / 16);
      own.compute(t, [&](int o, int gate, int r) { return Lane::recurrent(sums, o, gate, r); });
      if (more) {
        gpu::syncwarp();  // what any lane sends says that all lanes have read
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          if (first_unit + o * 8 >= units) break;
          constexpr int kOctetBytes = 8 * kMatrixColumns * sizeof(T);
          turn.send((s + 1) % 2 * of_h + place + o * kOctetBytes, Lane::published(own, o), peers, of_lane, s + 1);
        }
      }
    }
    if (more) turn.expect(s + 1, arriving);
    if (active) {
      own.store(t);
      t += d == 0 ? 1 : -1;
      if (more) {
        own.move(t);
        own.load_input(t);
      }
    }
    if (more) turn.wait(s + 1, active);
  }
  if (active && all > 0) own.finish();
}

}  // namespace fastrnn
