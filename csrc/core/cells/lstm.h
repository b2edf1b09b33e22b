// Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000), as torch.nn.LSTM
// has it. With z = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh in four parts:
//   i = s(z_i)   f = s(z_f)   g = tanh(z_g)   o = s(z_o)
//   c_t = f c_{t-1} + i g
//   h_t = o tanh(c_t)
#pragma once

#include "core/cells/cell.h"

namespace fastrnn {

template <class Gate = Sigmoid, class Candidate = Tanh>
struct LstmCell {
  static constexpr int kGates = 4;
  static constexpr int kSeparate = 0;
  static constexpr int kSaved = 5;  // i f g o c; tanh(c) is computed again
  static constexpr ElementState kState = ElementState::kCell;
  static constexpr bool kProjects = true;

  template <class V>
  static FASTRNN_INLINE V forward(const V (&gate)[4], V& c, V (&saved)[5]) {
    const V i = Gate::value(gate[0]), f = Gate::value(gate[1]), g = Candidate::value(gate[2]), o = Gate::value(gate[3]);
    c = f * c + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    return o * Candidate::value(c);
  }

  template <class V>
  static FASTRNN_INLINE void backward(const V (&saved)[5], V c_previous, V grad_h, V& grad_c, V (&grad_gate)[4]) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V y = Candidate::value(saved[4]);
    const V dc = grad_c + grad_h * o * Candidate::derivative(y);
    grad_gate[0] = dc * g * Gate::derivative(i);
    grad_gate[1] = dc * c_previous * Gate::derivative(f);
    grad_gate[2] = dc * i * Candidate::derivative(g);
    grad_gate[3] = grad_h * y * Gate::derivative(o);
    grad_c = dc * f;
  }
};

}  // namespace fastrnn
