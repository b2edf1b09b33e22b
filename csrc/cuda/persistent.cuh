// What the persistent scans share, forward and backward: arithmetic, the product with weights that stay on chip, and how
// the blocks of a cluster are addressed.
//
// A block has its share of the recurrent weights for all steps: as many fragments of mma.m16n8k16 as fit in registers, the
// rest in shared memory. A cluster of blocks (or one block alone) has all of the weights and takes a slice of the batch;
// clusters know nothing of each other, so no launch can wait for a block that does not run.
#pragma once

#include "cells.cuh"

namespace fastrnn {

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
    constexpr int kLast = kRegisterSteps % kStepsAtOnce;
    uint32_t operands[2][kStepsAtOnce][kGroups][2];  // of these k-steps and, on their way, of the next
    const auto read_some = [&](uint32_t (&b)[kStepsAtOnce][kGroups][2], int first) {
#pragma unroll
      for (int s = 0; s < kStepsAtOnce; s += 2) {
        if (kLast == 0 || first + s < kRegisterSteps) read(b[s], b[s + 1], operand, depth, first + s);
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

// The end of a step, by the thread of a block: everybody's part of the next step's operand is there. `shared` is the
// block's dynamic shared memory: what is sent to another block arrives there at the place that it has here.
class Turn {
 public:
  // rank: of the block in its cluster; bars: [2], behind the rest of `shared`.
  GPU_FN Turn(const CudaPlan& plan, int rank, unsigned char* shared, uint64_t* bars)
      : exchange_(plan.exchange), owner_(rank < plan.owners), shared_(shared), bars_(bars) {
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
  GPU_FN void expect(int s, unsigned bytes) const {
    if (exchange_ == Exchange::kAsync && owner_ && threadIdx.x == 0) gpu::mbarrier_arrive_expect(bar(s), bytes);
  }
  // Before and after what does not depend on the others.
  GPU_FN void arrive() const {
    if (exchange_ == Exchange::kClusterBarrier) gpu::cluster_arrive();
  }
  GPU_FN void wait(int s) const {
    if (exchange_ == Exchange::kBlock) {
      gpu::syncthreads();
    } else if (exchange_ == Exchange::kAsync) {
      if (owner_) gpu::mbarrier_wait(bar(s), static_cast<unsigned>((s - 1) / 2 % 2));
    } else {
      gpu::cluster_wait();
    }
  }
  // The shared memory of block `to`. Asked for once, where that does not change.
  GPU_FN gpu::ClusterAddress peer(int to) const {
    return exchange_ == Exchange::kBlock ? gpu::ClusterAddress{0} : gpu::cluster_map(shared_, to);
  }
  // One value for a peer, at the place of `own` there, needed in step s.
  template <class V>
  GPU_FN void send(V* own, V value, gpu::ClusterAddress peer, int s) const {
    if (exchange_ == Exchange::kBlock) {
      *own = value;
    } else if (exchange_ == Exchange::kAsync) {
      gpu::st_async(peer + offset(own), value, peer + offset(bar(s)));
    } else {
      gpu::remote_store(peer + offset(own), value);
    }
  }
  // The same for the first `count` of some peers.
  template <class V, int kMost>
  GPU_FN void send_each(V* own, V value, const gpu::ClusterAddress (&peers)[kMost], int count, int s) const {
    if (exchange_ == Exchange::kAsync) {
      const int to = offset(own), at = offset(bar(s));
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i < count) gpu::st_async(peers[i] + to, value, peers[i] + at);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i < count) send(own, value, peers[i], s);
      }
    }
  }

 private:
  GPU_FN int offset(const void* own) const {
    return static_cast<int>(static_cast<const unsigned char*>(own) - shared_);
  }
  // Steps 1, 3, 5... have the second, 2, 4, 6... the first.
  GPU_FN uint64_t* bar(int s) const { return bars_ + s % 2; }
  Exchange exchange_;
  bool owner_;  // to a block without units nobody sends
  unsigned char* shared_;
  uint64_t* bars_;
};

}  // namespace fastrnn
