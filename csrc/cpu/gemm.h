// Products of matrices, at the rate of the scan's own: what surrounds a scan, where the machine's library is slower.
// Compiled once per ISA.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include "cpu/bf16.h"
#include "cpu/kernels.h"
#include "cpu/parts.h"
#include "cpu/tile.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

// Memory for packed factors, aligned for vectors.
template <class U>
class Packing {
 public:
  Packing() = default;
  explicit Packing(int64_t count) : memory_(c10::GetCPUAllocator()->allocate(count * sizeof(U))) {}
  U* data() const { return static_cast<U*>(memory_.get()); }  // null if it is none

 private:
  at::DataPtr memory_;
};

// to [lanes][to_stride] = the first rows and columns of a factor, of which `rows` and `columns` exist; zeros beyond. Of
// one that lies transposed as well.
template <class T>
void pack_square(const Factor<T>& from, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int kLanes = Vec<T>::size();
  if (from.column == 1) {
    for (int64_t r = 0; r < kLanes; ++r) {
      (r < rows ? load(from.data + r * from.row, columns) : Vec<T>(0)).store(to + r * to_stride);
    }
  } else {
    transpose_square(from.data, from.column, to, to_stride, columns, rows, kLanes, 2 * kLanes);
  }
}

// Products by the tiles of the scans.
template <class T>
class TileProducts {
 public:
  using Number = T;
  static constexpr int kVectors = 4, kTileRows = max_rows(kVectors);
  static constexpr int kLanes = Vec<T>::size();
  static constexpr int64_t kWidth = kVectors * kLanes;
  static constexpr int64_t kRows = 48;  // of a panel of a: whole tiles, and whole vectors where it lies transposed
  // of a block of b: half of an L2 of 1 MiB
  static constexpr int64_t kDepth = 384, kColumns = (512 << 10) / kDepth / sizeof(T) / kWidth * kWidth;
  static constexpr int64_t kShare = kLanes;  // rows or columns, of a thread's part

  TileProducts(int64_t depth, int64_t columns) : block_(rounded_up(depth, kLanes) * rounded_up(columns, kLanes)) {}

  // A transposed one is copied to [k][kRows]: as far apart as they lie, often a power of two, successive k would all go to
  // the same sets of L1.
  void pack_panel(const Factor<T>& a, int64_t rows, int64_t depth) {
    packed_ = a.column != 1;
    if (!packed_) {
      a_ = a.data;
      stride_ = a.row;
      return;
    }
    if (panel_.data() == nullptr) panel_ = Packing<T>(kDepth * kRows);
    a_ = panel_.data();
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t r = 0; r < rows; r += kLanes) {
        load(a.from(r, k).data, rows - r).store(panel_.data() + k * kRows + r);
      }
    }
  }

  // To [columns / width][depth][vectors][lanes], of which the last may have fewer vectors.
  void pack_block(const Factor<T>& b, int64_t depth, int64_t columns) {
    const int64_t deep = rounded_up(depth, kLanes);
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int64_t width = std::min(kWidth, rounded_up(columns - j, kLanes));
      T* const to = block_.data() + deep * j;
      const auto square = [&](int64_t k, int64_t v) {
        pack_square(b.from(k, j + v), depth - k, columns - j - v, to + k * width + v, width);
      };
      if (b.column == 1) {
        for (int64_t k = 0; k < depth; k += kLanes) {
          for (int64_t v = 0; v < width; v += kLanes) square(k, v);
        }
      } else {
        for (int64_t v = 0; v < width; v += kLanes) {
          for (int64_t k = 0; k < depth; k += kLanes) square(k, v);
        }
      }
    }
  }

  // c [rows, ldc] = or += panel * block. next: what is packed as a panel after this one, or what lies behind the matrix. A
  // few lines at every k, far apart, which no processor reads ahead: the first tiles ask for one of them each at all k, the
  // rest for the last, which there is where panels don't begin with a line.
  void multiply(int64_t rows, int64_t columns, int64_t depth, const Factor<T>& next, T* c, int64_t ldc,
                bool add) const {
    constexpr int64_t kLine = 64 / sizeof(T), kLines = kRows / kLine;
    const int64_t deep = rounded_up(depth, kLanes);
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int vectors = static_cast<int>(std::min<int64_t>(kVectors, blocks(columns - j, kLanes)));
      const T* const block = block_.data() + deep * j;
      for_row_tiles<kTileRows>(rows, [&]<int kTile>(RowTile tile) {
        alignas(64) T sums[kTile * kWidth];
        T* const to = c + tile.first * ldc + j;
        for (int r = 0; r < kTile; ++r) {
          for (int v = 0; v < vectors; ++v) __builtin_prefetch(to + r * ldc + v * kLanes, 1, 3);
        }
        if (packed_) {
          const Packed<T> packed{block, next.data + std::min(tile.index, kLines) * kLine, next.column};
          with_number<kVectors>(vectors, [&]<int kUsed>() {
            accumulate<kTile, kUsed>(sums, false, packed, Columns<kRows, T>{a_ + tile.first}, depth);
          });
        } else {
          accumulate<kTile, kVectors>(vectors, sums, Packed<T>{block, block, 0}, {0, depth, false},
                                      [&](int r) { return a_ + (tile.first + r) * stride_; });
        }
        const int64_t count = std::min(kWidth, columns - j);
        for (int r = 0; r < kTile; ++r) store_sums(to + r * ldc, sums + r * vectors * kLanes, count, add);
      });
    }
  }

 private:
  Packing<T> panel_, block_;  // [depth][kRows], if it is needed; see pack_block
  bool packed_ = false;
  const T* a_ = nullptr;  // the panel if packed, or the factor itself: [rows, stride_]
  int64_t stride_ = 0;
};

