// What the scans of the whole GPU share, forward and backward. A team of blocks holds the recurrent weights of a direction
// and takes slices of the batch, a step of one after a step of the other; each block has 8 or 16 units, with all their
// gates. What the next step's products need goes through global memory, which is L2: every block writes the part of its
// units and reads everybody's.
//
// A word says by itself that it has arrived: until then it is kNothing, which no number is written as. So there are no
// flags, and no store has to wait for another. The words of a step lie in one of kRing places. A block that has read all of
// step s knows that every block of the team has written it, and so has read all of step s - 1: it may then empty its own
// words of step s - 1, which stand for step s - 1 + kRing next. Every kFence steps a fence orders what was emptied before
// what will be written, and what was read before what will be.
//
// Within a block the warps share the columns of the weights, so that each word is read once, into the registers in which
// the tensor cores want it; the warps' sums meet in shared memory.
#pragma once

#include "cells.cuh"

namespace fastrnn {

inline constexpr uint32_t kNothing = 0xffffffffu;
inline constexpr int kFence = 16;
static_assert(kRing == 4 * kFence);

template <class Step>
struct GridParams : PersistentParams<Step> {
  const void* weights[2];  // T [G*H, H] of each direction
  uint32_t* ring;  // [D, slices, places, octets, columns, 8] of T, kNothing everywhere
  int places;  // kRing, or fewer for all steps of a short scan
  int teams;  // of a direction
  int slices;  // of the batch

  // [G*H, H] of a direction; no index into the parameters: it would put them into local memory.
  template <class T>
  GPU_FN const T* recurrent(int d) const {
    return static_cast<const T*>(d == 0 ? weights[0] : weights[1]);
  }
};

// Where a thread is: its block in the team, the team, the direction, its warp.
struct GridPlace {
  int rank, team, direction, warp;
};
GPU_FN GridPlace grid_place(const CudaPlan& plan) {
  const int block = static_cast<int>(blockIdx.x);
  return {block % plan.cluster, block / plan.cluster, static_cast<int>(blockIdx.y), static_cast<int>(threadIdx.x) / 32};
}

// Of the weights, the products' columns: 8 units at a time, of each gate backward.
template <class T>
inline constexpr int kOctetWords = 8 * sizeof(T) / 4;

GPU_FN bool nothing(uint4 v) { return v.x == kNothing || v.y == kNothing || v.z == kNothing || v.w == kNothing; }

// The words of one slice of the batch.
template <class T, int kGroups>
class Ring {
 public:
  static constexpr int kColumns = kMatrixColumns * kGroups;

  GPU_FN Ring(uint32_t* words, int octets) : words_(words), octets_(octets) {}

  // Of step s.
  GPU_FN const uint32_t* step(int s) const { return words_ + s % kRing * (octets_ * (kColumns * kOctetWords<T>)); }
  // Writes what step s needs of unit u of an octet. The lane with the next unit is the next lane; whole warps come here.
  GPU_FN void write(int s, int octet, int u, int column, T value) const {
    if constexpr (gpu::kIs16Bit<T>) {
      uint16_t bits;
      memcpy(&bits, &value, sizeof bits);
      const uint32_t next = gpu::shuffle_xor(uint32_t{bits}, 1), word = bits | next << 16;
      if (u % 2 == 0) gpu::store_relaxed_gpu(at(s, octet, column) + u / 2, word == kNothing ? kNan16 : word);
    } else {
      uint32_t word;
      memcpy(&word, &value, sizeof word);
      gpu::store_relaxed_gpu(at(s, octet, column) + u, word == kNothing ? kNan32 : word);
    }
  }
  // Of the `all` steps some will want the place of step s.
  GPU_FN void empty(int s, int all, int octet, int u, int column) const {
    constexpr int kUnitsOfWord = 4 / sizeof(T);
    if (s >= 0 && s + kRing < all && u % kUnitsOfWord == 0)
      gpu::store_relaxed_gpu(at(s, octet, column) + u / kUnitsOfWord, kNothing);
  }

