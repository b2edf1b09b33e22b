// What the persistent scans share, forward and backward: arithmetic, the product with weights that stay on chip, and how
// the blocks of a cluster are addressed.
//
// A block has its share of the recurrent weights for all steps: as many fragments of mma.m16n8k16 as fit in registers, the
// rest in shared memory. A cluster of blocks (or one block alone) has all of the weights and takes a slice of the batch;
// clusters know nothing of each other, so no launch can wait for a block that does not run.
#pragma once

#include "gpu.h"
#include "persistent.h"

namespace fastrnn {

// What a kernel gets; Step is StepForward or StepBackward.
template <class Step>
struct PersistentParams {
  Step step;
  CudaPlan plan;
  const uint4* packed;  // [D, cluster, warps, steps, row_tiles, 32 lanes]
  int64_t step_stride;
  const int64_t* offset;
};

// The rows of the batch that a thread has, its columns, and where they lie.
template <class Step>
class Slice {
 public:
  GPU_FN Slice(const PersistentParams<Step>& params, int first)
      : p_(params), d_(static_cast<int>(blockIdx.y)), first_(first) {}

  GPU_FN int direction() const { return d_; }
  GPU_FN int n(int column) const { return first_ + column; }
  // Valid steps; -1 beyond the batch.
  GPU_FN int length(int column) const {
    const StepTable& table = p_.step.table;
    if (n(column) >= table.batch) return -1;
    const int64_t length = table.lengths == nullptr ? table.steps : table.lengths[n(column)];
    return static_cast<int>(length < table.steps ? length : table.steps);
  }
  // Steps that some row of the batch from the column on visits, padding included.
  GPU_FN int64_t steps(int column) const { return packed() ? length(column) : p_.step.table.steps; }
  // Has it no rows beyond the lengths?
  GPU_FN bool packed() const { return p_.offset != nullptr; }
  GPU_FN Sequence sequence(int column, int length) const {
    const StepTable& table = p_.step.table;
    return {length, table.reset == nullptr ? nullptr : table.reset + n(column) * table.reset_batch_stride,
            table.reset_step_stride};
  }
  // Of a tensor [D, rows, *], the row of a step that there is.
  GPU_FN int64_t row(int64_t t, int column) const {
    const int64_t first = packed() ? gpu::load_readonly(p_.offset + t) : t * p_.step_stride;
    return d_ * p_.step.table.total + first + n(column) * p_.step.table.batch_stride;
  }
  // Of a tensor [rows, D, H], at such a row.
  GPU_FN int64_t of_rows(int64_t row, int unit) const {
    return ((row - d_ * p_.step.table.total) * p_.step.table.directions + d_) * p_.step.units + unit;
  }
  // Of a tensor [D, N, H].
  GPU_FN int64_t of_batch(int column, int unit) const {
    return (d_ * p_.step.table.batch + n(column)) * p_.step.units + unit;
  }

 private:
  const PersistentParams<Step>& p_;
  int d_, first_;
};

// The value type of the cells here: float32, with exp2 and reciprocal of the hardware (relative error about 2^-22) where
// the standard library's functions would be the longest part of a step.
struct Fast {
  float value;
  Fast() = default;
  GPU_FN Fast(float v) : value(v) {}  // NOLINT: a number is one
  friend GPU_FN Fast operator+(Fast a, Fast b) { return a.value + b.value; }
  friend GPU_FN Fast operator-(Fast a, Fast b) { return a.value - b.value; }
  friend GPU_FN Fast operator*(Fast a, Fast b) { return a.value * b.value; }
};

template <>
struct Math<Fast> {
  static constexpr float kLog2E = 1.4426950408889634f;
  static GPU_FN Fast sigmoid(Fast x) { return gpu::reciprocal_approx(1.f + gpu::exp2_approx(-kLog2E * x.value)); }
  // Around zero the quotient would cancel; beyond 0.25 it has lost at most three bits.
  static GPU_FN Fast tanh(Fast x) {
    const float v = x.value, square = v * v;
    const float near = v +
                       v * square * (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315 + square * (62.f / 2835))));
    const float far = 1.f - 2.f * gpu::reciprocal_approx(1.f + gpu::exp2_approx(2 * kLog2E * v));
    return fabsf(v) < 0.25f ? near : far;
  }
  static GPU_FN Fast relu(Fast x) { return x.value < 0.f ? 0.f : x.value; }
  static GPU_FN Fast positive(Fast y) { return y.value <= 0.f ? 0.f : 1.f; }
};

// out [16 * kTiles, 8 * kGroups] = weights [16 * kTiles, depth] x operand [depth, 8 * kGroups], by one warp.
template <class T, int kTiles, int kGroups, int kRegisterSteps>
class Product {
 public:
  using Sums = float[kTiles][kGroups][4];
  static_assert(kRegisterSteps > 0);