// The same of float32 in two or three parts of bfloat16 (amx.h).
class PartProducts {
 public:
  using Number = float;
  static constexpr int64_t kRows = 2 * kAmxRows;  // of a panel of a
  // of a block of b: in three parts three quarters of an L2 of 2 MiB
  static constexpr int64_t kDepth = 512, kColumns = 512;
  static constexpr int64_t kShare = kRows;  // rows or columns, of a thread's part

  PartProducts(const Bf16Products& products, int parts, int64_t depth, int64_t columns)
      : products_(products),
        parts_(parts),
        panel_(kRows * kStride),
        block_(parts * whole_tiles(depth) * whole_tiles(columns)),
        sums_(kRows * whole_tiles(columns)) {}
  ~PartProducts() { products_.release(); }

  void pack_panel(const Factor<float>& a, int64_t rows, int64_t depth) {
    if (a.column == 1) {
      for (int64_t r = 0; r < rows; ++r) {
        at::BFloat16* const to = panel_.data() + r * kStride;
        const float* const from = a.data + r * a.row;
        for (int64_t k = 0; k < whole_tiles(depth); k += kLanes) {
          const Vec<float> v = k < depth ? load(from + k, depth - k) : Vec<float>(0);
          store_parts(parts_, to + k, kDepth, v, kLanes);
        }
      }
      return;
    }
    alignas(64) float part[kLanes * kLanes];
    for (int64_t r = 0; r < rows; r += kLanes) {
      for (int64_t k = 0; k < whole_tiles(depth); k += kLanes) {
        pack_square(a.from(r, k), rows - r, std::max<int64_t>(0, depth - k), part, kLanes);
        for (int64_t q = 0; q < std::min<int64_t>(kLanes, rows - r); ++q) {
          store_parts(parts_, panel_.data() + (r + q) * kStride + k, kDepth, Vec<float>::loadu(part + q * kLanes),
                      kLanes);
        }
      }
    }
  }

  void pack_block(const Factor<float>& b, int64_t depth, int64_t columns) {
    const int64_t wide = whole_tiles(columns), deep = whole_tiles(depth);
    alignas(64) float part[kLanes * kLanes];
    for (int64_t k = 0; k < deep; k += kLanes) {
      for (int64_t v = 0; v < wide; v += kLanes) {
        pack_square(b.from(k, v), std::max<int64_t>(0, depth - k), std::max<int64_t>(0, columns - v), part, kLanes);
        for (int64_t q = 0; q < kLanes; q += 2) {
          store_pairs(parts_, block_.data() + ((k + q) / 2 * wide + v) * 2, deep * wide,
                      Vec<float>::loadu(part + q * kLanes), Vec<float>::loadu(part + (q + 1) * kLanes));
        }
      }
    }
  }

  // c [rows, ldc] = or += panel * block
  void multiply(int64_t rows, int64_t columns, int64_t depth, const Factor<float>&, float* c, int64_t ldc,
                bool add) const {
    const int64_t wide = whole_tiles(columns), deep = whole_tiles(depth);
    products_.multiply_parts({parts_, kAmxRows, rows, wide, deep}, {panel_.data(), kStride, kDepth},
                             {block_.data(), wide, deep * wide}, sums_.data(), wide);
    for (int64_t r = 0; r < rows; ++r) store_sums(c + r * ldc, sums_.data() + r * wide, columns, add);
  }

 private:
  static constexpr int kLanes = Vec<float>::size();
  static constexpr int64_t kStride = kMostParts * kDepth + 32;  // of a row of a panel, no multiple of 256 bytes

  const Bf16Products& products_;
  const int parts_;
  Packing<at::BFloat16> panel_, block_;  // [kRows][kStride]; [parts][depth / 2][columns][2]
  Packing<float> sums_;  // [kRows][columns]
};

