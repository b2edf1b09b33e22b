// The forward scan of all steps by the whole GPU, in one launch. A step of a block, for one slice of the batch:
//   the sums of its units' gates     a share of the columns by each warp, as soon as their h is there
//   the cell, a thread for each unit of each row of the batch, on the sums of all warps
//   h to the others; then outputs and reserve
// with the next slice of the batch following at once: what one slice waits for, another fills.
#pragma once

#include "cells_forward.cuh"
#include "grid_launch.cuh"

namespace fastrnn {

using GridForward = GridParams<StepForward>;

template <class Cell, class T, int kOctets, int kGroups, bool kEven>
__global__ void __launch_bounds__(kPersistentWarps * 32, 1) grid_forward_kernel(const GridForward p) {
  constexpr int kGates = Cell::kGates, kColumns = kMatrixColumns * kGroups, kElements = 8 * kOctets * kColumns;
  using Kind = GridKind<T, kGates, kOctets, kGroups, false>;
  DYN_SHARED(bytes);
  const CudaPlan& plan = p.plan;
  const auto [rank, team, d, warp] = grid_place(plan);
  const int units = static_cast<int>(p.step.units), octets = (units + 7) / 8;
  const GridShared<T, Kind, kGroups> shared(bytes, plan);
  const T* const weights = p.template recurrent<T>(d);

  typename Kind::Product product;
  if (warp < plan.warps) {
    const bool aligned = rows_are_aligned(weights, units);
    product.load(
        [&](int m, int octet, T(&values)[8]) {  // gate after gate of every 8 units
          const int unit = rank * plan.units + m / 8 / kGates * 8 + m % 8;
          if (m / 8 / kGates >= kOctets || unit >= units) return;
          const T* const row = weights + (int64_t{m / 8 % kGates} * units + unit) * units;
          load_eight(row + octet * 8, units - octet * 8, aligned, values);
        },
        shared.weights(warp), warp * plan.pairs, plan.pairs, octets);
  }

  const Element<kColumns> element(static_cast<int>(threadIdx.x));
  const int octet = rank * kOctets + element.u / 8, u = element.u % 8;
  const bool has_cell = static_cast<int>(threadIdx.x) < kElements && octet < octets;  // or the whole warp has not
  const Timeline<StepForward, kEven> time(p);
  const auto row_of = [&](int slice) { return slice * kColumns + element.column; };
  const int first_rows[1] = {row_of(team)};
  ForwardCells<Cell, T, 1, 1, kEven> cells(p, octet * 8 + u, first_rows);
  const auto ring_of = [&](int slice) { return ring<T, kGroups>(p, slice, octets); };
  float* states = shared.states + threadIdx.x;  // [slices of the team, 2, kElements]
  if (has_cell) {
    for (int slice = team; slice < p.slices; slice += p.teams, states += 2 * kElements) {
      const int rows[1] = {row_of(slice)};
      cells.take(rows);
      cells.begin();
      states[0] = cells.hidden(0, 0), states[kElements] = cells.state(0, 0);
      ring_of(slice).write(0, octet, u, element.column, gpu::from_float<T>(cells.hidden(0, 0)));
    }
  }

  // A team with one slice keeps its states in registers.
  const bool alone = team + p.teams >= p.slices;
  int buffer = 0;
  const int most = time.steps(team * kColumns);  // of the team's slices the first has the longest row
  if (alone && has_cell) {
    cells.seek(d == 0 ? 0 : most - 1);
    cells.load_input(d == 0 ? 0 : most - 1);
  }
  for (int s = 0; s < most; ++s) {
    states = shared.states + threadIdx.x;
    for (int slice = team; slice < p.slices; slice += p.teams, states += 2 * kElements) {
      const int all = time.steps(slice * kColumns), t = d == 0 ? s : all - 1 - s;
      if (s >= all) break;
      const Ring<T, kGroups> words = ring_of(slice);
      if (!alone && has_cell) {
        const int rows[1] = {row_of(slice)};
        cells.take(rows);
        cells.seek(t);
        cells.load_input(t);
        cells.restore(0, 0, states[0], states[kElements]);
      }
      float* const sums = shared.sums(buffer);
      if (warp < plan.warps) product.multiply(words.step(s), shared.of_warp(sums, warp), shared.stage(warp));
      gpu::syncthreads();
      if (has_cell) {
        cells.compute(t, [&](int, int gate, int) {
          return shared.total(sums, (element.u / 8 * kGates + gate) * 8 + u, element.column);
        });
        if (s + 1 < all) words.write(s + 1, octet, u, element.column, gpu::from_float<T>(cells.hidden(0, 0)));
        cells.store(t);
        if (s + 1 == all) cells.finish();
        if (!alone) {
          states[0] = cells.hidden(0, 0), states[kElements] = cells.state(0, 0);
        } else if (s + 1 < all) {
          const int then = d == 0 ? t + 1 : t - 1;
          cells.move(then);
          cells.load_input(then);
        }
        words.empty(s - 1, all, octet, u, element.column);
      }
      if (plan.buffers == 1) gpu::syncthreads();
      buffer = (buffer + 1) % plan.buffers;
    }
    if (s % kFence == kFence - 1 && most > kRing) gpu::fence_gpu();
  }
}

struct GridForwardKernels {
  using Kernel = GridKernel<StepForward>;

  template <class Cell, class T, int kOctets, int kGroups, bool kEven>
  static Kernel of() {
    return grid_forward_kernel<Cell, T, kOctets, kGroups, kEven>;
  }
};

}  // namespace fastrnn
