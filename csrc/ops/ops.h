// The ops as C++ calls them: types of their arguments, and handles that go through the dispatcher.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/cells/all.h"

namespace fastrnn {

using at::Tensor;
using at::TensorList;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;
using Mask = c10::List<bool>;

inline const char* name_of(CellKind kind) { return kCellNames[static_cast<int>(kind)]; }

// The kind of that name; std::invalid_argument for no cell's.
inline CellKind kind_of(const std::string& cell) {
  std::string names;
  for (int kind = 0; kind < kCellKinds; ++kind) {
    if (cell == kCellNames[kind]) return static_cast<CellKind>(kind);
    names += (kind == 0 ? "'" : ", '") + std::string(kCellNames[kind]) + "'";
  }
  throw std::invalid_argument("cell should be one of " + names + ", got '" + cell + "'");
}

// {cell}_layer: input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first, need_steps, need_reserve
using LayerFunction = Tensors(const Tensor&, TensorList, TensorList, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, bool, bool, bool, bool);
// {cell}_layer_backward: grad_outputs, input, hx, weights, lengths, reset, batch_sizes, output, reserve, bidirectional,
// batch_first, mask, groups
using BackwardFunction = Tensors(const OptionalTensors&, const Tensor&, TensorList, TensorList, const OptionalTensor&,
                                 const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool, bool,
                                 const Mask&, c10::SymInt);
using ReferenceFunction = Tensors(std::string_view, const Tensor&, TensorList, TensorList, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&, bool, bool, bool);
using ReferenceBackwardFunction = Tensors(std::string_view, const OptionalTensors&, const Tensor&, TensorList,
                                          TensorList, const OptionalTensor&, const OptionalTensor&,
                                          const OptionalTensor&, bool, bool, const Mask&, c10::SymInt);
using ReferenceDoubleBackwardFunction = Tensors(std::string_view, const OptionalTensors&, const OptionalTensors&,
                                                const Tensor&, TensorList, TensorList, const OptionalTensor&,
                                                const OptionalTensor&, const OptionalTensor&, bool, bool, const Mask&,
                                                c10::SymInt, const Mask&);

const c10::TypedOperatorHandle<LayerFunction>& layer_op(CellKind kind);
const c10::TypedOperatorHandle<BackwardFunction>& backward_op(CellKind kind);
const c10::TypedOperatorHandle<ReferenceFunction>& reference_op();
const c10::TypedOperatorHandle<ReferenceBackwardFunction>& reference_backward_op();
const c10::TypedOperatorHandle<ReferenceDoubleBackwardFunction>& reference_double_backward_op();

// Calls f.template operator()<kind>() for every cell: how per-cell kernels are registered.
template <class F>
void for_each_cell(const F& f) {
  [&]<int... kind>(std::integer_sequence<int, kind...>) {
    (f.template operator()<static_cast<CellKind>(kind)>(), ...);
  }(std::make_integer_sequence<int, kCellKinds>());
}

// What an op computes in: 16-bit storage has its states, gates and sums in float32.
inline at::ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Tensor or_undefined(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
inline OptionalTensor or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }

}  // namespace fastrnn
