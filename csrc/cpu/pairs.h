// What the scans multiply where the machine has products of bfloat16 (bf16.h): weights in blocks of pairs, and the rows of
// a step one after another as operands, all in one part or in several (parts.h). Sums stay float32. Compiled once per ISA.
#pragma once

#include "cpu/bf16.h"
#include "cpu/parts.h"
#include "cpu/scan_common.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

// k of an operand, with zeros behind: pairs; of many, and in parts always, whole tiles of a matrix unit.
inline int64_t operand_width(const Scan& scan, int64_t k) {
  if (scan.plan.parts > 1) return whole_tiles(k);
  return rounded_up(k, k <= kAmxDepth ? 2 : scan.bf16->depth_step);
}

// Part of a row for the next step: what this step computed, or zeros where the next begins anew.
template <class W>
void leave_operand(int parts, at::BFloat16* to, int64_t apart, const W* from, int64_t count, bool cut) {
  if (cut) {
    for (int part = 0; part < parts; ++part) std::fill_n(to + part * apart, count, at::BFloat16(0));
  } else {
    copy_parts(parts, to, apart, from, count);
  }
}

// Two k of a row in the 32 bits of a float, for pack_transposed: the numbers of one of their parts.
struct Pair {
  static constexpr int kTogether = 2;
  int parts, part;

  template <class W>
  FASTRNN_INLINE void copy(const W* from, int64_t count, float* to) const {
    auto* pairs = reinterpret_cast<at::BFloat16*>(to);
    if (parts == 1) {
      copy_parts(parts, pairs, 0, from, count);
    } else {
      constexpr int kLanes = Vec<float>::size();
      for (int64_t k = 0; k < count; k += kLanes) {
        Vec<float> v = load(from + k, count - k);
        for (int before = 0; before < part; ++before) v = v - leading(v);
        store_leading(pairs + k, leading(v), count - k);
      }
    }
    if (count % 2 != 0) pairs[count] = at::BFloat16(0);
  }
};

// One block of columns as it lies, in pairs of k: out [width / 2][kVectors][lanes][2] from w [depth, columns], zeros beyond
// the last column and the depth; further parts behind it.
template <int kVectors, class W>
void pack_columns_in_pairs(int parts, const W* w, int64_t columns, int64_t depth, int64_t block, at::BFloat16* out,
                           int64_t width) {
  constexpr int kLanes = Vec<float>::size();
  const int64_t apart = width * kVectors * kLanes;
  for (int64_t k = 0; k < width; k += 2) {
    for (int v = 0; v < kVectors; ++v, out += 2 * kLanes) {
      const int64_t j = (block * kVectors + v) * kLanes, count = columns - j;
      const auto row = [&](int64_t at) {
        return count > 0 && at < depth ? load(w + at * columns + j, count) : Vec<float>(0);
      };
      store_pairs(parts, out, apart, row(k), row(k + 1));
    }
  }
}

// The operands of two steps, in turn: what this step multiplies, and what it leaves to the next. Members that share the
// units share the rows too; else each has its own, and some more, as products may read beyond the last.
class Operands {
 public:
  static constexpr int64_t kRows = 32;  // of a product; where there are many, it takes several times as many

  Operands() = default;
  // `width`: of a row in one part
  Operands(int64_t batch, int64_t width, const CpuPlan& plan)
      : batch_(batch),
        rows_(batch + kRows * plan.threads),
        width_(width),
        stride_(plan.parts * width + (plan.parts * width % kConflict == 0 ? 32 : 0)) {}

  void take(Arena& arena) { memory_ = arena.take<at::BFloat16>(2 * rows_ * stride_); }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }  // of a row in one part; the next part is behind it
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

// Calls f(first, count, height) for rows of which the products and what follows on them take turns, while the sums are in
// L1: in parts two tiles of that height together (amx.h), else all.
template <class F>
FASTRNN_INLINE void for_products(const CpuPlan& plan, int64_t count, const F& f) {
  if (plan.parts <= 1) {
    f(0, count, 0);
    return;
  }
  const int64_t height = tile_height(count);
  for (int64_t i = 0; i < count; i += 2 * height) f(i, std::min(2 * height, count - i), height);
}

// c [count, n] = a b of operands, of which each part is `width` wide, and of weights in pairs, [width / 2][n][2]: k columns
// of both from the ones given on. What lies behind the last row, of a and of c, takes part and means nothing: rows come in
// whole multiples, so that a batch whose rows end one by one needs no code of its own for each number of them.
inline void multiply_rows(const Scan& scan, int64_t height, int64_t count, int64_t n, int64_t k,
                          const Operands& operands, const at::BFloat16* a, const at::BFloat16* b, float* c,
                          int64_t ldc) {
  constexpr int64_t kManyRows = 4 * Operands::kRows;
  const int64_t lda = operands.stride();
  if (k == 0) {  // a layer without inputs
    for (int64_t i = 0; i < count; ++i) std::fill_n(c + i * ldc, n, 0.0f);
    return;
  }
  if (scan.plan.parts > 1) {
    scan.bf16->multiply_parts({scan.plan.parts, height, count, n, k}, {a, lda, operands.width()},
                              {b, n, operands.width() * n}, c, ldc);
    return;
  }
  int64_t m = 0;
  for (int64_t i = 0; i < count; i += m) {
    const int64_t left = count - i;
    m = left >= kManyRows ? kManyRows : rounded_up(blocks(left, blocks(left, Operands::kRows)), scan.bf16->row_step);
    while (m / 2 >= left) m /= 2;
    scan.bf16->multiply(m, n, k, lda, n, ldc, a + i * lda, b, c + i * ldc);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
