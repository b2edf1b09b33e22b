// The register tile: a few rows of the batch times a few vectors of columns, summed over k in registers; and the packed
// layouts of the weights that it reads from end to end. Compiled once per ISA.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/vec.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

// Rows of a tile of `vectors` columns: accumulators fill the registers, but for the weights and one broadcast.
constexpr int max_rows(int vectors) { return std::max(1, kAccumulators / vectors); }

// A few rows leave the adders idle for the latency of an FMA; more partial sums over k keep them busy.
constexpr int partial_sums(int rows, int vectors) {
  const int room = kAccumulators / (rows * vectors);
  return room >= 4 ? 4 : room >= 2 ? 2 : 1;
}

// a / b, neither negative. Many processors take 40 to 95 cycles to divide 64 bits, as long as a tile of few k takes, and
// 26 for 32.
constexpr int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// Tiles of more k than this are best followed by their cells each (1.02 times as fast), those of fewer by the cells of
// several, in fewer and longer turns (1.05 to 1.1, and where L1 does not hold the sums of all rows as well).
inline constexpr int64_t kManyK = 256;

// Terms of a sum that are added one after another; a longer sum is made of such ones, as every addition is rounded by the
// size of the sum so far.
inline constexpr int64_t kTermsInTurn = 192;

// One of the tiles that rows are split into.
struct RowTile {
  int64_t first;  // row
  int64_t index, count;  // among the tiles
};

// Part of the k of a block. A block that would fill L2 is used chunk by chunk, so that all tiles of the rows find a
// chunk there; the sums wait in memory.
struct Chunk {
  int64_t begin = 0, end = 0;  // k
  bool first = true, last = true;

  int64_t depth() const { return end - begin; }
};

// Calls f(chunk) for a block whose k take kBytes each. At least once: the sums of no k are zero.
template <size_t kBytes, class F>
FASTRNN_INLINE void for_chunks(int64_t depth, const F& f) {
  constexpr int64_t kMost = (256 << 10) / kBytes;  // half of a small L2 holds a chunk and the next
  const int64_t chunks = std::max<int64_t>(1, (depth + kMost - 1) / kMost);
  int64_t begin = 0;
  for (int64_t c = 1; c <= chunks; ++c) {
    const int64_t end = c == chunks ? depth : quotient(depth * c, chunks);
    f(Chunk{begin, end, c == 1, c == chunks});
    begin = end;
  }
}

// A chunk of a block of packed weights, and what a tile of it fetches from L3 meanwhile.
template <class T>
struct Packed {
  const T* block;
  const T* ahead;
  int64_t ahead_step;  // elements a k

  FASTRNN_INLINE Packed from(int64_t k, int vectors) const {
    return {block + k * vectors * Vec<T>::size(), ahead + k * ahead_step, ahead_step};
  }
};

// What a tile reads, `depth` k of it, and its part of what follows. The tiles fetch that in equal parts, each from end to
// end. Evenly is what counts: a core has a dozen misses in flight, and lines asked for faster than L3 gives them keep the
// tile's own from coming out of L2.
template <int kVectors, class T>
FASTRNN_INLINE Packed<T> packed_for(const T* block, const T* following, RowTile tile, int64_t depth) {
  constexpr int64_t kWidth = kVectors * Vec<T>::size();
  const int64_t step = tile.count == 1 ? kWidth : quotient(kWidth + tile.count - 1, tile.count);
  return {block, following + tile.index * step * depth, step};
}

// A chunk of a block, and what is multiplied after it.
template <class T>
struct PackedChunk {
  const T* begin;
  const T* following;
  int64_t depth;

  // Of a tile. This block may be the last, and narrow; those that follow have kVectors a k.
  template <int kVectors>
  FASTRNN_INLINE Packed<T> of(RowTile tile) const {
    return packed_for<kVectors>(begin, following, tile, depth);
  }
};

