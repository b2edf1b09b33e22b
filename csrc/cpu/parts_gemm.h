// A product of large matrices of float32 in parts of bfloat16 (amx.h): what surrounds a scan, at the rate of the scan's own
// products. Compiled once per ISA.
#pragma once

#include <ATen/Parallel.h>

#include <memory>

#include "cpu/bf16.h"
#include "cpu/kernels.h"
#include "cpu/parts.h"
#include "cpu/tile.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

class PartsGemm {
 public:
  // c [m, ldc] = or += a b in two or three parts. Of each factor one stride is one.
  static void run(const Bf16Products& products, int parts, const GemmSizes& sizes, const Factor& a, const Factor& b,
                  float* c, int64_t ldc, bool add, int threads) {
    const auto part = [&](bool rows, int64_t begin, int64_t end) {
      GemmSizes share = sizes;
      (rows ? share.m : share.n) = end - begin;
      const Factor of_a{a.data + (rows ? begin * a.row : 0), a.row, a.column};
      const Factor of_b{b.data + (rows ? 0 : begin * b.column), b.row, b.column};
      PartsGemm(products, parts, share, of_a, of_b, c + (rows ? begin * ldc : begin), ldc, add).multiply();
      products.release();
    };
    // The longer side is shared: what each thread packs of the other is then least.
    const bool rows = sizes.m >= sizes.n;
    const int64_t units = blocks(rows ? sizes.m : sizes.n, kRows), side = rows ? sizes.m : sizes.n;
    if (threads <= 1 || units == 1) {
      part(rows, 0, side);
      return;
    }
    at::parallel_for(0, units, blocks(units, threads),
                     [&](int64_t begin, int64_t end) { part(rows, begin * kRows, std::min(end * kRows, side)); });
  }

 private:
  static constexpr int kLanes = Vec<float>::size();
  static constexpr int64_t kRows = 2 * kAmxRows;  // of a panel of a
  // of a block of b: in three parts three quarters of an L2 of 2 MiB
  static constexpr int64_t kDepth = 512, kColumns = 512;
  static constexpr int64_t kStride = kMostParts * kDepth + 32;  // of a row of a panel, no multiple of 256 bytes

  const Bf16Products& products_;
  const int parts_;
  const GemmSizes& sizes_;
  const Factor &a_, &b_;
  float* const c_;
  const int64_t ldc_;
  const bool add_;
  std::unique_ptr<at::BFloat16[]> memory_;
  at::BFloat16 *panel_, *block_;  // [kRows][kStride]; [parts][depth / 2][columns][2]
  float* sums_;  // [kRows][kColumns]

  PartsGemm(const Bf16Products& products, int parts, const GemmSizes& sizes, const Factor& a, const Factor& b, float* c,
            int64_t ldc, bool add)
      : products_(products), parts_(parts), sizes_(sizes), a_(a), b_(b), c_(c), ldc_(ldc), add_(add) {
    const int64_t depth = std::min(kDepth, whole_tiles(sizes.k)), columns = std::min(kColumns, whole_tiles(sizes.n));
    const int64_t panel = kRows * kStride, sums = 2 * kRows * columns;
    constexpr int64_t kAlign = 32;  // elements, a cache line
    memory_.reset(new at::BFloat16[panel + sums + parts * depth * columns + kAlign]);
    const auto at = reinterpret_cast<uintptr_t>(memory_.get());
    panel_ = memory_.get() + (64 - at % 64) / sizeof(at::BFloat16);
    sums_ = reinterpret_cast<float*>(panel_ + panel);
    block_ = panel_ + panel + sums;
  }