// The threads, at most so many, that these multiply-adds are worth calling.
inline int worth_threads(int64_t multiply_adds, int threads) {
  constexpr int64_t kLeast = 1 << 18;  // of a thread
  return static_cast<int>(std::clamp<int64_t>(multiply_adds / kLeast, 1, threads));
}

// f(begin, end, share) for shares of [0, count), one for each thread if there are as many units, on as many threads; how
// many there are.
template <class F>
int64_t for_shares(int64_t count, int64_t unit, int threads, const F& f) {
  const int64_t each = std::max<int64_t>(1, blocks(blocks(count, unit), threads)) * unit, shares = blocks(count, each);
  const auto some = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * each, std::min((i + 1) * each, count), i);
  };
  if (shares <= 1) {
    some(0, shares);
  } else {
    at::parallel_for(0, shares, 1, some);
  }
  return shares;
}

// c [m, ldc] = or += a b. A thread's own Products is made by make(depth, columns), for blocks of b of that size at most.
template <class Products, class Make>
class Gemm {
  using T = typename Products::Number;

 public:
  static void run(const Make& make, const GemmSizes& sizes, const Factor<T>& a, const Factor<T>& b, T* c, int64_t ldc,
                  bool add, int threads) {
    const int most = worth_threads(sizes.m * sizes.n * sizes.k, threads);
    // The longer side is shared: what each thread packs of the other is then least.
    const bool rows = sizes.m >= sizes.n;
    const int64_t side = rows ? sizes.m : sizes.n;
    if (most > 1 && sizes.k >= kTermsOfSum * most * side) {
      share_depth(make, sizes, a, b, c, ldc, add, most);
      return;
    }
    for_shares(side, Products::kShare, most, [&](int64_t begin, int64_t end, int64_t) {
      if (rows) {
        multiply(make, {end - begin, sizes.n, sizes.k}, a.from(begin, 0), b, c + begin * ldc, ldc, add);
      } else {
        multiply(make, {sizes.m, end - begin, sizes.k}, a, b.from(0, begin), c + begin, ldc, add);
      }
    });
  }

 private:
  // A thread's share of a side packs all of the shorter side as well, as every other thread does: k elements for each of
  // its rows. A share of k packs nothing twice, but has sums of its own, which the caller adds, thread by thread: an element
  // takes twice as long as one that is packed.
  static constexpr int64_t kTermsOfSum = 2;

  static void share_depth(const Make& make, const GemmSizes& sizes, const Factor<T>& a, const Factor<T>& b, T* c,
                          int64_t ldc, bool add, int threads) {
    const int64_t width = rounded_up(sizes.n, Vec<T>::size());
    const Packing<T> sums((threads - 1) * sizes.m * width);  // [threads - 1][m][width]
    const auto of_share = [&](int64_t i) { return sums.data() + (i - 1) * sizes.m * width; };
    const int64_t shares = for_shares(sizes.k, Vec<T>::size(), threads, [&](int64_t begin, int64_t end, int64_t share) {
      const bool first = share == 0;
      multiply(make, {sizes.m, sizes.n, end - begin}, a.from(0, begin), b.from(begin, 0), first ? c : of_share(share),
               first ? ldc : width, first && add);
    });
    for (int64_t i = 1; i < shares; ++i) {
      for (int64_t r = 0; r < sizes.m; ++r) store_sums(c + r * ldc, of_share(i) + r * width, sizes.n, true);
    }
  }

  static void multiply(const Make& make, const GemmSizes& sizes, const Factor<T>& a, const Factor<T>& b, T* c,
                       int64_t ldc, bool add) {
    constexpr int64_t kDepth = Products::kDepth, kColumns = Products::kColumns, kRows = Products::kRows;
    Products products = make(std::min(kDepth, sizes.k), std::min(kColumns, sizes.n));
    for (int64_t k = 0; k == 0 || k < sizes.k; k += kDepth) {  // sums of nothing are zero
      const int64_t depth = std::min(kDepth, sizes.k - k);
      for (int64_t j = 0; j < sizes.n; j += kColumns) {
        const int64_t columns = std::min(kColumns, sizes.n - j);
        products.pack_block(b.from(k, j), depth, columns);
        for (int64_t i = 0; i < sizes.m; i += kRows) {
          const int64_t rows = std::min(kRows, sizes.m - i);
          products.pack_panel(a.from(i, k), rows, depth);
          const bool last = i + rows == sizes.m, last_block = j + columns == sizes.n;
          const auto next = !last ? a.from(i + rows, k) : a.from(0, last_block ? k + depth : k);
          products.multiply(rows, columns, depth, next, c + i * ldc + j, ldc, add || k > 0);
        }
      }
    }
  }
};