 private:
  static constexpr uint32_t kNan16 = 0x7fff7fffu, kNan32 = 0x7fffffffu;
  GPU_FN uint32_t* at(int s, int octet, int column) const {
    return words_ + unsigned((s % kRing * octets_ + octet) * kColumns + column) * kOctetWords<T>;
  }
  uint32_t* words_;
  int octets_;
};

// Loads words until they have arrived. Loads of other words may be on their way meanwhile.
GPU_FN void settle(uint4& v, const uint4* from) {
  if (!nothing(v)) return;
  gpu::Spin spin("a block of the grid");
  do {
    spin();
    v = gpu::load_relaxed_gpu(from);
  } while (nothing(v));
}

// The sums of a warp, [16 * kTiles rows of weights, 8 * kGroups rows of the batch], on their way to the others: rows apart
// so that what lanes write and read at the same time is in different banks.
template <int kGroups>
inline constexpr int kSumStride = grid_sum_stride(kGroups);

// out [16 * kTiles, 8 * kGroups] = weights x what a step of the ring has, by one warp: the columns of its pairs of k-steps.
// A pair is 4 octets of columns. Lane (g, t) of mma.m16n8k16 has, of octet t, 8 columns of row g: units 0 to 3 for the first
// k-step, 4 to 7 for the second; the order of columns in a product is free.
template <class T, int kTiles, int kGroups, int kRegisterPairs>
class GridProduct {
  // Pairs whose operands are on their way together.
  static constexpr int kAtOnce = grid_pairs_at_once(kTiles, kGroups);
  static_assert(kRegisterPairs % kAtOnce == 0 && kRegisterPairs > 0);
  static constexpr int kParity = kRegisterPairs / kAtOnce % 2;  // of the first batch that shared memory has
  static constexpr int kChains = chains_of(kTiles, kGroups);
  using Operands = uint4[kAtOnce][kGroups];

 public:
  static constexpr int kColumns = kMatrixColumns * kGroups;
  static constexpr int kStageBytes = 0;  // operands come as they are wanted
  using Sums = float[kChains][kTiles][kGroups][4];

  // weights(m, octet, values): of row m of the block's tiles 8 columns, where there are such. shared: room for the pairs
  // beyond registers, of a warp.
  template <class Weights>
  GPU_FN void load(const Weights& weights, unsigned char* shared, int first_pair, int pairs, int octets) {
    lane_ = static_cast<int>(threadIdx.x) % 32;
    first_ = 4 * first_pair + lane_ % 4, pairs_ = pairs;
    own_pairs_ = (octets - first_ + 3) / 4 < pairs ? (octets - first_ + 3) / 4 : pairs;
    shared_ = reinterpret_cast<uint4*>(shared) + lane_;
#pragma unroll
    for (int j = 0; j < kRegisterPairs; ++j) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint4 above = eight(weights, j, m, 0), below = eight(weights, j, m, 8);
        registers_[2 * j][m][0] = above.x, registers_[2 * j][m][1] = below.x;
        registers_[2 * j][m][2] = above.y, registers_[2 * j][m][3] = below.y;
        registers_[2 * j + 1][m][0] = above.z, registers_[2 * j + 1][m][1] = below.z;
        registers_[2 * j + 1][m][2] = above.w, registers_[2 * j + 1][m][3] = below.w;
      }
    }
    for (int j = kRegisterPairs; j < pairs; ++j) {
      for (int m = 0; m < kTiles; ++m) {
        const uint4 above = eight(weights, j, m, 0), below = eight(weights, j, m, 8);
        uint4* const to = shared_ + ((j - kRegisterPairs) * 2 * kTiles + m) * 32;
        to[0] = make_uint4(above.x, below.x, above.y, below.y);
        to[kTiles * 32] = make_uint4(above.z, below.z, above.w, below.w);
      }
    }
  }

  // step: of the ring; to: this warp's [16 * kTiles, kSumStride] of the shared sums.
  GPU_FN void multiply(const uint32_t* step, float* to, unsigned char*) const {
    Sums sums;
#pragma unroll
    for (int i = 0; i < kChains * kTiles * kGroups * 4; ++i) {
      sums[i / (kTiles * kGroups * 4)][i / (kGroups * 4) % kTiles][i / 4 % kGroups][i % 4] = 0.f;
    }
    const auto* const words = reinterpret_cast<const uint4*>(step) + first_ * kColumns + lane_ / 4;
    Operands even, odd;
    issue(even, words, 0);
#pragma unroll
    for (int j = 0; j < kRegisterPairs; j += kAtOnce) {
      if (j < pairs_) {
        Operands& now = j / kAtOnce % 2 == 0 ? even : odd;
        issue(j / kAtOnce % 2 == 0 ? odd : even, words, j + kAtOnce);
        arrive(now, words, j);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) add(sums, registers_[2 * (j + i)], registers_[2 * (j + i) + 1], now[i]);
      }
    }
