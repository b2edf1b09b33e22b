// The instantiations of every cell, compiled once per ISA (see CMakeLists.txt).
#include "cpu/kernels.h"

#include "cpu/gemm.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

template <class Cell, class T>
constexpr ScanKernels<T> scan_kernels() {
  return {&ForwardScan<Cell, T>::scratch_bytes, &ForwardScan<Cell, T>::run, &BackwardScan<Cell, T>::scratch_bytes,
          &BackwardScan<Cell, T>::run};
}

template <class... Cells>
constexpr CpuKernels cpu_kernels_of(const char* name, CellList<Cells...>) {
  return {name,
          {scan_kernels<Cells, float>()...},
          {scan_kernels<Cells, double>()...},
          &multiply_matrices<float>,
          &multiply_matrices<double>,
          &multiply_in_parts};
}

}  // namespace CPU_CAPABILITY

// FASTRNN_KERNELS: kernels_avx512, kernels_avx2 or kernels_default.
extern const CpuKernels FASTRNN_KERNELS;
const CpuKernels FASTRNN_KERNELS = cpu_kernels_of(FASTRNN_KERNELS_NAME, AllCells());

}  // namespace fastrnn
