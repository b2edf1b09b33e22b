// The Elman network (Elman 1990), as torch.nn.RNN has it:
//   h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh),  f = tanh or relu
#pragma once

#include "core/cells/cell.h"

namespace fastrnn {

template <class F>
struct RnnCell {
  static constexpr int kGates = 1;
  static constexpr int kSeparate = 0;
  static constexpr int kSaved = 1;  // h
  static constexpr ElementState kState = ElementState::kNone;
  static constexpr bool kProjects = false;

  template <class V>
  static FASTRNN_INLINE V forward(const V (&gate)[1], V&, V (&saved)[1]) {
    return saved[0] = F::value(gate[0]);
  }

  template <class V>
  static FASTRNN_INLINE void backward(const V (&saved)[1], V, V grad_h, V&, V (&grad_gate)[1]) {
    grad_gate[0] = grad_h * F::derivative(saved[0]);
  }
};

}  // namespace fastrnn
