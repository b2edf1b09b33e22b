// Matrix products of float32 by a matrix unit of bfloat16 (Intel AMX), which does some sixteen times as many
// multiply-adds as the vector units do in float32. A number is the sum of two or three of bfloat16, with 8 bits each
// (parts.h): in three, all of a float32 that is not near the least ones (the unit takes denormal parts for zero). Of the
// products of parts those below the last bits that are kept are left out: three of four stay, with an error of some 2^-17
// of a product, or six of nine, with one of 2^-25. Sums are float32; the unit adds up 32 k before it adds them to one, so
// that those of three parts err by less than a chain of multiply-adds. The method is Henry, Tang and Heinecke's
// ("Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019), and known as
// bf16x2 and bf16x3.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace fastrnn {

inline constexpr int kMostParts = 3;
inline constexpr int64_t kAmxRows = 16;  // of a tile, at most; of a weight's, pairs of k
inline constexpr int64_t kAmxDepth = 32;  // k of a tile

// A matrix in parts, the largest first.
struct PartMatrix {
  const c10::BFloat16* data;
  int64_t stride;  // from a row to the next; of pairs of k, in pairs
  int64_t part;  // from a part to the next
};

// k, or columns, with what fills the last tile.
constexpr int64_t whole_tiles(int64_t k) { return (k + kAmxDepth - 1) / kAmxDepth * kAmxDepth; }

// Of the tiles of equal height, as few as can be, that hold so many rows.
constexpr int64_t tile_height(int64_t rows) {
  const int64_t tiles = (rows + kAmxRows - 1) / kAmxRows;
  return tiles == 0 ? 0 : (rows + tiles - 1) / tiles;
}

struct PartSizes {
  int parts;  // 2 or 3
  int64_t height;  // of a tile: the unit is set up anew when it changes
  int64_t m, n, k;  // n and k in whole tiles
};

// Whether the processor has the unit and the system lets this process use it. Asks for it at the first call.
bool has_amx();

// c [m, n] = a b, with a [m, k] and b [k / 2, n, 2]. The last tile of rows is read from a and written to c whole.
void multiply_parts_amx(const PartSizes& sizes, const PartMatrix& a, const PartMatrix& b, float* c, int64_t ldc);

// After a thread's last product for a while.
void release_amx();

}  // namespace fastrnn