// A few rows times a matrix that lies transposed use what is packed of it too rarely to make up for that.
template <class T>
bool few_rows(const GemmSizes& sizes, const Factor<T>& a, const Factor<T>& b) {
  constexpr int64_t kMost = 16, kDepthOfRow = 12;  // k that make up for the end of a sum
  return sizes.m <= kMost && kDepthOfRow * sizes.m <= sizes.k && a.column == 1 && b.row == 1 && b.column == sizes.k;
}

// Their product, by dot products.
template <class T>
void multiply_few_rows(const GemmSizes& sizes, const Factor<T>& a, const Factor<T>& b, T* c, int64_t ldc, bool add,
                       int threads) {
  constexpr int kLanes = Vec<T>::size();
  const auto part = [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t j = begin; j < end; j += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, end - j);
      for_row_tiles<kDotInputs>(sizes.m, [&]<int kRows>(RowTile tile) {
        T sums[kRows][kLanes] = {};
        const T* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = a.data + (tile.first + r) * a.row;
        dots(sums, b.data + j * b.column, x, sizes.k, count);
        for (int r = 0; r < kRows; ++r) store_sums(c + (tile.first + r) * ldc + j, sums[r], count, add);
      });
    }
  };
  for_shares(sizes.n, kLanes, worth_threads(sizes.m * sizes.n * sizes.k, threads), part);
}

// A row times a matrix whose own rows lie one after another: they are read once, in the order of memory but for a few
// beside one another, which share the sums.
template <class T>
void multiply_row(const GemmSizes& sizes, const Factor<T>& a, const Factor<T>& b, T* c, bool add, int threads) {
  constexpr int kTogether = 4, kLanes = Vec<T>::size();
  constexpr int64_t kColumns = 4096 / sizeof(T);
  const auto part = [&](int64_t begin, int64_t end, int64_t) {
    alignas(64) T sums[kColumns];
    for (int64_t j = begin; j < end; j += kColumns) {
      const int64_t columns = std::min(kColumns, end - j);
      const auto add_rows = [&]<int kRows>(int64_t k, bool begun) {
        for (int64_t v = 0; v < columns; v += kLanes) {
          Vec<T> sum(0);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const T* const row = b.from(k + r, j + v).data;
            __builtin_prefetch(row + kTogether * b.row, 0, 3);
            sum = at::vec::fmadd(Vec<T>(*a.from(0, k + r).data), load(row, columns - v), sum);
          }
          (begun ? Vec<T>::loadu(sums + v) + sum : sum).store(sums + v);
        }
      };
      for (int64_t k = 0; k < sizes.k; k += kTermsInTurn) {
        const int64_t last = std::min(k + kTermsInTurn, sizes.k);
        int64_t row = k;
        for (; row + kTogether <= last; row += kTogether) add_rows.template operator()<kTogether>(row, row > k);
        for (; row < last; ++row) add_rows.template operator()<1>(row, row > k);
        store_sums(c + j, sums, columns, add || k > 0);
      }
    }
  };
  for_shares(sizes.n, kLanes, worth_threads(sizes.n * sizes.k, threads), part);
}

// A column times a row.
template <class T>
void multiply_column(const GemmSizes& sizes, const Factor<T>& a, const Factor<T>& b, T* c, int64_t ldc, bool add,
                     int threads) {
  using V = Vec<T>;
  for_shares(sizes.m, 1, worth_threads(sizes.m * sizes.n, threads), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      const V x(*a.from(i, 0).data);
      T* const to = c + i * ldc;
      if (add) {
        at::vec::map2([x](V y, V sum) { return sum + x * y; }, to, b.data, to, sizes.n);
      } else {
        at::vec::map([x](V y) { return x * y; }, to, b.data, sizes.n);
      }
    }
  });
}

template <class T>
void multiply_matrices(const GemmSizes& sizes, const Factor<T>& a, const Factor<T>& b, T* c, int64_t ldc, bool add,
                       int threads) {
  if (few_rows(sizes, a, b)) {
    multiply_few_rows(sizes, a, b, c, ldc, add, threads);
    return;
  }
  if (b.column == 1 && sizes.k == 1) {
    multiply_column(sizes, a, b, c, ldc, add, threads);
    return;
  }
  if (b.column == 1 && sizes.m == 1 && sizes.k > 0) {
    multiply_row(sizes, a, b, c, add, threads);
    return;
  }
  const auto make = [](int64_t depth, int64_t columns) { return TileProducts<T>(depth, columns); };
  Gemm<TileProducts<T>, decltype(make)>::run(make, sizes, a, b, c, ldc, add, threads);
}

inline void multiply_in_parts(const Bf16Products& products, int parts, const GemmSizes& sizes, const Factor<float>& a,
                              const Factor<float>& b, float* c, int64_t ldc, bool add, int threads) {
  const auto make = [&](int64_t depth, int64_t columns) { return PartProducts(products, parts, depth, columns); };
  Gemm<PartProducts, decltype(make)>::run(make, sizes, a, b, c, ldc, add, threads);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
