// What the scans multiply where the machine has products of bfloat16 (bf16.h): weights in blocks of pairs, and the rows of
// a step one after another as operands. Sums stay float32. Compiled once per ISA.
#pragma once

#include "cpu/bf16.h"
#include "cpu/scan_common.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

// k of an operand, with zeros behind: pairs; beyond 32 whole tiles of a matrix unit, which cuts others into small ones.
constexpr int64_t operand_width(int64_t k) { return k <= 32 ? (k + 1) / 2 * 2 : (k + 31) / 32 * 32; }

// Rounded to nearest.
template <class W>
void copy_rounded(at::BFloat16* to, const W* from, int64_t count) {
  if constexpr (std::is_same_v<W, at::BFloat16>) {
    std::copy_n(from, count, to);
  } else {
    constexpr int kLanes = Vec<float>::size();
    for (int64_t k = 0; k < count; k += kLanes) store(to + k, load(from + k, count - k), count - k);
  }
}

// Part of a row for the next step: what this step computed, or zeros where the next begins anew.
template <class W>
void leave_operand(at::BFloat16* to, const W* from, int64_t count, bool cut) {
  if (cut) {
    std::fill_n(to, count, at::BFloat16(0));
  } else {
    copy_rounded(to, from, count);
  }
}

// Two k of a row in the 32 bits of a float, for pack_transposed.
struct Pair {
  static constexpr int kTogether = 2;
  template <class W>
  static FASTRNN_INLINE void copy(const W* from, int64_t count, float* to) {
    auto* pairs = reinterpret_cast<at::BFloat16*>(to);
    copy_rounded(pairs, from, count);
    if (count % 2 != 0) pairs[count] = at::BFloat16(0);
  }
};

// One block of columns as it lies, in pairs of k: out [operand_width(depth) / 2][kVectors][lanes][2] from w [depth, columns],
// zeros beyond the last column and the depth.
template <int kVectors, class W>
void pack_columns_in_pairs(const W* w, int64_t columns, int64_t depth, int64_t block, at::BFloat16* out) {
  constexpr int kLanes = Vec<float>::size();
  for (int64_t k = 0; k < operand_width(depth); k += 2) {
    for (int v = 0; v < kVectors; ++v, out += 2 * kLanes) {
      const int64_t j = (block * kVectors + v) * kLanes, count = columns - j;
      const auto row = [&](int64_t at) {
        return count > 0 && at < depth ? load(w + at * columns + j, count) : Vec<float>(0);
      };
      const auto [low, high] = at::vec::interleave2(row(k), row(k + 1));
      at::vec::convert_from_float<at::BFloat16>(low, high).store(out);
    }
  }
}

// The operands of two steps, in turn: what this step multiplies, and what it leaves to the next. Members that share the
// units share the rows too; else each has its own, and some more, as products may read beyond the last.
class Operands {
 public:
  static constexpr int64_t kRows = 32;  // of a product; where there are many, it takes several times as many

  Operands() = default;
  Operands(int64_t batch, int64_t width, int members)
      : batch_(batch),
        rows_(batch + kRows * members),
        width_(width),
        stride_(width + (width % kConflict == 0 ? 32 : 0)) {}

  void take(Arena& arena) { memory_ = arena.take<at::BFloat16>(2 * rows_ * stride_); }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  int64_t stride() const { return stride_; }  // from a row to the next

  // [its rows, stride] of a member
  FASTRNN_INLINE at::BFloat16* of_step(int64_t s, const Place& place) const {
    const int64_t first = place.shard_units ? 0 : place.rows(batch_).begin + kRows * place.member;
    return memory_ + (s % 2 * rows_ + first) * stride_;
  }
  // Zeros for both steps: what lies behind the columns and rows meets zeros, or means nothing, but must not be NaN.
  void clear(const Place& place) const {
    const Range part = share(rows_, place.member, place.members);
    for (int64_t s = 0; s < 2; ++s) {
      std::fill_n(memory_ + (s * rows_ + part.begin) * stride_, (part.end - part.begin) * stride_, at::BFloat16(0));
    }
  }

 private:
  // A product reads the same columns of 32 rows at a time, and rows a multiple of 256 bytes apart would find place in a
  // part of L1 only.
  static constexpr int64_t kConflict = 128;  // elements

  at::BFloat16* memory_ = nullptr;  // [2][rows][stride]
  int64_t batch_ = 0, rows_ = 0, width_ = 0, stride_ = 0;
};

// c [count, n] = a b: rows in whole multiples, so that a batch whose rows end one by one needs no code of its own for each
// number of them. What lies behind the last row, of a and of c, takes part and means nothing.
inline void multiply_rows(const Bf16Products& products, int64_t count, int64_t n, int64_t k, const at::BFloat16* a,
                          int64_t lda, const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int64_t kManyRows = 4 * Operands::kRows;
  if (k == 0) {  // a layer without inputs
    for (int64_t i = 0; i < count; ++i) std::fill_n(c + i * ldc, n, 0.0f);
    return;
  }
  int64_t m = 0;
  for (int64_t i = 0; i < count; i += m) {
    m = count - i >= kManyRows ? kManyRows : Operands::kRows;
    while (m / 2 >= count - i) m /= 2;
    products.multiply(m, n, k, lda, ldb, ldc, a + i * lda, b, c + i * ldc);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