// Of block `block`, which has `vectors` a k and is `depth` deep as all are.
template <int kVectors, class T>
FASTRNN_INLINE PackedChunk<T> packed_chunk(const T* packed, int64_t depth, int64_t block, int vectors, int64_t next,
                                           const Chunk& chunk) {
  constexpr int64_t kWidth = kVectors * Vec<T>::size();
  const int64_t width = vectors * Vec<T>::size();
  const T* begin = packed + block * depth * kWidth;
  return {begin + chunk.begin * width, chunk.last ? packed + next * depth * kWidth : begin + chunk.end * width,
          chunk.depth()};
}

// The k of a chunk that rows have one behind the other: their elements from `from` on. Sums begin anew or are added to;
// of no k they are zeros or stay as they are.
struct Segment {
  int64_t from, depth;
  bool add;
};

// Asks for what the end of a tile will load, from memory to L2: kParts pieces of kVectors vectors, `stride` apart. Asked
// for after the sums, each line would be waited for.
template <int kParts, int kVectors, class T>
FASTRNN_INLINE void prefetch(const T* p, int64_t stride) {
#pragma GCC unroll 32
  for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(p + part * stride + v * Vec<T>::size(), 0, 2);
  }
}

template <int kRows, int kVectors, class V>
FASTRNN_INLINE void set_zero(V (&sum)[kRows][kVectors]) {
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V(0);
  }
}

// Rows of a tile that lie beside one another: element k of row r is first[k * kStep + r].
template <int64_t kStep, class T>
struct Columns {
  const T* first;
};
template <int64_t kStep, class T>
FASTRNN_INLINE T element(const Columns<kStep, T>& a, int r, int64_t k) {
  return a.first[k * kStep + r];
}
// Rows wherever they are.
template <class T, size_t kRows>
FASTRNN_INLINE T element(const T* const (&a)[kRows], int r, int64_t k) {
  return a[r][k];
}

// sums [kRows][kVectors][lanes] = over k in [begin, end): a[r][k] * w[k][v], or += . The weights come from L2 a little
// ahead of their use.
template <int kPartials, int kRows, int kVectors, class T, class A>
FASTRNN_INLINE void multiply(T* sums, bool add, const Packed<T>& packed, const A& a, int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int kLanes = V::size();
  constexpr int64_t kAhead = 8;  // of k
  const T* w = packed.block + begin * kVectors * kLanes;
  V partial[kPartials][kRows][kVectors];
#pragma GCC unroll 32
  for (int p = 0; p < kPartials; ++p) set_zero(partial[p]);
  int64_t k = begin;
  for (; k + kPartials <= end; k += kPartials) {
#pragma GCC unroll 32
    for (int p = 0; p < kPartials; ++p) {
      if constexpr (kPartials == 1) {
        __builtin_prefetch(packed.ahead + k * packed.ahead_step, 0, 2);
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(w + (kAhead * kVectors + v) * kLanes, 0, 3);
      }
      V weight[kVectors];
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v) weight[v] = in_register<kRows>(V::loadu(w + (p * kVectors + v) * kLanes));
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const V x(element(a, r, k + p));
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) partial[p][r][v] = at::vec::fmadd(x, weight[v], partial[p][r][v]);
      }
    }
    w += kPartials * kVectors * kLanes;
  }
  for (; k < end; ++k) {
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const V x(element(a, r, k));
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v) {
        partial[0][r][v] = at::vec::fmadd(x, V::loadu(w + v * kLanes), partial[0][r][v]);
      }
    }
    w += kVectors * kLanes;
  }
  const auto leave = [&](const auto& value) {
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 32
        for (int p = 1; p < kPartials; ++p) partial[0][r][v] = partial[0][r][v] + partial[p][r][v];
        T* const to = sums + (r * kVectors + v) * kLanes;
        value(to, partial[0][r][v]).store(to);
      }
    }
  };
  if (add) {
    leave([](const T* to, V x) { return V::loadu(to) + x; });
  } else {
    leave([](const T*, V x) { return x; });
  }
}

