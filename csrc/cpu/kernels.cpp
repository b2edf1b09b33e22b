// The instantiations, compiled once per ISA (see CMakeLists.txt): a cell is one line here.
#include "cpu/kernels.h"

#include "core/cells/gru.h"
#include "core/cells/lstm.h"
#include "core/cells/rnn.h"
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
constexpr CpuKernels cpu_kernels_of(const char* name) {
  static_assert(sizeof...(Cells) == kCellKinds);
  return {name, {scan_kernels<Cells, float>()...}, {scan_kernels<Cells, double>()...}};
}

}  // namespace CPU_CAPABILITY

// FASTRNN_KERNELS: kernels_avx512, kernels_avx2 or kernels_default. In the order of CellKind.
extern const CpuKernels FASTRNN_KERNELS;
const CpuKernels FASTRNN_KERNELS = cpu_kernels_of<RnnCell<Tanh>, RnnCell<Relu>, LstmCell<>, GruCell<>>(
    FASTRNN_KERNELS_NAME);

}  // namespace fastrnn