#pragma unroll 1
    for (int j = kRegisterPairs; j < pairs_; j += 2 * kAtOnce) {
      add_shared(sums, words, kParity == 0 ? even : odd, kParity == 0 ? odd : even, j);
      if (j + kAtOnce < pairs_)
        add_shared(sums, words, kParity == 0 ? odd : even, kParity == 0 ? even : odd, j + kAtOnce);
    }
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = sums[0][m][q][i];
          if constexpr (kChains == 2) {
            v[i] += sums[1][m][q][i];
          }
        }
        float* const at = to + (m * 16 + g) * kSumStride<kGroups> + q * 8 + 2 * t;
        *reinterpret_cast<float2*>(at) = make_float2(v[0], v[1]);
        *reinterpret_cast<float2*>(at + 8 * kSumStride<kGroups>) = make_float2(v[2], v[3]);
      }
    }
  }

 private:
  // Of the warp's j-th pair the lane's octet: first_ + 4 j.
  GPU_FN bool has(int j) const { return j < own_pairs_; }
  template <class Weights>
  GPU_FN uint4 eight(const Weights& weights, int j, int m, int below) const {
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = gpu::from_float<T>(0.f);
    if (has(j)) weights(m * 16 + lane_ / 4 + below, first_ + 4 * j, values);
    uint4 bits;
    memcpy(&bits, static_cast<const void*>(values), sizeof bits);
    return bits;
  }
  static GPU_FN const uint4* place(const uint4* words, int j, int q) { return words + 4 * j * kColumns + q * 8; }
  GPU_FN void issue(Operands& operands, const uint4* words, int j) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        operands[i][q] = has(j + i) ? gpu::load_relaxed_gpu(place(words, j + i, q)) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  GPU_FN void arrive(Operands& operands, const uint4* words, int j) const {
    bool missing = false;  // not where the lane has no octet: zeros
#pragma unroll
    for (int i = 0; i < kAtOnce * kGroups; ++i) missing = missing || nothing(operands[i / kGroups][i % kGroups]);
    if (missing) {
#pragma unroll
      for (int i = 0; i < kAtOnce * kGroups; ++i) {
        settle(operands[i / kGroups][i % kGroups], place(words, j + i / kGroups, i % kGroups));
      }
    }
    gpu::syncwarp();
  }
  GPU_FN void add(Sums& sums, const uint32_t (&first)[kTiles][4], const uint32_t (&second)[kTiles][4],
                  const uint4 (&operand)[kGroups]) const {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const uint32_t b[2] = {operand[q].x, operand[q].y}, next[2] = {operand[q].z, operand[q].w};
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        gpu::mma_m16n8k16<T>(sums[0][m][q], first[m], b);
        gpu::mma_m16n8k16<T>(sums[kChains - 1][m][q], second[m], next);
      }
    }
  }
  // kAtOnce pairs from the j-th on, whose weights are in shared memory; their operands, and the next ones'.
  GPU_FN void add_shared(Sums& sums, const uint4* words, Operands& now, Operands& next, int j) const {
    issue(next, words, j + kAtOnce);
    arrive(now, words, j);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (j + i < pairs_) {
        uint32_t a[2][kTiles][4];
#pragma unroll
        for (int m = 0; m < 2 * kTiles; ++m) {
          const uint4 v = shared_[((j + i - kRegisterPairs) * 2 * kTiles + m) * 32];
          uint32_t (&to)[4] = a[m / kTiles][m % kTiles];
          to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
        add(sums, a[0], a[1], now[i]);
      }
    }
  }

  int lane_, first_;  // the lane's first octet
  int pairs_, own_pairs_;  // the warp's, and those in which the lane has an octet
  uint32_t registers_[2 * kRegisterPairs][kTiles][4];
  uint4* shared_;
};

// The same in float32, without tensor cores: kRows rows of weights for each of 8 lanes, row m = 8 r + lane % 8. Of the four
// lanes with the same rows each has a quarter of the rows of the batch, or where they are few rows of weights, a quarter of
// the columns of the weights: what is read from shared memory limits this product.
template <int kRows, int kGroups>
class GridProduct32 {
 public:
  static constexpr int kColumns = kMatrixColumns * kGroups;

