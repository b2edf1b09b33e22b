// The kinds of packed weights: how a block of them is laid out, and how it is multiplied with a few rows. Each has
//   block_bytes, pack         one block of a matrix, of so many vectors
//   kMostRows                 of a tile
//   prepare, Operand, operand what rows are multiplied as: made once a step, of all rows, and found again, row by row
//   multiply                  sums [rows][vectors][lanes] = the block times the operands of some rows, with each lane's sum
//                             over k in kPartials parts, or exact; `next` is the block that follows, of which this tile
//                             fetches its part (packed_for())
// A block of a matrix [rows, depth] is [k][vectors][lanes], for 16 bits [k / 2][vectors][lanes][2], for 8 bits
// [k / 4][vectors][lanes][4], zeros beyond what there is. Behind 8-bit weights lie a scale and a correction for each row,
// [vectors][lanes] each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/streaming_kernels.h"
#include "cpu/tile.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace fastrnn {
inline namespace CPU_CAPABILITY {

// Cells share the products, which are long beside a call: inlined into each, they would take minutes to compile.
#define FASTRNN_SHARED __attribute__((noinline))

// Some rows of a matrix [gates * units, depth], one for each lane of a block: gate after gate, those of some units each.
template <class T>
struct BlockSource {
  const T* w;
  int64_t gates, units, depth;
  int64_t first;  // unit of the block
  int vectors;  // of the block
  int64_t gate_units;  // lanes of a gate

  int64_t row(int vector, int lane) const {  // -1: none
    const int64_t column = vector * Vec<T>::size() + lane, gate = column / gate_units;
    const int64_t unit = first + column % gate_units;
    return gate < gates && unit < units ? gate * units + unit : -1;
  }
};

constexpr int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Writes value(row, k, lane of the block) for every place of a block.
template <int kTogether, class T, class Element, class Value>
void fill_block(const BlockSource<T>& source, Element* out, const Value& value) {
  constexpr int kLanes = Vec<T>::size();
  for (int64_t k = 0; k < source.depth; k += kTogether) {
    for (int v = 0; v < source.vectors; ++v) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = source.row(v, lane);
        for (int i = 0; i < kTogether; ++i) {
          *out++ = row >= 0 && k + i < source.depth ? value(row, k + i, v * kLanes + lane) : Element(0);
        }
      }
    }
  }
}

// Rows that are multiplied as they are.
template <class T>
struct PlainOperands {
  using Operand = const T*;

  static void prepare(const T*, int64_t, int64_t, char*) {}
  static FASTRNN_INLINE Operand operand(const T* rows, int64_t row, int64_t depth, const char*) {
    return rows + row * padded(depth);
  }
};

template <class T>
struct FullWeights : PlainOperands<T> {
  using typename PlainOperands<T>::Operand;
  static constexpr int kMostRows = 6;

  static int64_t block_bytes(int64_t depth, int vectors) {
    return whole_lines(depth * vectors * Vec<T>::size() * sizeof(T));
  }
  static void pack(const BlockSource<T>& source, void* out) {
    fill_block<1>(source, static_cast<T*>(out),
                  [&](int64_t row, int64_t k, int) { return source.w[row * source.depth + k]; });
  }

  template <int kPartials, int kRows, int kVectors>
  static FASTRNN_INLINE void multiply(T* sums, const char* block, const char* next, RowTile tile,
                                      const Operand (&a)[kRows], int64_t depth, bool) {
    const auto packed = packed_for<kVectors>(reinterpret_cast<const T*>(block), reinterpret_cast<const T*>(next), tile,
                                             depth);
    accumulate<kRows, kVectors, kPartials>(sums, false, packed, a, depth);
  }
};

// Two values of k to a lane of 32 bits: a shift and a mask make them float32, exactly.
struct Bfloat16Weights : PlainOperands<float> {
  using Element = uint16_t;
  static constexpr int kMostRows = 4;  // beside a pair of vectors of weights for each of a tile

