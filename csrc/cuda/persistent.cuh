// What the persistent scans share, forward and backward: arithmetic, the product with weights that stay on chip, and how
// the blocks of a cluster are addressed.
//
// A block has its share of the recurrent weights for all steps: as many fragments of mma.m16n8k16 as fit in registers, the
// rest in shared memory. A cluster of blocks (or one block alone) has all of the weights and takes 8 rows of the batch;
// clusters know nothing of each other, so no launch can wait for a block that does not run.
#pragma once

#include "cells.cuh"

namespace fastrnn {

// out [16 * kTiles, 8] = weights [16 * kTiles, depth] x operand [depth, 8], by one warp.
template <class T, int kTiles, int kRegisterSteps>
class Product {
 public:
  using Sums = float[kTiles][4];
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

  // operand: shared, [depth, 8] of T; `used`: its k-steps, as product_steps counts them.
  GPU_FN void multiply(Sums& out, const T* operand, int used) const {
    float sums[kChains][kTiles][4];
#pragma unroll
    for (int i = 0; i < kChains * kTiles * 4; ++i) sums[i / (kTiles * 4)][i / 4 % kTiles][i % 4] = 0.f;
    constexpr int kLast = kRegisterSteps % kStepsAtOnce;
    uint32_t operands[2][kStepsAtOnce][2];  // of these k-steps and, on their way, of the next
    const auto read_some = [&](uint32_t (&b)[kStepsAtOnce][2], int first) {
#pragma unroll
      for (int s = 0; s < kStepsAtOnce; s += 2) {
        if (kLast == 0 || first + s < kRegisterSteps) read(b[s], b[s + 1], operand, first + s);
      }
    };
    read_some(operands[0], 0);
#pragma unroll
    for (int first = 0; first < kRegisterSteps; first += kStepsAtOnce) {
      if (first < used) {
        auto& b = operands[first / kStepsAtOnce % 2];
        const int next = first + kStepsAtOnce;
        if (next < kRegisterSteps && next < used) read_some(operands[next / kStepsAtOnce % 2], next);
#pragma unroll
        for (int s = 0; s < kStepsAtOnce; ++s) {
          if (kLast == 0 || first + s < kRegisterSteps) add(sums[s % kChains], registers_[first + s], b[s]);
          if (kLast % 2 == 1 && first + s == kRegisterSteps) add_shared(sums[s % kChains], 0, b[s]);
        }
      }
    }
#pragma unroll 1
    for (int first = kRegisterSteps + kRegisterSteps % 2; first < used; first += 2) {
      uint32_t b[2][2];
      read(b[0], b[1], operand, first);
#pragma unroll
      for (int s = 0; s < 2; ++s) add_shared(sums[s % kChains], first + s - kRegisterSteps, b[s]);
    }
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) {
      out[i / 4][i % 4] = sums[0][i / 4][i % 4];
      if constexpr (kChains == 2) {
        out[i / 4][i % 4] += sums[1][i / 4][i % 4];
      }
    }
  }

 private:
  static constexpr int kChains = chains_of(kTiles, 1);

  // Two k-steps.
  static GPU_FN void read(uint32_t (&even)[2], uint32_t (&odd)[2], const T* operand, int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t r[4];
    gpu::ldmatrix_transposed<4>(r, operand + (first * 16 + lane) * kMatrixColumns);
    even[0] = r[0], even[1] = r[1], odd[0] = r[2], odd[1] = r[3];
  }
  static GPU_FN void add(Sums& sums, const uint32_t (&a)[kTiles][4], const uint32_t (&b)[2]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) gpu::mma_m16n8k16<T>(sums[m], a[m], b);
  }

  // A k-step whose fragments are in shared memory, the i-th of those.
  GPU_FN void add_shared(Sums& sums, int i, const uint32_t (&b)[2]) const {
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

// The end of a step, by the thread of a block: everybody's part of the next step's operand is there. `shared` is the
// block's dynamic shared memory: what is sent to another block arrives there at the place that it has here.
class Turn {
 public:
  // rank: of the block in its cluster; bars: [2], behind the rest of `shared`.
  GPU_FN Turn(const CudaPlan& plan, int rank, unsigned char* shared, uint64_t* bars)
      : async_(plan.exchange == Exchange::kAsync),
        owner_(rank < plan.owners),
        expects_(async_ && owner_ && threadIdx.x == 0),
        shared_(shared),
        bars_(bars),
        place_of_bars_(static_cast<int>(reinterpret_cast<unsigned char*>(bars) - shared)) {
    if (async_ && threadIdx.x == 0) {
      gpu::mbarrier_init(bars, 1);
      gpu::mbarrier_init(bars + 1, 1);
    }
  }
  // Before the first step: what a block has prepared for itself is there, and all blocks of the cluster run.
  GPU_FN void begin() const {
    if (async_) {
      gpu::cluster_sync();
    } else {
      gpu::syncthreads();
    }
  }
  // What comes for step s will have so many bytes; some of them may be there already.
  GPU_FN void expect(int s, unsigned bytes) const {
    if (expects_) gpu::mbarrier_arrive_expect(bars_ + s % 2, bytes);
  }
  // For all that was sent. A warp that sends nothing must not wait: nobody would wait for it, and it might come so late
  // that the barrier's parity is that of a later phase.
  GPU_FN void wait(int s, bool sends = true) const {
    if (!async_) {
      gpu::syncthreads();
    } else if (owner_ && sends) {  // to a block without units nobody sends
      gpu::mbarrier_wait_block(bars_ + s % 2, static_cast<unsigned>((s - 1) / 2 % 2));
    }
  }
  // The shared memory of block `to`.
  GPU_FN gpu::ClusterAddress peer(int to) const {
    return async_ ? gpu::cluster_map(shared_, to) : gpu::ClusterAddress{0};
  }
  // One value for each of the first `count` peers, at that place of their shared memory, in bytes; needed in step s.
  template <class V, int kMost>
  GPU_FN void send(int place, V value, const gpu::ClusterAddress (&peers)[kMost], int count, int s) const {
    if (async_) {
      const int at = place_of_bars_ + s % 2 * 8;
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i < count) gpu::st_async(peers[i] + place, value, peers[i] + at);
      }
    } else if (count > 0) {
      *reinterpret_cast<V*>(shared_ + place) = value;
    }
  }

 private:
  bool async_, owner_, expects_;
  unsigned char* shared_;
  uint64_t* bars_;  // steps 1, 3, 5... have the second, 2, 4, 6... the first
  int place_of_bars_;  // from `shared` on, in bytes
};

}  // namespace fastrnn