// sums [kRows][kVectors][lanes] = over k: a[r][k] * w[k][v], or += with `add`; w packed [k][kVectors][lanes].
// Products are small beside a bias, an input projection or an incoming gradient, and thousands of them added to it one
// by one would each be rounded as it is. So callers add what they have last, and a long sum is one of chunks, each from
// zero. The sums go through memory, to a function that is nothing but the loop: within a caller g++ keeps some of
// them on the stack throughout.
template <int kRows, int kVectors, int kPartials = partial_sums(kRows, kVectors), class T, class A>
[[gnu::noinline]] void accumulate(T* sums, bool add, const Packed<T>& packed, const A& a, int64_t depth) {
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + kTermsInTurn, depth);
    multiply<kPartials, kRows, kVectors>(sums, add, packed, a, begin, end);
    begin = end;
    add = true;
  } while (begin < depth);
}

// sum[i][n] = the dot product of row i of w with x[n]. W is T, or 16 bits wide. What lies `ahead` elements behind these
// rows is asked for in the order of memory.
template <int kRows, int kInputs, class T, class W>
FASTRNN_INLINE void dot(T (&sum)[kRows][kInputs], const W* w, const T* const (&x)[kInputs], int64_t depth,
                        int64_t ahead) {
  using V = Vec<T>;
  constexpr int kPartials = kRows * kInputs == 1 ? 4 : 1;
  V s[kPartials][kRows][kInputs];
#pragma GCC unroll 32
  for (int p = 0; p < kPartials; ++p) set_zero(s[p]);
  const auto add = [&](int p, int64_t k, int64_t count) __attribute__((always_inline)) {
    V in[kInputs];
#pragma GCC unroll 32
    for (int n = 0; n < kInputs; ++n) in[n] = load(x[n] + k, count);
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const V weight = in_register<kInputs>(load(w + i * depth + k, count));
      __builtin_prefetch(w + ahead + kRows * k + i * V::size(), 0, 3);
#pragma GCC unroll 32
      for (int n = 0; n < kInputs; ++n) s[p][i][n] = at::vec::fmadd(in[n], weight, s[p][i][n]);
    }
  };
  int64_t k = 0;
  for (; k + kPartials * V::size() <= depth; k += kPartials * V::size()) {
#pragma GCC unroll 32
    for (int p = 0; p < kPartials; ++p) add(p, k + p * V::size(), V::size());
  }
  for (; k + V::size() <= depth; k += V::size()) add(0, k, V::size());
  if (k < depth) add(0, k, depth - k);
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 32
    for (int n = 0; n < kInputs; ++n) {
      if constexpr (kPartials == 4) s[0][i][n] = (s[0][i][n] + s[1][i][n]) + (s[2][i][n] + s[3][i][n]);
      sum[i][n] = at::vec::vec_reduce_all<T>([](V a, V b) { return a + b; }, s[0][i][n]);
    }
  }
}

// Inputs that share a load of the weights.
inline constexpr int kDotInputs = kVectorRegisters == 32 ? 4 : 2;

// sum[n][i] = the dot product of row i of w with x[n], for `count` rows, at most a vector of them. Shared by the cells.
// Weights come fastest as one stream, row by row; several inputs are loaded once for four rows.
template <int kInputs, class T, class W>
[[gnu::noinline]] void dots(T (*sum)[Vec<T>::size()], const W* w, const T* const (&x)[kInputs], int64_t depth,
                            int64_t count) {
  constexpr int kTogether = kInputs == 1 ? 1 : 4;
  constexpr int64_t kPage = 4096 / sizeof(W);  // the processor itself reads no further ahead than to the end of one
  const auto rows = [&]<int kRows>(int64_t first) __attribute__((always_inline)) {
    T part[kRows][kInputs];
    dot(part, w + first * depth, x, depth, kRows == 1 ? kPage : kRows * depth);
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < kInputs; ++n) sum[n][first + i] = part[i][n];
    }
  };
  int64_t i = 0;
  for (; i + kTogether <= count; i += kTogether) rows.template operator()<kTogether>(i);
  if constexpr (kTogether > 1) {
    for (; i < count; ++i) rows.template operator()<1>(i);
  }
}

