// Products of tensors on the CPU, by whoever is fastest.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/kernels.h"
#include "ops/layer_op.h"

namespace fastrnn {

// Where a product in parts is faster than one in float32: a side is packed as it is read, and used for all of the other.
inline bool worth_parts(const GemmSizes& z) {
  constexpr int64_t kLeast = 96, kDepth = 32, kWork = 1 << 21;
  return z.m >= kLeast && z.n >= kLeast && z.k >= kDepth && z.m * z.n * z.k >= kWork;
}

// sum (+)= a b by the library. A sum of hundreds of products, each added to those before, errs several times as much as
// one of chunks; of matrices it is worth a call for each, and the memory, where that is less than what is multiplied.
inline void multiply_by_library(Tensor& sum, bool begun, const Tensor& a, const Tensor& b) {
  constexpr int64_t kMost = 128;
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  const bool worth_it = m > 1 && n > 1 && m * n <= (m + n) * k;
  if (!library_is_foreign() || k <= kMost || !worth_it) {
    add_product(sum, begun, a, b);
    return;
  }
  const Tensor chunk = at::empty_like(sum);
  for (int64_t first = 0; first < k; first += kMost) {
    const int64_t count = std::min(kMost, k - first);
    Tensor to = begun ? chunk : sum;
    at::mm_out(to, a.narrow(1, first, count), b.narrow(0, first, count));
    if (begun) sum.add_(chunk);
    begun = true;
  }
}

template <class T>
Factor<T> factor_of(const Tensor& matrix) {
  return {matrix.const_data_ptr<T>(), matrix.stride(0), matrix.stride(1)};
}

// sum (+)= a b, of T, on so many threads: in so many parts of bfloat16, by the kernels' own product, or by the library's,
// which chooses its threads itself.
template <class T>
void multiply(int parts, int threads, Tensor& sum, bool begun, const Tensor& a, const Tensor& b) {
  if (sum.stride(1) != 1 && sum.stride(0) == 1) {
    Tensor turned = sum.t();
    multiply<T>(parts, threads, turned, begun, b.t(), a.t());
    return;
  }
  const GemmSizes sizes{a.size(0), b.size(1), a.size(1)};
  const auto lies_well = [](const Tensor& t) { return t.stride(0) == 1 || t.stride(1) == 1; };
  const bool in_parts = parts > 1 && worth_parts(sizes);
  // of a row times rows, or an outer product, nothing is used twice: there is nothing to pack
  const bool as_it_lies = b.stride(1) == 1 && (sizes.m == 1 || sizes.k == 1);
  const bool own = as_it_lies || (own_gemm() && sizes.m > 1 && sizes.n > 1);
  if (!lies_well(a) || !lies_well(b) || sum.stride(1) != 1 || !(in_parts || own)) {
    multiply_by_library(sum, begun, a, b);
    return;
  }
  const auto& kernels = cpu_kernels();
  T* const c = sum.mutable_data_ptr<T>();
  if constexpr (std::is_same_v<T, float>) {
    if (in_parts) {
      kernels.multiply_in_parts(bf16_products(), parts, sizes, factor_of<T>(a), factor_of<T>(b), c, sum.stride(0),
                                begun, threads);
      return;
    }
  }
  kernels.multiply<T>()(sizes, factor_of<T>(a), factor_of<T>(b), c, sum.stride(0), begun, threads);
}

// sum (+)= the sum of all rows.
template <class T>
void add_rows(int threads, Tensor& sum, bool begun, const Tensor& rows) {
  constexpr T kOne = 1;
  cpu_kernels().multiply<T>()({1, rows.size(1), rows.size(0)}, {&kOne, 0, 0}, factor_of<T>(rows),
                              sum.mutable_data_ptr<T>(), sum.numel(), begun, threads);
}

}  // namespace fastrnn
