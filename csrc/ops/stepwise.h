// The base case of a device: a loop over the steps on the host, which launches one GEMM and one pointwise kernel a step
// (two of each for a projected layer). Any cell, shape and dtype; nothing waits for the device, so that a call can be
// captured in a graph.
#pragma once

#include "core/plan_cuda.h"
#include "ops/checks.h"

namespace fastrnn {

// Where the kernels run.
struct Gpu {
  void* stream;  // a cudaStream_t
  CudaDevice device;
};

// The current CUDA device; only in a build for CUDA.
CudaDevice current_cuda_device();

// The arguments of the ops, and where they run. What a persistent scan can do is left to it (ops/persistent.h).
Tensors stepwise_layer(CellKind kind, const Gpu& gpu, const Tensor& input, TensorList hx, TensorList weights,
                       const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                       bool bidirectional, bool batch_first, bool need_steps, bool need_reserve);
Tensors stepwise_layer_backward(CellKind kind, const Gpu& gpu, const OptionalTensors& grad_outputs, const Tensor& input,
                                TensorList hx, TensorList weights, const OptionalTensor& lengths,
                                const OptionalTensor& reset, const OptionalTensor& batch_sizes, const Tensor& output,
                                const Tensor& reserve, bool bidirectional, bool batch_first, const Mask& mask,
                                int64_t groups);

// Calls add(name, function) for the two ops of every cell. `Device` is made from the input, keeps its device current as
// long as it lives, and has the `gpu()` to use: the real one is in cuda.cpp, another in the tests that emulate a GPU.
template <class Device, class Add>
void for_each_stepwise_op(const Add& add) {
  for_each_cell([&]<CellKind kind>() {
    add(std::string(name_of(kind)) + "_layer",
        [](const Tensor& input, TensorList hx, TensorList weights, const OptionalTensor& lengths,
           const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool bidirectional, bool batch_first,
           bool need_steps, bool need_reserve) {
          const Device device(input);
          return stepwise_layer(kind, device.gpu(), input, hx, weights, lengths, reset, batch_sizes, bidirectional,
                                batch_first, need_steps, need_reserve);
        });
    add(std::string(name_of(kind)) + "_layer_backward",
        [](const OptionalTensors& grad_outputs, const Tensor& input, TensorList hx, TensorList weights,
           const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
           const Tensor& output, const Tensor& reserve, bool bidirectional, bool batch_first, const Mask& mask,
           c10::SymInt groups) {
          const Device device(input);
          return stepwise_layer_backward(kind, device.gpu(), grad_outputs, input, hx, weights, lengths, reset,
                                         batch_sizes, output, reserve, bidirectional, batch_first, mask,
                                         groups.expect_int());
        });
  });
}

}  // namespace fastrnn