// to [count] = or += from, of which whole vectors may be read.
template <class T>
FASTRNN_INLINE void store_sums(T* to, const T* from, int64_t count, bool add) {
  constexpr int kLanes = Vec<T>::size();
  for (int64_t v = 0; v < count; v += kLanes) {
    const Vec<T> sum = Vec<T>::loadu(from + v);
    store(to + v, add ? load(to + v, count - v) + sum : sum, count - v);
  }
}

// Calls f.template operator()<n>() for the run-time n in 1..kMax.
template <int kMax, class F>
FASTRNN_INLINE void with_number(int n, const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (void)((n == i + 1 ? (f.template operator()<i + 1>(), true) : false) || ...);
  }(std::make_integer_sequence<int, kMax>{});
}

// Calls f(vectors) with a constant where a block is whole, as nearly all are.
template <int kMost, class F>
FASTRNN_INLINE void with_vectors(int vectors, const F& f) {
  if (vectors == kMost) {
    f(std::integral_constant<int, kMost>());
  } else {
    f(vectors);
  }
}

// accumulate() for a number of vectors at most kMost, and a segment of rows: row(i) of the i-th of them.
template <int kRows, int kMost, class T, class RowOf>
FASTRNN_INLINE void accumulate(int vectors, T* sums, const Packed<T>& packed, const Segment& segment,
                               const RowOf& row) {
  if (segment.depth == 0 && segment.add) return;
  const T* a[kRows];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) a[i] = row(i) + segment.from;
  with_number<kMost>(vectors,
                     [&]<int kVectors>() { accumulate<kRows, kVectors>(sums, segment.add, packed, a, segment.depth); });
}

// Splits rows [0, count) into tiles of nearly equal height: f.template operator()<height>(tile).
template <int kMax, class F>
FASTRNN_INLINE void for_row_tiles(int64_t count, const F& f) {
  const int64_t tiles = (count + kMax - 1) / kMax;
  const int64_t least = tiles <= 1 ? count : quotient(count, tiles), higher = count - least * tiles;
  int64_t row = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t height = least + (t < higher ? 1 : 0);
    with_number<kMax>(static_cast<int>(height),
                      [&]<int kRows>() { f.template operator()<kRows>(RowTile{row, t, tiles}); });
    row += height;
  }
}

constexpr int64_t blocks(int64_t columns, int64_t width) { return (columns + width - 1) / width; }
constexpr int64_t rounded_up(int64_t n, int64_t to) { return blocks(n, to) * to; }

// to [stored][to_stride] = the transpose of from [rows][from_stride], of which `count` columns are read; zeros beyond,
// up to as many as lanes. Rows i and i + lanes / 2 become rows 2 i and 2 i + 1, their elements in turn; after log2(lanes)
// such shuffles every element has changed places. What lies `ahead` elements behind each row is asked for: so many short
// streams are more than the processor reads ahead.
template <class T>
FASTRNN_INLINE void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
                                     int64_t count, int64_t stored, int64_t ahead) {
  constexpr int kLanes = Vec<T>::size();
  const auto shuffle = [&](int64_t row_count, int64_t columns, int64_t to_rows) __attribute__((always_inline)) {
    Vec<T> a[kLanes], b[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      a[i] = i < row_count ? load(from + i * from_stride, columns) : Vec<T>(0);
      __builtin_prefetch(from + i * from_stride + ahead, 0, 3);
    }
#pragma GCC unroll 4
    for (int done = 1; done < kLanes; done *= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < kLanes / 2; ++i) {
        const auto [low, high] = at::vec::interleave2(a[i], a[i + kLanes / 2]);
        b[2 * i] = low, b[2 * i + 1] = high;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) a[i] = b[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i < to_rows) a[i].store(to + i * to_stride);
    }
  };
  if (rows >= kLanes && count >= kLanes) {  // known to be whole, it takes no mask and no branch
    shuffle(kLanes, kLanes, kLanes);
  } else {
    shuffle(rows, count, stored);
  }
}