  // packed: this warp's [steps, kTiles, 32 lanes] fragments; shared: room for the steps beyond kRegisterSteps.
  GPU_FN void load(const uint4* packed, uint4* shared, int steps) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    shared_ = shared + lane;
#pragma unroll
    for (int s = 0; s < kRegisterSteps; ++s) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint4 v = gpu::load_readonly(packed + (s * kTiles + m) * 32 + lane);
        registers_[s][m][0] = v.x, registers_[s][m][1] = v.y, registers_[s][m][2] = v.z, registers_[s][m][3] = v.w;
      }
    }
    for (int i = kRegisterSteps * kTiles; i < steps * kTiles; ++i) {
      shared_[(i - kRegisterSteps * kTiles) * 32] = gpu::load_readonly(packed + i * 32 + lane);
    }
  }

  // operand: shared, [kGroups, depth, 8] of T; `used`: its k-steps, as product_steps counts them.
  GPU_FN void multiply(Sums& out, const T* operand, int depth, int used) const {
    float sums[kChains][kTiles][kGroups][4];
#pragma unroll
    for (int i = 0; i < kChains * kTiles * kGroups * 4; ++i) {
      sums[i / (kTiles * kGroups * 4)][i / (kGroups * 4) % kTiles][i / 4 % kGroups][i % 4] = 0.f;
    }
#pragma unroll
    for (int first = 0; first < kRegisterSteps; first += kStepsAtOnce) {
      if (first < used) {
        constexpr int kLast = kRegisterSteps % kStepsAtOnce;
        uint32_t b[kStepsAtOnce][kGroups][2];
#pragma unroll
        for (int s = 0; s < kStepsAtOnce; s += 2) {
          if (kLast == 0 || first + s < kRegisterSteps) read(b[s], b[s + 1], operand, depth, first + s);
        }
#pragma unroll
        for (int s = 0; s < kStepsAtOnce; ++s) {
          if (kLast == 0 || first + s < kRegisterSteps) add(sums[s % kChains], registers_[first + s], b[s]);
          if (kLast % 2 == 1 && first + s == kRegisterSteps) add_shared(sums[s % kChains], 0, b[s]);
        }
      }
    }
#pragma unroll 1
    for (int first = kRegisterSteps + kRegisterSteps % 2; first < used; first += 2) {
      uint32_t b[2][kGroups][2];
      read(b[0], b[1], operand, depth, first);
#pragma unroll
      for (int s = 0; s < 2; ++s) add_shared(sums[s % kChains], first + s - kRegisterSteps, b[s]);
    }
#pragma unroll
    for (int i = 0; i < kTiles * kGroups * 4; ++i) {
      const int m = i / (kGroups * 4), q = i / 4 % kGroups;
      out[m][q][i % 4] = sums[0][m][q][i % 4];
      if constexpr (kChains == 2) {
        out[m][q][i % 4] += sums[1][m][q][i % 4];
      }
    }
  }

 private:
  static constexpr int kChains = chains_of(kTiles, kGroups);

  // Two k-steps of every group of the batch.
  static GPU_FN void read(uint32_t (&even)[kGroups][2], uint32_t (&odd)[kGroups][2], const T* operand, int depth,
                          int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      uint32_t r[4];
      gpu::ldmatrix_transposed<4>(r, operand + (q * depth + first * 16 + lane) * kMatrixColumns);
      even[q][0] = r[0], even[q][1] = r[1], odd[q][0] = r[2], odd[q][1] = r[3];
    }
  }
  static GPU_FN void add(Sums& sums, const uint32_t (&a)[kTiles][4], const uint32_t (&b)[kGroups][2]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q) gpu::mma_m16n8k16<T>(sums[m][q], a[m], b[q]);
    }
  }

  // A k-step whose fragments are in shared memory, the i-th of those.
  GPU_FN void add_shared(Sums& sums, int i, const uint32_t (&b)[kGroups][2]) const {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const uint4 v = shared_[(i * kTiles + m) * 32];
      a[m][0] = v.x, a[m][1] = v.y, a[m][2] = v.z, a[m][3] = v.w;
    }
    add(sums, a, b);
  }

  uint32_t registers_[kRegisterSteps][kTiles][4];
  uint4* shared_;
};

// The end of a step, by the thread of a block: everybody's part of the next step's operand is there.
class Turn {
 public:
  // rank: of the block in its cluster; bars: [2] in shared memory.
  GPU_FN Turn(const CudaPlan& plan, int rank, uint64_t* bars)
      : exchange_(plan.exchange), owner_(rank < plan.owners), bars_(bars) {
    if (exchange_ == Exchange::kAsync && threadIdx.x == 0) {
      gpu::mbarrier_init(bars, 1);
      gpu::mbarrier_init(bars + 1, 1);
    }
  }
  // Before the first step: what a block has prepared for itself is there, and all blocks of the cluster run.
  GPU_FN void begin() const {
    if (exchange_ == Exchange::kBlock) {
      gpu::syncthreads();
    } else {
      gpu::cluster_sync();
    }
  }
  // What comes for step s will have so many bytes.
  GPU_FN void expect(int64_t s, unsigned bytes) const {
    if (exchange_ == Exchange::kAsync && owner_ && threadIdx.x == 0) gpu::mbarrier_arrive_expect(bar(s), bytes);
  }
  // Before and after what does not depend on the others.
  GPU_FN void arrive() const {
    if (exchange_ == Exchange::kClusterBarrier) gpu::cluster_arrive();
  }
  GPU_FN void wait(int64_t s) const {
    if (exchange_ == Exchange::kBlock) {
      gpu::syncthreads();
    } else if (exchange_ == Exchange::kAsync) {
      if (owner_) gpu::mbarrier_wait(bar(s), static_cast<unsigned>((s - 1) / 2 % 2));
    } else {
      gpu::cluster_wait();
    }
  }
  // One value for block `to`, at the place of `own` there, needed in step s.
  template <class V>
  GPU_FN void send(V* own, V value, int to, int64_t s) const {
    if (exchange_ == Exchange::kBlock) {
      *own = value;
    } else if (exchange_ == Exchange::kAsync) {
      gpu::st_async(gpu::cluster_map(own, to), value, gpu::cluster_map(bar(s), to));
    } else {
      gpu::remote_store(gpu::cluster_map(own, to), value);
    }
  }

 private:
  // Steps 1, 3, 5... have the second, 2, 4, 6... the first.
  GPU_FN uint64_t* bar(int64_t s) const { return bars_ + s % 2; }
  Exchange exchange_;
  bool owner_;  // to a block without units nobody sends
  uint64_t* bars_;
};

}  // namespace fastrnn
