// The gated recurrent unit (Cho et al. 2014) in its linear-before-reset form, as torch.nn.GRU and cuDNN have it:
//   r = s(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
//   z = s(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
//   n = tanh(W_in x_t + b_in + r q),  q = W_hn h_{t-1} + b_hn
//   h_t = (1 - z) n + z h_{t-1}
// The candidate's recurrent part q is scaled by r before it meets its input part, so the two stay apart.
#pragma once

#include "core/cells/cell.h"

namespace fastrnn {

template <class Gate = Sigmoid, class Candidate = Tanh>
struct GruCell {
  static constexpr int kGates = 3;
  static constexpr int kSeparate = 1;
  static constexpr int kSaved = 4;  // r z n q
  static constexpr ElementState kState = ElementState::kHidden;
  static constexpr bool kProjects = false;

  template <class V>
  static FASTRNN_INLINE V forward(const V (&gate)[4], V& h_previous, V (&saved)[4]) {
    const V r = Gate::value(gate[0]), z = Gate::value(gate[1]), q = gate[3];
    const V n = Candidate::value(gate[2] + r * q);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = q;
    return n + z * (h_previous - n);
  }

  template <class V>
  static FASTRNN_INLINE void backward(const V (&saved)[4], V h_previous, V grad_h, V& carry, V (&grad_gate)[4]) {
    const V r = saved[0], z = saved[1], n = saved[2], q = saved[3];
    const V dn = grad_h * (V(1) - z) * Candidate::derivative(n);
    grad_gate[0] = dn * q * Gate::derivative(r);
    grad_gate[1] = grad_h * (h_previous - n) * Gate::derivative(z);
    grad_gate[2] = dn;
    grad_gate[3] = dn * r;
    carry = grad_h * z;
  }
};

}  // namespace fastrnn
