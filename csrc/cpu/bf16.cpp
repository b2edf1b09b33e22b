#include "cpu/bf16.h"

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

#include "cpu/capability.h"

namespace fastrnn {
namespace {

using c10::BFloat16;

// oneDNN's small GEMM, generated for the machine: AMX tiles or AVX512_BF16.
const Bf16Products kNative{
    "native",
    [](int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const BFloat16* a,
       const BFloat16* b, float* c) { at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c); },
    [] { at::native::cpublas::brgemm_release(); },
};

void multiply_by_loops(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                       const BFloat16* a, const BFloat16* b, float* c) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        sum += static_cast<float>(a[i * lda + p]) * static_cast<float>(b[(p / 2 * ldb + j) * 2 + p % 2]);
      }
      c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
    }
  }
}

const Bf16Products kEmulated{"emulated", multiply_by_loops, [] {}};

// Whether it runs here and means what it should: parts of matrices of small whole numbers, whose products are exact.
bool works(const Bf16Products& products) {
  constexpr int kRows = 8, kDepth = 34, kLda = 40, kLdb = 48, kLdc = 20, kColumns = 16, kFirst = 32;
  BFloat16 a[kRows * kLda], b[kDepth * kLdb];
  for (int i = 0; i < kRows * kLda; ++i) a[i] = static_cast<float>(i % 7 - 3);
  for (int i = 0; i < kDepth * kLdb; ++i) b[i] = static_cast<float>(i % 5 - 2);
  for (const bool add : {false, true}) {
    float c[kRows * kLdc], expected[kRows * kLdc];
    for (int i = 0; i < kRows * kLdc; ++i) c[i] = expected[i] = static_cast<float>(i);
    try {
      products.multiply(kRows, kColumns, kDepth, kLda, kLdb, kLdc, add, a, b + 2 * kFirst, c);
      products.release();
    } catch (const std::exception&) {
      return false;  // this build of torch can't
    }
    kEmulated.multiply(kRows, kColumns, kDepth, kLda, kLdb, kLdc, add, a, b + 2 * kFirst, expected);
    if (!std::equal(c, c + kRows * kLdc, expected)) return false;
  }
  return true;
}

const Bf16Products* choose() {
  const char* variable = std::getenv("FASTRNN_CPU_BF16");
  const std::string wanted = variable == nullptr || *variable == '\0' ? "auto" : variable;
  if (wanted == "emulate") return &kEmulated;
  if (wanted != "auto" && wanted != "off") {
    throw std::invalid_argument("FASTRNN_CPU_BF16 should be 'auto', 'off' or 'emulate', got '" + wanted + "'");
  }
  if (wanted == "off" || !has_bf16_dot() || !works(kNative)) return nullptr;
  return &kNative;
}

}  // namespace

const Bf16Products* bf16_products() {
  static const Bf16Products* const products = choose();
  return products;
}

}  // namespace fastrnn
