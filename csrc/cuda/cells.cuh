// What persistent scans do element by element (cells_forward.cuh, cells_backward.cuh), whoever holds the weights: from the
// sums of a step's products to what the next step, the caller and the backward pass need, and back again. Here is what the
// two share.
//
// A warp has its scheduler almost for itself here, so a step costs what its instructions cost, one after another, and hardly
// anything for their arithmetic. What holds for all steps is therefore computed before the first, addresses are one
// row, which fits 32 bits (rows_fit), times a width, and nothing that rows without resets or padding do not need
// stands outside of a branch.
#pragma once

#include <type_traits>

#include "gpu.h"
#include "persistent.h"

namespace fastrnn {

// What a kernel gets; Step is StepForward or StepBackward.
template <class Step>
struct PersistentParams {
  Step step;
  CudaPlan plan;
  const uint4* packed;  // [D, cluster, warps, steps, row_tiles, 32 lanes]
  int64_t step_stride;
  const int64_t* offset;
};

// The value type of the cells for layers in T of 16 bits: float32, with functions of the hardware where the standard
// library's would be the longest part of a step. They err by less than T's rounding of h in every step: for float16 by about
// 2^-22 of the value (exp2 and reciprocal), for bfloat16 by about 2^-11 (tanh), in half as many instructions of the units
// that have such functions.
template <class T>
struct Fast {
  float value;
  Fast() = default;
  GPU_FN Fast(float v) : value(v) {}  // NOLINT: a number is one
  friend GPU_FN Fast operator+(Fast a, Fast b) { return a.value + b.value; }
  friend GPU_FN Fast operator-(Fast a, Fast b) { return a.value - b.value; }
  friend GPU_FN Fast operator*(Fast a, Fast b) { return a.value * b.value; }
  GPU_FN operator float() const { return value; }  // NOLINT
};

template <class T>
struct Math<Fast<T>> {
  static GPU_FN Fast<T> sigmoid(Fast<T> x) {
    if constexpr (kCoarse) {
      return 0.5f + 0.5f * gpu::tanh_approx(0.5f * x.value);
    } else {
      return gpu::reciprocal_approx(1.f + gpu::exp2_approx(-kLog2E * x.value));
    }
  }
  static GPU_FN Fast<T> tanh(Fast<T> x) {
    const float v = x.value, square = v * v;
    if constexpr (kCoarse) {
      return gpu::tanh_approx(v);
    } else {
      // Around zero the quotient would cancel; beyond 0.25 it has lost at most three bits.
      const float near = v + v * square *
                                 (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315 + square * (62.f / 2835))));
      const float far = 1.f - 2.f * gpu::reciprocal_approx(1.f + gpu::exp2_approx(2 * kLog2E * v));
      return fabsf(v) < 0.25f ? near : far;
    }
  }
  static GPU_FN Fast<T> relu(Fast<T> x) { return x.value < 0.f ? 0.f : x.value; }
  static GPU_FN Fast<T> positive(Fast<T> y) { return y.value <= 0.f ? 0.f : 1.f; }

 private:
  static constexpr bool kCoarse = std::is_same_v<T, gpu::bf16>;
  static constexpr float kLog2E = 1.4426950408889634f;
};

template <class T>
using CellValue = std::conditional_t<gpu::kIs16Bit<T>, Fast<T>, float>;

// The rows of the batch in time, of the block's direction. kEven: all rows have all steps, none begins anew on the way, and
// the data are not packed; what a kernel then knows while it is compiled is not asked in every step.
template <class Step, bool kEven>
class Timeline {
 public:
  GPU_FN explicit Timeline(const PersistentParams<Step>& params)
      : p_(params),
        d_(static_cast<int>(blockIdx.y)),
        packed_(!kEven && params.offset != nullptr),
        stride_(static_cast<unsigned>(params.step.table.batch_stride)),
        step_(static_cast<unsigned>(params.step_stride)),
        begin_(static_cast<unsigned>(d_ * params.step.table.total)) {}

  GPU_FN int direction() const { return d_; }
  GPU_FN bool reverse() const { return d_ == 1; }
  // Has it no rows beyond the lengths?
  GPU_FN bool packed() const { return !kEven && packed_; }
  // Valid steps; -1 beyond the batch.
  GPU_FN int length(int n) const {
    const StepTable& table = p_.step.table;
    if (n >= table.batch) return -1;
    const int64_t length = kEven || table.lengths == nullptr ? table.steps : table.lengths[n];
    return static_cast<int>(length < table.steps ? length : table.steps);
  }
  // Whether step t is one of a row with that length.
  GPU_FN bool valid(int t, int length) const { return kEven ? length >= 0 : t < length; }
  // The last step of a row with that length, in the direction of the scan.
  GPU_FN int last(int length) const { return reverse() ? 0 : length - 1; }
  // Steps that some row of the batch from n on visits, padding included.
  GPU_FN int steps(int n) const { return packed() ? length(n) : static_cast<int>(p_.step.table.steps); }
  GPU_FN Sequence sequence(int n, int length) const {
    const StepTable& table = p_.step.table;
    return {length, table.reset == nullptr ? nullptr : table.reset + n * table.reset_batch_stride,
            table.reset_step_stride};
  }
  // The row of (t, n), where there is one. Unsigned numbers: their product of 64 bits is one instruction.
  GPU_FN unsigned row(int t, int n) const {
    const unsigned first = packed() ? static_cast<unsigned>(gpu::load_readonly(p_.offset + t)) : unsigned(t) * step_;
    return first + unsigned(n) * stride_;
  }
  // From a row to that of the next step of a scan with or against the direction, where data are not packed.
  GPU_FN int stride(bool against) const { return static_cast<int>(reverse() != against ? 0u - step_ : step_); }
  // Of a tensor [D, rows, width], column j of a row.
  GPU_FN uint64_t of_direction(unsigned row, unsigned width, unsigned j) const {
    return uint64_t{begin_ + row} * width + j;
  }
  // Of a tensor [rows, D, H].
  GPU_FN uint64_t of_rows(unsigned row, unsigned unit) const {
    const unsigned units = static_cast<unsigned>(p_.step.units);
    return uint64_t{row} * (p_.step.table.directions * units) + (d_ * units + unit);
  }
  // Of a tensor [D, N, width].
  GPU_FN int64_t of_batch(int n, int64_t width, int j) const { return (d_ * p_.step.table.batch + n) * width + j; }

 private:
  const PersistentParams<Step>& p_;
  int d_;
  bool packed_;
  unsigned stride_, step_, begin_;  // rows from n to n + 1, and from t to t + 1; the direction's first
};

// Element `index` of an array of T as float32; zero where there is no array.
template <class T>
GPU_FN float value_of(const void* p, int64_t index) {
  return p == nullptr ? 0.f : gpu::to_float(static_cast<const T*>(p)[index]);
}

// Where the e-th element of a block's [units, columns] is: a warp has 8 units, a sector of memory, of 4 rows of the batch,
// which in shared arrays [unit, 8 columns] lie in different banks but for pairs.
template <int kColumns>
struct Element {
  int u, column;
  GPU_FN explicit Element(int e)
      : u(e / 32 / (kColumns / 4) * 8 + e % 8), column(e / 32 % (kColumns / 4) * 4 + e % 32 / 8) {}
};

}  // namespace fastrnn
