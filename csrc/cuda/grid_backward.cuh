// The backward scan of all steps by the whole GPU, in one launch: a block has the columns of W that belong to its units,
// and a step of it, for one slice of the batch, is
//   dh of its units from everybody's gate gradients of the step after     a share of the gates by each warp
//   the gradients of its units' gates, element by element -> to the others, then to the caller
// A sum is added in one order, that of the warps: the same bits in every run.
#pragma once

#include "cells_backward.cuh"
#include "grid_launch.cuh"

namespace fastrnn {

using GridBackward = GridParams<StepBackward>;

template <class Cell, class T, int kOctets, int kGroups, bool kEven>
__global__ void __launch_bounds__(kPersistentWarps * 32, 1) grid_backward_kernel(const GridBackward p) {
  constexpr int kGates = Cell::kGates, kColumns = kMatrixColumns * kGroups;
  using Kind = GridKind<T, kGates, kOctets, kGroups, true>;
  DYN_SHARED(bytes);
  const CudaPlan& plan = p.plan;
  const auto [rank, team, d, warp] = grid_place(plan);
  const int units = static_cast<int>(p.step.units), octets = (units + 7) / 8;
  const GridShared<T, Kind, kGroups> shared(bytes, plan);
  const T* const weights = p.template recurrent<T>(d);

  typename Kind::Product product;
  if (warp < plan.warps) {
    product.load(
        [&](int m, int octet, T(&values)[8]) {  // the block's units; 8 of the layer, gate after gate
          const int unit = rank * plan.units + m, gate = octet / octets, first = octet % octets * 8;
          if (m >= plan.units || unit >= units) return;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int64_t row = int64_t{gate} * units + first + i;
            if (first + i < units) values[i] = gpu::load_readonly(weights + row * units + unit);
          }
        },
        shared.weights(warp), warp * plan.pairs, plan.pairs, kGates * octets);
  }

  using Cells = BackwardCells<Cell, T, 1, kGroups, kEven>;
  const int first_octet = rank * kOctets, elements = plan.units * kColumns;
  const Timeline<StepBackward, kEven> time(p);
  const auto carry_of = [&](int slice) { return shared.states + slice / p.teams * elements; };
  const auto cells_of = [&](int slice) { return Cells(p, first_octet * 8, slice * kColumns, carry_of(slice)); };
  for (int slice = team; slice < p.slices; slice += p.teams) cells_of(slice).begin();

  // A team with one slice is never elsewhere.
  const bool alone = team + p.teams >= p.slices;
  int buffer = 0;
  const int most = time.steps(team * kColumns);  // of the team's slices the first has the longest row
  Cells cells = cells_of(team);
  if (alone) {
    cells.seek(d == 0 ? most - 1 : 0);
    cells.load(d == 0 ? most - 1 : 0);
  }
  for (int s = 0; s < most; ++s) {
    for (int slice = team; slice < p.slices; slice += p.teams) {
      const int all = time.steps(slice * kColumns), t = d == 0 ? all - 1 - s : s;
      if (s >= all) break;
      const Ring<T, kGroups> words = ring<T, kGroups>(p, slice, kGates * octets);
      if (!alone) {
        cells.take(slice * kColumns, carry_of(slice));
        cells.seek(t);
        cells.load(t);
      }
      float* const sums = shared.sums(buffer);
      if (s > 0) {
        if (warp < plan.warps) product.multiply(words.step(s), shared.of_warp(sums, warp), shared.stage(warp));
        gpu::syncthreads();
      }
      const bool more = s + 1 < all;
      cells.compute(
          t, [&](int u, int column) { return s == 0 ? 0.f : shared.total(sums, u, column); },
          [&](int, int gate, int u, int column, T value) {
            const int octet = first_octet + u / 8;  // of a whole warp
            if (octet >= octets) return;
            if (more) words.write(s + 1, gate * octets + octet, u % 8, column, value);
            words.empty(s - 1, all, gate * octets + octet, u % 8, column);
          });
      cells.store(t);
      if (alone && more) {
        cells.move(d == 0 ? t - 1 : t + 1);
        cells.load(d == 0 ? t - 1 : t + 1);
      }
      if (plan.buffers == 1) gpu::syncthreads();
      buffer = (buffer + 1) % plan.buffers;
    }
    if (s % kFence == kFence - 1 && most > kRing) gpu::fence_gpu();
  }
  for (int slice = team; slice < p.slices; slice += p.teams) cells_of(slice).store_carry();
}

struct GridBackwardKernels {
  using Kernel = GridKernel<StepBackward>;

  template <class Cell, class T, int kOctets, int kGroups, bool kEven>
  static Kernel of() {
    return grid_backward_kernel<Cell, T, kOctets, kGroups, kEven>;
  }
};

}  // namespace fastrnn
