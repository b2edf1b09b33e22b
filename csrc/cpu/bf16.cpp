#include "cpu/bf16.h"

#include <ATen/native/CPUBlas.h>

#include <cstdlib>
#include <exception>
#include <stdexcept>
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

const Bf16Products kEmulated{"emulated", multiply_by_loops, [] {}};

// oneDNN's small GEMM, generated for the machine and the sizes: AMX tiles or AVX512_BF16. May throw.
void multiply_generated(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const BFloat16* a,
                        const BFloat16* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, /*add_C=*/false, a, b, c);
}

// The members of a team wait for each other, so none may throw: if another thread switches oneDNN off meanwhile, or it
// refuses these sizes, the product is slow.
const Bf16Products kNative{
    "native",
    [](int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const BFloat16* a, const BFloat16* b,
       float* c) {
      try {
        multiply_generated(m, n, k, lda, ldb, ldc, a, b, c);
      } catch (const std::exception&) {
        multiply_by_loops(m, n, k, lda, ldb, ldc, a, b, c);
      }
    },
    [] { at::native::cpublas::brgemm_release(); },
};

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
  kNative.release();
  multiply_by_loops(rows, columns, depth, lda, kLdb, kLdc, a.data(), b.data() + 2 * first, expected.data());
  return c == expected;
}

const Bf16Products* choose() {
  const char* variable = std::getenv("FASTRNN_CPU_BF16");
  const std::string wanted = variable == nullptr || *variable == '\0' ? "auto" : variable;
  if (wanted == "emulate") return &kEmulated;
  if (wanted != "auto" && wanted != "off") {
    throw std::invalid_argument("FASTRNN_CPU_BF16 should be 'auto', 'off' or 'emulate', got '" + wanted + "'");
  }
  if (wanted == "off" || !has_bf16_dot()) return nullptr;
  if (!works(128, 64, 64) || !works(32, 64, 64) || !works(8, 48, 96) || !works(1, 16, 6)) return nullptr;
  return &kNative;
}

}  // namespace

const Bf16Products* bf16_products() {
  static const Bf16Products* const products = choose();
  return products;
}

}  // namespace fastrnn
