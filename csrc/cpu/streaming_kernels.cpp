// The streaming step of every cell and kind of weights, compiled once per ISA (see CMakeLists.txt).
#include "cpu/streaming_kernels.h"

#include "cpu/streaming_step.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

template <class Cell, class T, class Weights>
constexpr StreamingKernels<T> streaming_kernels() {
  using Layer = StreamingLayer<Cell, T, Weights>;
  return {&Layer::packed_bytes, &Layer::pack, &Layer::product_bytes, &Layer::multiply_inputs, &Layer::step};
}

template <class... Cells>
constexpr StreamingTable streaming_table_of(CellList<Cells...>) {
  return {{{streaming_kernels<Cells, float, FullWeights<float>>(), streaming_kernels<Cells, float, Bfloat16Weights>(),
            streaming_kernels<Cells, float, Int8Weights>()}...},
          {streaming_kernels<Cells, double, FullWeights<double>>()...}};
}

}  // namespace CPU_CAPABILITY

// FASTRNN_STREAMING: streaming_avx512, streaming_avx2 or streaming_default.
extern const StreamingTable FASTRNN_STREAMING;
const StreamingTable FASTRNN_STREAMING = streaming_table_of(AllCells());

}  // namespace fastrnn
