// Matrix products of bfloat16 with sums in float32, by the processor's own instructions for them.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "cpu/amx.h"

namespace fastrnn {

struct Bf16Products {
  const char* name;  // "native" or "emulated"
  // c [m, n] = a b of bfloat16: a [m, k] and c with row strides lda and ldc; b [k / 2, ldb, 2], two k side by side; k is
  // even.
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const c10::BFloat16* a,
                   const c10::BFloat16* b, float* c);
  // The same of float32 in parts; see multiply_parts_amx. Null where that is no faster than float32 itself.
  void (*multiply_parts)(const PartSizes&, const PartMatrix& a, const PartMatrix& b, float* c, int64_t ldc);
  void (*release)();  // after a thread's last product for a while
  // In what steps rows and k are best counted: a matrix unit takes whole tiles of them, and cuts others into small ones.
  int64_t row_step, depth_step;
};

// What this machine has: a null pointer where there are no instructions (AVX512_BF16 or AMX, and AMX for parts).
// FASTRNN_CPU_BF16 is auto, off, or emulate: plain loops, which show what such a machine would compute. Throws
// std::invalid_argument for any other value.
const Bf16Products& bf16_products();

// Those loops.
const Bf16Products& emulated_products();

// In how many parts of bfloat16 float32 is multiplied where torch's switch says nothing: 0, as it is, or 3 with
// FASTRNN_CPU_FLOAT32=bf16x3. Throws std::invalid_argument for any value of the variable but that and fma.
int exact_parts();

}  // namespace fastrnn
