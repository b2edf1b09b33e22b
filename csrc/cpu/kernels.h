// The scans, compiled once per ISA, behind one table; the choice of the table at run time.
#pragma once

#include <limits>
#include <string>

#include "core/cells/all.h"
#include "core/params.h"
#include "core/plan.h"
#include "cpu/bf16.h"

namespace fastrnn {

class Progress;

struct Scan {
  CellKind kind;
  LayerShape shape;
  Rows rows;
  CpuPlan plan;
  int directions = 1;
  // Backward, the steps that this run visits, in the order of visits: all, or the next ones after a run before that had
  // the same scratch memory.
  int64_t first_visit = 0, end_visit = std::numeric_limits<int64_t>::max();
  const Bf16Products* bf16 = nullptr;  // what a plan with parts multiplies with
  // Of a layer beside others of its stack, on one thread: that of the layer below, whose output is the input, and its
  // own, for the layer above. Null: all of the input is there, or nobody waits.
  const Progress* below = nullptr;
  Progress* progress = nullptr;
};

// A product c [m, n] = a b of matrices.
struct GemmSizes {
  int64_t m, n, k;
};
// Element (i, j) is data[i * row + j * column]; one of the two is one, and the other may be zero, where rows or columns
// repeat themselves.
template <class T>
struct Factor {
  const T* data;
  int64_t row, column;

  FASTRNN_INLINE Factor from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};
// c [m, ldc] = or += a b on so many threads. Of a single row a, both strides may be zero.
template <class T>
using Multiply = void (*)(const GemmSizes&, const Factor<T>& a, const Factor<T>& b, T* c, int64_t ldc, bool add,
                          int threads);

template <class T>
struct ScanKernels {
  int64_t (*forward_scratch)(const Scan&);  // bytes
  void (*forward)(const Scan&, const ForwardParams<T>*, void*);  // [directions], scratch
  int64_t (*backward_scratch)(const Scan&);  // bytes
  void (*backward)(const Scan&, const BackwardParams<T>*, void*);  // [directions], scratch
};

struct CpuKernels {
  const char* name;
  ScanKernels<float> f32[kCellKinds];
  ScanKernels<double> f64[kCellKinds];
  Multiply<float> multiply_f32;
  Multiply<double> multiply_f64;
  // The same of float32 in two or three parts of bfloat16.
  void (*multiply_in_parts)(const Bf16Products&, int parts, const GemmSizes&, const Factor<float>& a,
                            const Factor<float>& b, float* c, int64_t ldc, bool add, int threads);

  template <class T>
  const ScanKernels<T>& get(CellKind kind) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32[static_cast<int>(kind)];
    } else {
      return f64[static_cast<int>(kind)];
    }
  }
  template <class T>
  Multiply<T> multiply() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return multiply_f32;
    } else {
      return multiply_f64;
    }
  }
};

// The table of the best ISA that this machine has and FASTRNN_CPU_CAPABILITY (avx512, avx2, default) allows. Throws
// std::invalid_argument for any other value of the variable.
const CpuKernels& cpu_kernels();

// L2 of one core in bytes, a guess of 1 MiB where the system does not say.
int64_t l2_cache_bytes();

}  // namespace fastrnn
