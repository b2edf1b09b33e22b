#include "cpu/amx.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fastrnn {
namespace {

// What ldtilecfg loads.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

thread_local int64_t configured_rows = 0;  // of the tiles of a and c; 0: the unit is not in use

// Tiles 0 to 3 are sums, two by two; 4 and 5 rows of a, 6 and 7 columns of b.
void configure(int64_t rows) {
  if (configured_rows == rows) return;
  TileConfiguration configuration;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.column_bytes[tile] = 64;
    configuration.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kAmxRows);
  }
  // g++ takes the intrinsic for one that reads 8 bytes
  asm volatile("ldtilecfg %0" : : "m"(configuration));
  configured_rows = rows;
}

// One tile of sums, or two or four side by side.
template <int kParts, bool kTwoRows, bool kTwoColumns>
void multiply_tiles(const PartSizes& sizes, const c10::BFloat16* a, const PartMatrix& of_a, const c10::BFloat16* b,
                    const PartMatrix& of_b, float* c, int64_t ldc) {
  constexpr int64_t kElement = sizeof(c10::BFloat16);
  const int64_t a_bytes = of_a.stride * kElement, b_bytes = of_b.stride * 2 * kElement;
  const int64_t c_bytes = ldc * static_cast<int64_t>(sizeof(float)), height = sizes.height;
  _tile_zero(0);
  if constexpr (kTwoColumns) _tile_zero(1);
  if constexpr (kTwoRows) _tile_zero(2);
  if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  for (int64_t k = 0; k < sizes.k; k += kAmxDepth, a += kAmxDepth, b += kAmxDepth * of_b.stride) {
    const auto load_a = [&](int part) {
      const c10::BFloat16* p = a + part * of_a.part;
      _tile_loadd(4, p, a_bytes);
      if constexpr (kTwoRows) _tile_loadd(5, p + height * of_a.stride, a_bytes);
    };
    const auto load_b = [&](int part) {
      const c10::BFloat16* p = b + part * of_b.part;
      _tile_loadd(6, p, b_bytes);
      if constexpr (kTwoColumns) _tile_loadd(7, p + kAmxDepth, b_bytes);
    };
    const auto add = [&] {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwoRows) _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    };
    // in an order that loads few of them twice
    load_a(0);
    if constexpr (kParts > 2) {
      load_b(2);
      add();
    }
    load_b(1);
    add();
    load_b(0);
    add();
    if constexpr (kParts > 2) {
      load_a(2);
      add();
    }
    load_a(1);
    add();
    if constexpr (kParts > 2) {
      load_b(1);
      add();
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kTwoColumns) _tile_stored(1, c + kAmxRows, c_bytes);
  if constexpr (kTwoRows) _tile_stored(2, c + height * ldc, c_bytes);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c + height * ldc + kAmxRows, c_bytes);
}

template <int kParts>
void multiply(const PartSizes& sizes, const PartMatrix& a, const PartMatrix& b, float* c, int64_t ldc) {
  const int64_t height = sizes.height;
  if (sizes.m > 0) configure(height);
  for (int64_t i = 0; i < sizes.m; i += 2 * height) {
    const bool two_rows = sizes.m - i > height;
    for (int64_t j = 0; j < sizes.n; j += 2 * kAmxRows) {
      const bool two_columns = sizes.n - j > kAmxRows;
      const auto tiles = two_rows
                             ? two_columns ? multiply_tiles<kParts, true, true> : multiply_tiles<kParts, true, false>
                         : two_columns ? multiply_tiles<kParts, false, true>
                                       : multiply_tiles<kParts, false, false>;
      tiles(sizes, a.data + i * a.stride, a, b.data + j * 2, b, c + i * ldc + j, ldc);
    }
  }
}

bool ask() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
  constexpr int64_t kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_amx() {
  static const bool has = ask();
  return has;
}

void multiply_parts_amx(const PartSizes& sizes, const PartMatrix& a, const PartMatrix& b, float* c, int64_t ldc) {
  if (sizes.parts == 2) {
    multiply<2>(sizes, a, b, c, ldc);
  } else {
    multiply<3>(sizes, a, b, c, ldc);
  }
}

void release_amx() {
  if (configured_rows != 0) _tile_release();
  configured_rows = 0;
}

}  // namespace fastrnn

#else

namespace fastrnn {

bool has_amx() { return false; }
void multiply_parts_amx(const PartSizes&, const PartMatrix&, const PartMatrix&, float*, int64_t) {}
void release_amx() {}

}  // namespace fastrnn

#endif