// Reads part of a row of weights as T.
template <class T>
struct AsStored {
  static constexpr int kTogether = 1;
  template <class W>
  static FASTRNN_INLINE void copy(const W* from, int64_t count, T* to) {
    constexpr int kLanes = Vec<T>::size();
    for (int64_t k = 0; k < count; k += kLanes) load(from + k, count - k).store(to + k);
  }
};

// The weights of one block of units, transposed: out [k][gates][kUnitVectors][lanes] from w [gates * units, depth]. Units
// beyond the last become zero columns. `Element` says what an element of T stands for: kTogether k of a row.
template <int kGates, int kUnitVectors, class Element, class T, class W>
void pack_transposed(const W* w, int64_t units, int64_t columns, int64_t block, T* out, const Element& element = {}) {
  constexpr int kLanes = Vec<T>::size();
  constexpr int kWidth = kGates * kUnitVectors * kLanes;
  constexpr int kTogether = Element::kTogether;
  constexpr bool kAsItIs = std::is_same_v<W, T> && kTogether == 1;
  constexpr int64_t kStrip = 256;  // of k: rows are read long enough in one go for the processor to read ahead
  const int64_t depth = (columns + kTogether - 1) / kTogether;
  for (int64_t k0 = 0; k0 < depth; k0 += kStrip) {
    const int64_t k1 = k0 + kStrip < depth ? k0 + kStrip : depth;
    for (int v = 0; v < kGates * kUnitVectors; ++v) {
      const int64_t unit = (block * kUnitVectors + v % kUnitVectors) * kLanes;
      const int64_t rows = units - unit < kLanes ? units - unit : kLanes;
      const W* stored = w + (v / kUnitVectors * units + unit) * columns + k0 * kTogether;
      const T* from;  // [rows, stride], from k0 on
      int64_t stride;
      T elements[kAsItIs ? 1 : kLanes * kStrip];
      if constexpr (kAsItIs) {
        from = stored;
        stride = columns;
      } else {
        from = elements;
        stride = kStrip;
        const int64_t count = std::min(k1 * kTogether, columns) - k0 * kTogether;
        for (int64_t lane = 0; lane < rows; ++lane) {
          element.copy(stored + lane * columns, count, elements + lane * kStrip);
        }
      }
      for (int64_t k = k0; k < k1; k += kLanes) {
        transpose_square(from + k - k0, stride, out + k * kWidth + v * kLanes, kWidth, rows, k1 - k, k1 - k,
                         2 * kLanes);
      }
    }
  }
}

// The same of the units from `begin` on, their gates one behind the other: out [k][vectors][lanes], zeros behind them.
template <int kGates, class T, class W>
void pack_narrow(const W* w, int64_t units, int64_t depth, int64_t begin, int vectors, T* out) {
  const int64_t width = vectors * Vec<T>::size(), count = units - begin;
  std::fill_n(out, depth * width, T(0));
  for (int64_t g = 0; g < kGates; ++g) {
    for (int64_t j = 0; j < count; ++j, ++out) {
      const W* row = w + (g * units + begin + j) * depth;
      for (int64_t k = 0; k < depth; ++k) out[k * width] = static_cast<T>(row[k]);
    }
  }
}

// Columns from `begin` on as they lie: out [depth][kVectors][lanes] from w [depth, columns], in T or 16 bits, zeros beyond
// the last column.
template <int kVectors, class T, class W>
void pack_columns(const W* w, int64_t columns, int64_t depth, int64_t begin, T* out) {
  constexpr int kLanes = Vec<T>::size();
  constexpr int64_t kWidth = kVectors * kLanes;
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v) {
      const int64_t j = begin + v * kLanes;
      const Vec<T> row = j < columns ? load(w + k * columns + j, columns - j) : Vec<T>(0);
      row.store(out + k * kWidth + v * kLanes);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