  // weights: as above. shared: [pairs * 32 columns, 8 lanes, kRows] of a warp.
  template <class Weights>
  GPU_FN void load(const Weights& weights, unsigned char* shared, int first_pair, int pairs, int octets) {
    lane_ = static_cast<int>(threadIdx.x) % 32;
    first_ = first_pair, pairs_ = pairs, octets_ = octets;
    shared_ = reinterpret_cast<float*>(shared);
    for (int i = lane_; i < pairs * 32 * kRows; i += 32) {
      const int m = i % (8 * kRows), o = i / (8 * kRows);
      float values[8] = {};
      if (4 * first_ + o < octets) weights(m, 4 * first_ + o, values);
      for (int k = 0; k < 8; ++k) shared_[((o * 8 + k) * 8 + m % 8) * kRows + m / 8] = values[k];
    }
    gpu::syncwarp();
  }

  // stage: this warp's [32 columns of weights, kStageStride].
  GPU_FN void multiply(const uint32_t* step, float* to, unsigned char* stage_bytes) const {
    auto* const stage = reinterpret_cast<float*>(stage_bytes);
    const auto* const words = reinterpret_cast<const uint4*>(step);
    float sums[kRows][kOwn];
#pragma unroll
    for (int i = 0; i < kRows * kOwn; ++i) sums[i / kOwn][i % kOwn] = 0.f;
    uint4 next[kLoads];
    issue(next, words, 0);
    const int quarter = lane_ / 8;
#pragma unroll 1
    for (int j = 0; j < pairs_; ++j) {
      gpu::syncwarp();  // the stage has been read
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const Part part(i * 32 + lane_);
        if (has(j, part)) settle(next[i], place(words, j, part));
        float v[4];
        memcpy(v, &next[i], sizeof v);
        float* const column = stage + (part.octet * 8 + part.half * 4) * kStageStride + part.column;
#pragma unroll
        for (int k = 0; k < 4; ++k) column[k * kStageStride] = v[k];
      }
      issue(next, words, j + 1);
      gpu::syncwarp();
      const float* const weights = shared_ + (j * 32 * 8 + lane_ % 8) * kRows;
#pragma unroll 4
      for (int k = 0; k < 32 / kPhases; ++k) {
        const int at = kPhases == 1 ? k : k * kPhases + quarter;
        float w[kRows], h[kOwn];
#pragma unroll
        for (int r = 0; r < kRows; ++r) w[r] = weights[at * 8 * kRows + r];
        const float* const from = stage + at * kStageStride + (kPhases == 1 ? quarter * kOwn : 0);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) h[c] = from[c];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kOwn; ++c) sums[r][c] = fmaf(w[r], h[c], sums[r][c]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        float* const at = to + (r * 8 + lane_ % 8) * kSumStride<kGroups>;
        if constexpr (kPhases == 1) {
          at[quarter * kOwn + c] = sums[r][c];
        } else {
          float sum = sums[r][c];
          sum += gpu::shuffle_xor(sum, 8);
          sum += gpu::shuffle_xor(sum, 16);
          if (c % 4 == quarter) at[c] = sum;
        }
      }
    }
  }

  static constexpr int kStageStride = kColumns + 4;  // lanes then write to different banks
  static constexpr int kStageBytes = 32 * kStageStride * 4;  // of a warp

 private:
  static constexpr int kPhases = kRows <= 2 ? 4 : 1;
  static constexpr int kOwn = kPhases == 1 ? kColumns / 4 : kColumns;  // rows of the batch of a lane
  static constexpr int kLoads = kColumns / 4;  // of 16 bytes a lane: 4 octets of a step

  struct Part {
    int octet, half, column;
    GPU_FN explicit Part(int i) : octet(i / (2 * kColumns)), half(i / kColumns % 2), column(i % kColumns) {}
  };
  GPU_FN bool has(int j, const Part& part) const { return j < pairs_ && 4 * (first_ + j) + part.octet < octets_; }
  GPU_FN const uint4* place(const uint4* words, int j, const Part& part) const {
    return words + ((4 * (first_ + j) + part.octet) * kColumns + part.column) * 2 + part.half;
  }
  GPU_FN void issue(uint4 (&v)[kLoads], const uint4* words, int j) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Part part(i * 32 + lane_);
      v[i] = has(j, part) ? gpu::load_relaxed_gpu(place(words, j, part)) : make_uint4(0, 0, 0, 0);
    }
  }

  int lane_, first_, pairs_, octets_;
  float* shared_;
};

}  // namespace fastrnn
