// Every check of an op's arguments, once for all cells, devices and for tensors without data (Meta).
#pragma once

#include "ops/ops.h"

namespace fastrnn {

// What the arguments of a layer say about it. Sizes are symbolic while torch.compile or torch.export traces.
struct Layout {
  int directions = 1;      // D
  bool biases = false;
  bool projected = false;
  bool packed = false;     // rows of a PackedSequence
  c10::SymInt steps;       // T
  c10::SymInt batch;       // N
  c10::SymInt inputs;      // I
  c10::SymInt units;       // H
  c10::SymInt outputs;     // P or H

  int weights_per_direction() const { return 2 + (biases ? 2 : 0) + (projected ? 1 : 0); }
  // indices into the weights of direction d
  int w_ih(int d) const { return d * weights_per_direction(); }
  int w_hh(int d) const { return w_ih(d) + 1; }
  int b_ih(int d) const { return w_ih(d) + 2; }
  int b_hh(int d) const { return w_ih(d) + 3; }
  int w_hr(int d) const { return w_ih(d) + weights_per_direction() - 1; }

  // [T, N] or [N, T] or [rows], and what follows
  std::vector<c10::SymInt> by_rows(const Tensor& input, std::initializer_list<c10::SymInt> last) const;
  int64_t reserve_columns_in_units(CellKind kind) const { return traits(kind).saved + (projected ? 1 : 0); }
};

// Throws the errors of torch.nn where torch.nn has them (c10::Error: RuntimeError in Python).
Layout check_layer(CellKind kind, const Tensor& input, TensorList hx, TensorList weights, const OptionalTensor& lengths,
                   const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool bidirectional,
                   bool batch_first);

// The same, and what only the backward op has.
Layout check_backward(CellKind kind, const OptionalTensors& grad_outputs, const Tensor& input, TensorList hx,
                      TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset,
                      const OptionalTensor& batch_sizes, const Tensor& output, const Tensor& reserve,
                      bool bidirectional, bool batch_first, const Mask& mask, const c10::SymInt& groups);

// Shapes of the incoming gradients. Apart from the rest, because no shape of a result depends on them, and compiled
// autograd traces with placeholders in their place.
void check_grad_outputs(CellKind kind, const Layout& layout, const OptionalTensors& grad_outputs, const Tensor& input,
                        const Tensor& output);

}  // namespace fastrnn
