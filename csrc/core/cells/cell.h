// What a cell declares. A cell is a struct of static members, for one element (one unit of one row of the batch) in a
// value type V, which is a scalar or a SIMD vector:
//
//   kGates      rows of the weights, in units of H
//   kSeparate   how many of the last gates keep their recurrent part apart from their input part (0: all gates add)
//   kSaved      columns of the reserve, in units of H; the first kGates hold the input projection before the step
//   kState      the state that enters a step element by element, beside the recurrent projection
//   kProjects   a layer may project its output (P < H): a second phase of the step
//   forward(gate, state, saved) -> h
//     gate[kGates + kSeparate]  pre-activations; behind the gates, the recurrent parts of the separate ones
//     state                     in: the element state of t-1; out: that of t (kCell only)
//     saved[kSaved]             out: what backward needs
//   backward(saved, previous, grad_h, carry, grad_gate)
//     previous                  the element state of t-1
//     grad_h                    gradient of h_t, every path included
//     carry                     kCell: in dc_t, out dc_{t-1}; kHidden: out, what flows to h_{t-1} element by element
//     grad_gate[kGates + kSeparate]  out: gradients of the pre-activations, laid out as gate
#pragma once

#include "core/activation.h"

namespace fastrnn {

enum class ElementState { kNone, kHidden, kCell };

// h and, where a cell has one, the cell state.
template <class Cell>
inline constexpr int kStates = Cell::kState == ElementState::kCell ? 2 : 1;

}  // namespace fastrnn