  static Element round(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if (x != x) return static_cast<Element>(bits >> 16 | 0x40);  // stays NaN without its low half
    return static_cast<Element>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
  static int64_t block_bytes(int64_t depth, int vectors) {
    return whole_lines((depth + 1) / 2 * 2 * vectors * Vec<float>::size() * sizeof(Element));
  }
  static void pack(const BlockSource<float>& source, void* out) {
    fill_block<2>(source, static_cast<Element*>(out),
                  [&](int64_t row, int64_t k, int) { return round(source.w[row * source.depth + k]); });
  }

  template <int kPartials, int kRows, int kVectors>
  static FASTRNN_SHARED void multiply(float* sums, const char* block, const char*, RowTile, const Operand (&a)[kRows],
                                      int64_t depth, bool) {
    using V = Vec<float>;
    using I = at::vec::Vectorized<int32_t>;
    V sum[kRows][kVectors];
    set_zero(sum);
    constexpr int64_t kChunk = 192;  // a long sum is one of chunks, as in accumulate()
    const int32_t* w = reinterpret_cast<const int32_t*>(block);
    for (int64_t begin = 0; begin < depth; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, depth);
      V partial[kPartials][kRows][kVectors];
#pragma GCC unroll 32
      for (int p = 0; p < kPartials; ++p) set_zero(partial[p]);
      for (int64_t k = begin; k < end; k += 2) {  // beyond an odd depth both are zero
        V low[kVectors], high[kVectors];
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) {
          const I pair = I::loadu(w + v * V::size());
          low[v] = at::vec::cast<float>(pair << I(16));
          high[v] = at::vec::cast<float>(pair & I(static_cast<int32_t>(0xffff0000)));
        }
#pragma GCC unroll 32
        for (int r = 0; r < kRows; ++r) {
          const V even(a[r][k]), odd(a[r][k + 1]);
#pragma GCC unroll 32
          for (int v = 0; v < kVectors; ++v) {
            partial[0][r][v] = at::vec::fmadd(even, low[v], partial[0][r][v]);
            partial[kPartials - 1][r][v] = at::vec::fmadd(odd, high[v], partial[kPartials - 1][r][v]);
          }
        }
        w += kVectors * V::size();
      }
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 32
          for (int p = 0; p < kPartials; ++p) sum[r][v] = sum[r][v] + partial[p][r][v];
        }
      }
    }
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v) sum[r][v].store(sums + (r * kVectors + v) * V::size());
    }
  }
};

// How four products of 8-bit integers a lane are added to a sum, exactly, in 32 bits: weights signed, operands not.
static FASTRNN_INLINE int32_t four(const uint8_t* a) {
  int32_t bits;
  std::memcpy(&bits, a, sizeof(bits));
  return bits;
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#if defined(CPU_CAPABILITY_AVX512)
struct Integers {
  using I = __m512i;
  static FASTRNN_INLINE void store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static FASTRNN_INLINE I add(I x, I y) { return _mm512_add_epi32(x, y); }
  static FASTRNN_INLINE I broadcast_wide(__m128i x) { return _mm512_broadcastq_epi64(x); }
  static FASTRNN_INLINE I widen(const int8_t* p) {  // to 16 bits
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FASTRNN_INLINE I multiply_pairs(I x, I y) { return _mm512_madd_epi16(x, y); }
};
#else
struct Integers {
  using I = __m256i;
  static FASTRNN_INLINE void store(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
  static FASTRNN_INLINE I add(I x, I y) { return _mm256_add_epi32(x, y); }
  static FASTRNN_INLINE I broadcast_wide(__m128i x) { return _mm256_broadcastq_epi64(x); }
  static FASTRNN_INLINE I widen(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static FASTRNN_INLINE I multiply_pairs(I x, I y) { return _mm256_madd_epi16(x, y); }
};
#endif

// Without it: widened to 16 bits, of which two products at a time add up in 32.
struct PairProducts {
  using I = Integers::I;
  struct Sum {
    I low, high;  // two sums a lane: of the first half of the lanes, of the second
  };
  using Operand = I;
  static FASTRNN_INLINE Sum zero() { return {I{}, I{}}; }
  static FASTRNN_INLINE Operand operand(const uint8_t* a) {
    return Integers::broadcast_wide(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four(a))));
  }
  static FASTRNN_INLINE void add(Sum& sum, Operand a, const int8_t* w) {
    constexpr int kHalf = 2 * Vec<float>::size();
    sum.low = Integers::add(sum.low, Integers::multiply_pairs(Integers::widen(w), a));
    sum.high = Integers::add(sum.high, Integers::multiply_pairs(Integers::widen(w + kHalf), a));
  }
  static FASTRNN_INLINE void add_to(int32_t* lanes, const Sum& sum) {
    constexpr int kLanes = Vec<float>::size();
    int32_t s[2 * kLanes];
    Integers::store(s, sum.low);
    Integers::store(s + kLanes, sum.high);
    for (int i = 0; i < kLanes; ++i) lanes[i] += s[2 * i] + s[2 * i + 1];
  }
};
#else
struct PairProducts {
  static constexpr int kLanes = Vec<float>::size();
  struct Sum {
    int32_t lanes[kLanes];
  };
  using Operand = const uint8_t*;
  static FASTRNN_INLINE Sum zero() { return {}; }
  static FASTRNN_INLINE Operand operand(const uint8_t* a) { return a; }
  static FASTRNN_INLINE void add(Sum& sum, Operand a, const int8_t* w) {
    for (int i = 0; i < kLanes; ++i) {
      sum.lanes[i] += a[0] * w[4 * i] + a[1] * w[4 * i + 1] + a[2] * w[4 * i + 2] + a[3] * w[4 * i + 3];
    }
  }
  static FASTRNN_INLINE void add_to(int32_t* lanes, const Sum& sum) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += sum.lanes[i];
  }
};
#endif

#if defined(CPU_CAPABILITY_AVX512)
// The instruction for it. By name, as the file is compiled for machines without: has_int8_dot() is asked before.
struct DotInstruction {
  using Sum = __m512i;
  using Operand = __m512i;
  static FASTRNN_INLINE Sum zero() { return _mm512_setzero_si512(); }
  static FASTRNN_INLINE Operand operand(const uint8_t* a) { return _mm512_set1_epi32(four(a)); }
  static FASTRNN_INLINE void add(Sum& sum, Operand a, const int8_t* w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(_mm512_loadu_si512(w)));
  }
  static FASTRNN_INLINE void add_to(int32_t* lanes, Sum sum) {
    _mm512_storeu_si512(lanes, _mm512_add_epi32(_mm512_loadu_si512(lanes), sum));
  }
};
#else
using DotInstruction = PairProducts;
#endif

