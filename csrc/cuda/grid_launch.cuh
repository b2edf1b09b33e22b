// What the kernels of the whole GPU have in shared memory, and how they are launched.
#pragma once

#include "grid.cuh"
#include "persistent_launch.cuh"

namespace fastrnn {

// The product of a block: by tensor cores, or in float32.
template <class T, int kGates, int kOctets, int kGroups, bool kBackward>
struct GridKind {
  static constexpr bool k16Bit = gpu::kIs16Bit<T>;
  static constexpr int kTiles = grid_row_tiles(kGates, kOctets, kBackward);
  static constexpr int kRowsOfLane = grid_rows_of_lane(kGates, kOctets, kBackward);
  static constexpr int kRegisterPairs = k16Bit ? grid_register_pairs(kTiles, kGroups) : 0;
  static constexpr int kRows = k16Bit ? 16 * kTiles : 8 * kRowsOfLane;  // of weights, zeros included
  using Product = std::conditional_t<k16Bit, GridProduct<T, kTiles, kGroups, k16Bit ? kRegisterPairs : 4>,
                                     GridProduct32<kRowsOfLane, kGroups>>;
  // Bytes of a warp's weights in shared memory.
  static GPU_FN int weight_bytes(const CudaPlan& plan) {
    return k16Bit ? plan.shared_steps * kTiles * kFragmentBytes : plan.pairs * 32 * kRows * 4;
  }
};

// Shared memory of a block: weights, stages, states of the slices, sums once or twice.
template <class T, class Kind, int kGroups>
class GridShared {
 public:
  float* states;

  GPU_FN GridShared(unsigned char* bytes, const CudaPlan& plan)
      : bytes_(bytes), warps_(plan.warps), weight_bytes_(Kind::weight_bytes(plan)) {
    sums_ = reinterpret_cast<float*>(bytes_ + warps_ * (weight_bytes_ + Kind::Product::kStageBytes));
    states = sums_ + plan.buffers * warps_ * kOfWarp;
  }
  GPU_FN unsigned char* weights(int warp) const { return bytes_ + warp * weight_bytes_; }
  GPU_FN unsigned char* stage(int warp) const {
    return bytes_ + warps_ * weight_bytes_ + warp * Kind::Product::kStageBytes;
  }
  GPU_FN float* sums(int buffer) const { return sums_ + buffer * warps_ * kOfWarp; }
  static GPU_FN float* of_warp(float* sums, int warp) { return sums + warp * kOfWarp; }
  // The sum of all warps.
  GPU_FN float total(const float* sums, int row, int column) const {
    const float* const from = sums + row * kSumStride<kGroups> + column;
    float sum = from[0];
#pragma unroll
    for (int w = 1; w < kPersistentWarps; ++w) {
      if (w < warps_) sum += from[w * kOfWarp];
    }
    return sum;
  }

 private:
  static constexpr int kOfWarp = Kind::kRows * kSumStride<kGroups>;
  unsigned char* bytes_;
  float* sums_;
  int warps_, weight_bytes_;
};

// Of the block's direction.
template <class T, int kGroups, class Step>
GPU_FN Ring<T, kGroups> ring(const GridParams<Step>& p, int slice, int octets) {
  const int64_t of_slice = int64_t{p.places} * octets * kMatrixColumns * kGroups * kOctetWords<T>;
  return Ring<T, kGroups>(p.ring + (static_cast<int>(blockIdx.y) * p.slices + slice) * of_slice, octets);
}

// Whether rows of H numbers begin at multiples of 16 bytes.
template <class T>
GPU_FN bool rows_are_aligned(const T* weights, int units) {
  return reinterpret_cast<uintptr_t>(weights) % 16 == 0 && units * sizeof(T) % 16 == 0;
}
// The next 8 of `count` numbers; what is beyond stays.
template <class T>
GPU_FN void load_eight(const T* from, int count, bool aligned, T (&values)[8]) {
  if (aligned && count >= 8) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
      const uint4 v = gpu::load_readonly(reinterpret_cast<const uint4*>(from) + i);
      memcpy(static_cast<void*>(values + i * (16 / sizeof(T))), &v, sizeof v);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) values[i] = gpu::load_readonly(from + i);
  }
}

template <class Step>
using GridKernel = void (*)(GridParams<Step>);

// Whether all blocks of the plan run at the same time.
template <class Step>
bool can_run(GridKernel<Step> kernel, const CudaPlan& plan) {
  return kernel != nullptr && gpu::max_cooperative_blocks(kernel, dim3(plan.threads),
                                                          static_cast<size_t>(plan.shared_bytes)) >= plan.blocks();
}

template <class Step>
void run_grid(GridKernel<Step> kernel, const Step& step, const PersistentScan& scan, void* stream) {
  const CudaPlan& plan = scan.plan;
  const int directions = step.table.directions;
  GridParams<Step> params{};
  params.step = step;
  params.plan = plan;
  params.step_stride = scan.step_stride;
  params.offset = scan.offset;
  for (int d = 0; d < directions; ++d) params.weights[d] = scan.weights[d];
  params.ring = static_cast<uint32_t*>(scan.packed);
  params.places = static_cast<int>(CudaPlan::ring_places(step.table.steps));
  params.teams = plan.teams;
  params.slices = plan.slices;
  const dim3 grid(static_cast<unsigned>(plan.teams * plan.cluster), static_cast<unsigned>(directions));
  gpu::launch_cooperative(kernel, grid, dim3(plan.threads), static_cast<size_t>(plan.shared_bytes),
                          static_cast<cudaStream_t>(stream), params);
}

// The kernel of a plan: Kernels::of<Cell, T, kOctets, kGroups, kEven>(), for the numbers that T and Cell have.
template <class Kernels>
struct OfPlan {
  using Kernel = typename Kernels::Kernel;

  template <class Cell, class T, bool kEven>
  static Kernel of(const CudaPlan& plan) {
    const bool wide = plan.batch_groups == 2;
    if constexpr (gpu::kIs16Bit<T> || grid_octets_32(Cell::kGates) == kGridOctets) {
      if (plan.octets == kGridOctets) {
        return wide ? Kernels::template of<Cell, T, kGridOctets, 2, kEven>()
                    : Kernels::template of<Cell, T, kGridOctets, 1, kEven>();
      }
    }
    return wide ? Kernels::template of<Cell, T, 1, 2, kEven>() : Kernels::template of<Cell, T, 1, 1, kEven>();
  }
};

// Those in 16 bits, each direction of the scan in a file of its own.
GridKernel<StepForward> grid_forward_kernel_16(CellKind kind, Storage storage, const PersistentScan& scan);
GridKernel<StepBackward> grid_backward_kernel_16(CellKind kind, Storage storage, const PersistentScan& scan);

}  // namespace fastrnn