  void multiply() const {
    for (int64_t k = 0; k < sizes_.k; k += kDepth) {
      const int64_t depth = std::min(kDepth, sizes_.k - k);
      for (int64_t j = 0; j < sizes_.n; j += kColumns) {
        const int64_t columns = std::min(kColumns, sizes_.n - j), wide = whole_tiles(columns),
                      deep = whole_tiles(depth);
        pack_block(k, depth, j, columns);
        for (int64_t i = 0; i < sizes_.m; i += kRows) {
          const int64_t rows = std::min(kRows, sizes_.m - i);
          pack_panel(i, rows, k, depth);
          products_.multiply_parts({parts_, kAmxRows, rows, wide, deep}, {panel_, kStride, kDepth},
                                   {block_, wide, deep * wide}, sums_, wide);
          leave(i, rows, j, columns, wide, k > 0 || add_);
        }
      }
    }
  }

  void leave(int64_t i, int64_t rows, int64_t j, int64_t columns, int64_t stride, bool add) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = c_ + (i + r) * ldc_ + j;
      const float* const from = sums_ + r * stride;
      for (int64_t v = 0; v < columns; v += kLanes) {
        const Vec<float> sum = load(from + v, columns - v);
        store(to + v, add ? load(to + v, columns - v) + sum : sum, columns - v);
      }
    }
  }

  // to [lanes][lanes] = rows i.. and columns j.. of a factor, of which `rows` and `columns` exist; zeros beyond. Of one
  // that lies transposed as well.
  static void square(const Factor& from, int64_t i, int64_t rows, int64_t j, int64_t columns, float* to) {
    const float* at = from.data + i * from.row + j * from.column;
    if (from.column == 1) {
      for (int64_t r = 0; r < kLanes; ++r) {
        (r < rows ? load(at + r * from.row, columns) : Vec<float>(0)).store(to + r * kLanes);
      }
    } else if (rows >= kLanes && columns >= kLanes) {
      transpose_square(at, from.column, to, kLanes);
    } else {
      float part[kLanes * kLanes];
      for (int64_t c = 0; c < kLanes; ++c) {
        (c < columns ? load(at + c * from.column, rows) : Vec<float>(0)).store(part + c * kLanes);
      }
      transpose_square(part, kLanes, to, kLanes);
    }
  }

  void pack_panel(int64_t i, int64_t rows, int64_t k, int64_t depth) const {
    if (a_.column == 1) {
      for (int64_t r = 0; r < rows; ++r) {
        at::BFloat16* const to = panel_ + r * kStride;
        const float* const from = a_.data + (i + r) * a_.row + k;
        for (int64_t p = 0; p < whole_tiles(depth); p += kLanes) {
          const Vec<float> v = p < depth ? load(from + p, depth - p) : Vec<float>(0);
          store_parts(parts_, to + p, kDepth, v, kLanes);
        }
      }
      return;
    }
    alignas(64) float part[kLanes * kLanes];
    for (int64_t r = 0; r < rows; r += kLanes) {
      for (int64_t p = 0; p < whole_tiles(depth); p += kLanes) {
        square(a_, i + r, rows - r, k + p, std::max<int64_t>(0, depth - p), part);
        for (int64_t q = 0; q < std::min<int64_t>(kLanes, rows - r); ++q) {
          store_parts(parts_, panel_ + (r + q) * kStride + p, kDepth, Vec<float>::loadu(part + q * kLanes), kLanes);
        }
      }
    }
  }

  void pack_block(int64_t k, int64_t depth, int64_t j, int64_t columns) const {
    const int64_t wide = whole_tiles(columns), deep = whole_tiles(depth);
    alignas(64) float part[kLanes * kLanes];
    for (int64_t p = 0; p < deep; p += kLanes) {
      for (int64_t v = 0; v < wide; v += kLanes) {
        square(b_, k + p, std::max<int64_t>(0, depth - p), j + v, std::max<int64_t>(0, columns - v), part);
        for (int64_t q = 0; q < kLanes; q += 2) {
          store_pairs(parts_, block_ + ((p + q) / 2 * wide + v) * 2, deep * wide, Vec<float>::loadu(part + q * kLanes),
                      Vec<float>::loadu(part + (q + 1) * kLanes));
        }
      }
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