// A row w of a matrix is kept as integers q = round(w / s), s = max |w| / 127; a row x of operands becomes u =
// round(x / t) + 128, t = max |x| / 127, in every step. Then w . x is about s t (q . u - 128 sum(q)), where q . u is
// exact. NaN or infinity in x make t, and so the whole product, NaN.
struct Int8Weights {
  struct Operand {
    const uint8_t* u;  // [padded(depth)]
    float scale;  // t
  };
  static constexpr int kMostRows = 4;
  static constexpr int kTogether = 4;

  static constexpr int64_t row_bytes(int vectors) {  // a number for each row
    return vectors * Vec<float>::size() * sizeof(float);
  }
  static int64_t weight_bytes(int64_t depth, int vectors) {
    return whole_lines((depth + 3) / 4 * 4 * vectors * Vec<float>::size());
  }
  static int64_t block_bytes(int64_t depth, int vectors) {
    return weight_bytes(depth, vectors) + whole_lines(2 * row_bytes(vectors));
  }

  static void pack(const BlockSource<float>& source, void* out) {
    constexpr int kLanes = Vec<float>::size();
    const int64_t depth = source.depth;
    char* behind = static_cast<char*>(out) + weight_bytes(depth, source.vectors);
    float* scale = reinterpret_cast<float*>(behind);
    float* correction = reinterpret_cast<float*>(behind + row_bytes(source.vectors));
    const auto scale_of = [&](int64_t row) {
      float largest = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const float w = std::abs(source.w[row * depth + k]);
        largest = w > largest || w != w ? w : largest;
      }
      return std::isfinite(largest) ? largest / 127 : std::numeric_limits<float>::quiet_NaN();
    };
    const auto quantise = [&](int64_t row, int64_t k, float s) {
      return s > 0 ? static_cast<int8_t>(std::lrint(std::clamp(source.w[row * depth + k] / s, -127.0f, 127.0f)))
                   : int8_t(0);
    };
    for (int v = 0; v < source.vectors; ++v) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = source.row(v, lane);
        float& s = scale[v * kLanes + lane];
        s = row < 0 ? 0 : scale_of(row);
        int32_t sum = 0;
        for (int64_t k = 0; row >= 0 && k < depth; ++k) sum += quantise(row, k, s);
        const int32_t corrected = 128 * sum;
        std::memcpy(&correction[v * kLanes + lane], &corrected, sizeof(corrected));
      }
    }
    fill_block<kTogether>(source, static_cast<int8_t*>(out),
                          [&](int64_t row, int64_t k, int lane) { return quantise(row, k, scale[lane]); });
  }

  // [rows] of quantised_row(depth) bytes each, the scale behind the integers
  static void prepare(const float* rows, int64_t count, int64_t depth, char* memory) {
    for (int64_t r = 0; r < count; ++r) {
      char* const row = memory + r * quantised_row(depth);
      const float scale = quantise_row(rows + r * padded(depth), depth, reinterpret_cast<uint8_t*>(row));
      std::memcpy(row + padded(depth), &scale, sizeof(scale));
    }
  }
  static FASTRNN_INLINE Operand operand(const float*, int64_t row, int64_t depth, const char* memory) {
    const char* const at = memory + row * quantised_row(depth);
    Operand operand{reinterpret_cast<const uint8_t*>(at), 0};
    std::memcpy(&operand.scale, at + padded(depth), sizeof(operand.scale));
    return operand;
  }

  // u [padded(depth)]; t
  static float quantise_row(const float* row, int64_t depth, uint8_t* u) {
    using V = Vec<float>;
    V largest(0);
    for (int64_t k = 0; k < depth; k += V::size()) largest = at::vec::maximum(largest, V::loadu(row + k).abs());
    const float most = at::vec::vec_reduce_all<float>([](V a, V b) { return at::vec::maximum(a, b); }, largest);
    if (!std::isfinite(most)) {
      std::memset(u, 128, padded(depth));
      return std::numeric_limits<float>::quiet_NaN();
    }
    const V inverse(most > 1e-35f ? 127 / most : 0);  // of less the inverse may be infinite: that counts as zero
    for (int64_t k = 0; k < padded(depth); k += V::size()) {
      const V scaled = at::vec::clamp(V::loadu(row + k) * inverse, V(-127), V(127)).round();
      int32_t q[V::size()];
      at::vec::convert_to_int_of_same_size(scaled).store(q);
      for (int i = 0; i < V::size(); ++i) u[k + i] = static_cast<uint8_t>(q[i] + 128);
    }
    return most / 127;
  }

  template <int, int kRows, int kVectors>
  static FASTRNN_SHARED void multiply(float* sums, const char* block, const char*, RowTile, const Operand (&a)[kRows],
                                      int64_t depth, bool int8_dot) {
    if (int8_dot) {
      multiply_with<DotInstruction, kRows, kVectors>(sums, block, a, depth);
    } else {
      multiply_with<PairProducts, kRows, kVectors>(sums, block, a, depth);
    }
  }

  template <class Products, int kRows, int kVectors>
  static void multiply_with(float* sums, const char* block, const Operand (&a)[kRows], int64_t depth) {
    using V = Vec<float>;
    using I = at::vec::Vectorized<int32_t>;
    constexpr int kLanes = V::size();
    constexpr int kPartials = partial_sums(
        kRows, kVectors * static_cast<int>(sizeof(typename Products::Sum)) / static_cast<int>(sizeof(V)));
    typename Products::Sum partial[kPartials][kRows][kVectors];
#pragma GCC unroll 32
    for (int p = 0; p < kPartials; ++p) {
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) partial[p][r][v] = Products::zero();
      }
    }
    const int8_t* w = reinterpret_cast<const int8_t*>(block);
    const auto add = [&](int p, int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const auto x = Products::operand(a[r].u + k);
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) Products::add(partial[p][r][v], x, w + v * kTogether * kLanes);
      }
      w += kVectors * kTogether * kLanes;
    };
    int64_t k = 0;
    for (; k + kTogether * kPartials <= depth; k += kTogether * kPartials) {
#pragma GCC unroll 32
      for (int p = 0; p < kPartials; ++p) add(p, k + kTogether * p);
    }
    for (; k < depth; k += kTogether) add(0, k);
    const char* behind = block + weight_bytes(depth, kVectors);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const V scale(a[r].scale);
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v) {
        int32_t lanes[kLanes] = {};
#pragma GCC unroll 32
        for (int p = 0; p < kPartials; ++p) Products::add_to(lanes, partial[p][r][v]);
        const I correction = I::loadu(behind + row_bytes(kVectors) + v * sizeof(V));
        const V exact = at::vec::convert_to_fp_of_same_size<float>(I::loadu(lanes) - correction);
        const V row_scale = V::loadu(reinterpret_cast<const float*>(behind) + v * kLanes);
        (exact * (row_scale * scale)).store(sums + (r * kVectors + v) * kLanes);
      }
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
