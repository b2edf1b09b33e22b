#include "cpu/bf16.h"

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#include "cpu/capability.h"

namespace fastrnn {
namespace {

using c10::BFloat16;

void multiply_by_loops(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const BFloat16* a,
                       const BFloat16* b, float* c) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        sum += static_cast<float>(a[i * lda + p]) * static_cast<float>(b[(p / 2 * ldb + j) * 2 + p % 2]);
      }
      c[i * ldc + j] = sum;
    }
  }
}

// In the order of the matrix unit, 32 k at a time, and with whole tiles of rows.
void multiply_parts_by_loops(const PartSizes& sizes, const PartMatrix& a, const PartMatrix& b, float* c, int64_t ldc) {
  const int64_t rows = (sizes.m + sizes.height - 1) / sizes.height * sizes.height;
  std::vector<float> tile(sizes.n);
  for (int64_t i = 0; i < rows; ++i) {
    float* const sums = c + i * ldc;
    std::fill_n(sums, sizes.n, 0.0f);
    for (int64_t first = 0; first < sizes.k; first += kAmxDepth) {
      for (int of_a = 0; of_a < sizes.parts; ++of_a) {
        for (int of_b = 0; of_a + of_b < sizes.parts; ++of_b) {
          std::fill(tile.begin(), tile.end(), 0.0f);
          for (int64_t p = first; p < first + kAmxDepth; ++p) {
            const float x = a.data[of_a * a.part + i * a.stride + p];
            const BFloat16* const w = b.data + of_b * b.part + p / 2 * b.stride * 2 + p % 2;
            for (int64_t j = 0; j < sizes.n; ++j) tile[j] += x * static_cast<float>(w[2 * j]);
          }
          for (int64_t j = 0; j < sizes.n; ++j) sums[j] += tile[j];
        }
      }
    }
  }
}

const Bf16Products kEmulated{"emulated", multiply_by_loops, multiply_parts_by_loops, [] {}, 2 * kAmxRows, kAmxDepth};

// oneDNN's small GEMM, generated for the machine and the sizes: AMX tiles or AVX512_BF16. May throw.
void multiply_generated(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const BFloat16* a,
                        const BFloat16* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, /*add_C=*/false, a, b, c);
}

// The members of a team wait for each other, so none may throw: if another thread switches oneDNN off meanwhile, or it
// refuses these sizes, the product is slow.
void multiply_native(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const BFloat16* a,
                     const BFloat16* b, float* c) {
  try {
    multiply_generated(m, n, k, lda, ldb, ldc, a, b, c);
  } catch (const std::exception&) {
    multiply_by_loops(m, n, k, lda, ldb, ldc, a, b, c);
  }
}

void release() {
  release_amx();
  at::native::cpublas::brgemm_release();
}

// Whether it runs here and means what it should: parts of matrices of small whole numbers, whose products are exact.
bool works(int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t kLdb = 64, kLdc = 70;
  const int64_t lda = depth + 6, first = kLdb - columns;
  std::vector<BFloat16> a(rows * lda), b(depth * kLdb);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i % 7) - 3;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i % 5) - 2;
  std::vector<float> c(rows * kLdc), expected;
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<float>(i);
  expected = c;
  try {
    multiply_generated(rows, columns, depth, lda, kLdb, kLdc, a.data(), b.data() + 2 * first, c.data());
  } catch (const std::exception&) {
    return false;  // this build of torch can't
  }
  release();
  multiply_by_loops(rows, columns, depth, lda, kLdb, kLdc, a.data(), b.data() + 2 * first, expected.data());
  return c == expected;
}

// The same of parts, each of whole numbers.
bool parts_work(int parts, int64_t rows, int64_t columns, int64_t depth) {
  const int64_t lda = parts * depth + 32, all_rows = rows + kAmxRows;
  std::vector<BFloat16> a(all_rows * lda), b(parts * depth * columns);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i % 7) - 3;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i % 5) - 2;
  std::vector<float> c(all_rows * columns), expected(c.size());
  const PartSizes sizes{parts, tile_height(rows), rows, columns, depth};
  const PartMatrix of_a{a.data(), lda, depth}, of_b{b.data(), columns, depth * columns};
  multiply_parts_amx(sizes, of_a, of_b, c.data(), columns);
  release();
  multiply_parts_by_loops(sizes, of_a, of_b, expected.data(), columns);
  return std::equal(c.begin(), c.begin() + rows * columns, expected.begin());
}

Bf16Products choose() {
  const std::string wanted = setting("FASTRNN_CPU_BF16", {"auto", "off", "emulate"});
  if (wanted == "emulate") return kEmulated;
  Bf16Products products{"native", nullptr, nullptr, release, 1, 2};
  if (wanted == "off" || !has_bf16_dot()) return products;
  if (works(128, 64, 64) && works(32, 64, 64) && works(8, 48, 96) && works(1, 16, 6)) {
    products.multiply = multiply_native;
  }
  if (has_amx()) {
    products.row_step = 2 * kAmxRows;
    products.depth_step = kAmxDepth;
    if (parts_work(2, 49, 48, 64) && parts_work(3, 17, 64, 32)) products.multiply_parts = multiply_parts_amx;
  }
  return products;
}

}  // namespace

int exact_parts() {
  static const int parts = setting("FASTRNN_CPU_FLOAT32", {"fma", "bf16x3"}) == "fma" ? 0 : kMostParts;
  return parts;
}

const Bf16Products& emulated_products() { return kEmulated; }

const Bf16Products& bf16_products() {
  static const Bf16Products products = choose();
  return products;
}

}  // namespace fastrnn
