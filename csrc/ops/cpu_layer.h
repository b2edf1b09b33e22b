// What the forward and the backward op of a layer share on the CPU: dtypes, directions, and rows that no scan visits.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/cpu_plan.h"
#include "ops/layer_op.h"
#include "ops/rows.h"

namespace fastrnn {

// Slice d of a tensor whose first dimension is the direction; null stays null.
template <class T>
auto direction(T* p, int d, int64_t stride) {
  return p == nullptr ? nullptr : p + d * stride;
}
template <class T>
Stored<T> direction(const Stored<T>& of, int d, int64_t stride) {
  return of.data == nullptr ? of : of.from(d * stride);
}

template <class T>
constexpr auto scalar_type = c10::CppTypeToScalarType<T>::value;

// t.to(type), without a call of an op where there is nothing to do: a small layer takes less time than a few of them.
inline Tensor to_type(const Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

template <class T>
Tensor as(const Tensor& t) {
  return t.defined() ? to_type(t, scalar_type<T>).contiguous() : t;
}

// f(first, last) over the steps, or rows, on all threads where the `bytes` of each make it worth it.
template <class F>
void for_steps(int64_t steps, int64_t bytes, const F& f) {
  constexpr int64_t kBytesWorthAThread = 128 << 10;
  if (cpu_threads() == 1) {
    f(0, steps);
  } else {
    at::parallel_for(0, steps, std::max<int64_t>(1, kBytesWorthAThread / std::max<int64_t>(1, bytes)), f);
  }
}

// Zeros in rows that no scan visits. data: [rows, columns], also with a dimension of directions before.
inline void clear_padding(const RowTable& table, const Tensor& data) {
  if (!table.padded() || !data.defined()) return;
  const Rows& rows = table.rows();
  const int64_t row_bytes = data.size(-1) * data.element_size();
  const int64_t all = table.total() * row_bytes;
  auto* const begin = static_cast<char*>(data.mutable_data_ptr());
  for (char* to = begin; to < begin + data.nbytes(); to += all) {
    for_steps(rows.steps, all / std::max<int64_t>(1, rows.steps), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        for (int64_t i = rows.active[t]; i < rows.batch; ++i) {
          std::memset(to + rows.row(t, rows.order[i]) * row_bytes, 0, row_bytes);
        }
      }
    });
  }
}

// Of an infinite number, or one that is rounded to infinity, a part is NaN, and so is what is made of it: float32 itself
// may know better.
inline bool has_nan(const Tensor& result) { return result.defined() && std::isnan(result.sum().item<double>()); }

template <class F>
auto with_type(const Tensor& input, const F& f) {
  switch (input.scalar_type()) {
    case at::kDouble:
      return f(double());
    case at::kFloat:
    case at::kBFloat16:  // 16-bit storage has its states, gates and sums in float32
    case at::kHalf:
      return f(float());
    default:
      TORCH_CHECK(false, "Expected float64, float32, bfloat16 or float16, got ", input.scalar_type());
  }
}

}  // namespace fastrnn
