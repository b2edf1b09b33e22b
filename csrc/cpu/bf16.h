// Matrix products of bfloat16 with sums in float32, by the processor's own instructions for them.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace fastrnn {

struct Bf16Products {
  const char* name;
  // c [m, n] = a b: a [m, k] and c with row strides lda and ldc; b [k / 2, ldb, 2], two k side by side; k is even.
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const c10::BFloat16* a,
                   const c10::BFloat16* b, float* c);
  void (*release)();  // after a thread's last product for a while
};

// Null where the machine has no such instructions (AVX512_BF16 or AMX). FASTRNN_CPU_BF16 is auto, off, or emulate: plain
// loops, which show what such a machine would compute. Throws std::invalid_argument for any other value.
const Bf16Products* bf16_products();

}  // namespace fastrnn
