// Every op of the library on one page, and its kernels for tensors without data: docs/design.md tells the arguments.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace fastrnn {
namespace {

constexpr const char* kLayer =
    "_layer(Tensor input, Tensor[] hx, Tensor[] weights, Tensor? lengths, Tensor? reset, Tensor? batch_sizes, "
    "bool bidirectional, bool batch_first, bool need_steps, bool need_reserve) -> Tensor[]";

constexpr const char* kLayerBackward =
    "_layer_backward(Tensor?[] grad_outputs, Tensor input, Tensor[] hx, Tensor[] weights, Tensor? lengths, "
    "Tensor? reset, Tensor? batch_sizes, Tensor output, Tensor reserve, bool bidirectional, bool batch_first, "
    "bool[] mask, SymInt groups) -> Tensor[]";

// fastrnn/reference.py implements these
constexpr const char* kReference =
    "reference_layer(str cell, Tensor input, Tensor[] hx, Tensor[] weights, Tensor? lengths, Tensor? reset, "
    "Tensor? batch_sizes, bool bidirectional, bool batch_first, bool need_steps) -> Tensor[]";

constexpr const char* kReferenceBackward =
    "reference_backward(str cell, Tensor?[] grad_outputs, Tensor input, Tensor[] hx, Tensor[] weights, "
    "Tensor? lengths, Tensor? reset, Tensor? batch_sizes, bool bidirectional, bool batch_first, bool[] mask, "
    "SymInt groups) -> Tensor[]";

constexpr const char* kReferenceDoubleBackward =
    "reference_double_backward(str cell, Tensor?[] grads, Tensor?[] grad_outputs, Tensor input, Tensor[] hx, "
    "Tensor[] weights, Tensor? lengths, Tensor? reset, Tensor? batch_sizes, bool bidirectional, bool batch_first, "
    "bool[] mask, SymInt groups, bool[] need) -> Tensor[]";

TORCH_LIBRARY(fastrnn, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  for (const char* cell : kCellNames) {
    m.def((std::string(cell) + kLayer).c_str(), tags);
    m.def((std::string(cell) + kLayerBackward).c_str(), tags);
  }
  m.def(kReference, tags);
  m.def(kReferenceBackward, tags);
  m.def(kReferenceDoubleBackward, tags);
}

template <CellKind kind>
Tensors layer_meta(const Tensor& input, TensorList hx, TensorList weights, const OptionalTensor& lengths,
                   const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool bidirectional, bool batch_first,
                   bool need_steps, bool need_reserve) {
  const Layout l = check_layer(kind, input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first);
  const CellTraits& cell = traits(kind);
  const c10::SymInt directions(l.directions);
  Tensors result;
  result.push_back(at::empty_symint(l.by_rows(input, {l.outputs * directions}), input.options()));
  result.push_back(at::empty_symint({directions, l.batch, l.outputs}, input.options()));
  for (int s = 1; s < cell.states; ++s) {
    result.push_back(at::empty_symint({directions, l.batch, l.units}, input.options()));
  }
  for (int s = 1; need_steps && s < cell.states; ++s) {
    result.push_back(at::empty_symint(l.by_rows(input, {l.units * directions}), input.options()));
  }
  std::vector<c10::SymInt> reserve{0};
  if (need_reserve) {
    reserve = l.by_rows(input, {l.units * l.reserve_columns_in_units(kind)});
    reserve.insert(reserve.begin(), directions);
  }
  result.push_back(at::empty_symint(reserve, input.options().dtype(accumulate_type(input))));
  return result;
}

template <CellKind kind>
Tensors backward_meta(const OptionalTensors& grad_outputs, const Tensor& input, TensorList hx, TensorList weights,
                      const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                      const Tensor& output, const Tensor& reserve, bool bidirectional, bool batch_first,
                      const Mask& mask, c10::SymInt groups) {
  check_backward(kind, grad_outputs, input, hx, weights, lengths, reset, batch_sizes, output, reserve, bidirectional,
                 batch_first, mask, groups);
  const bool grouped = groups.maybe_as_int() != std::optional<int64_t>(0);
  Tensors result;
  const auto add = [&](const Tensor& like, bool weight) {
    std::vector<c10::SymInt> shape{0};
    if (mask.get(result.size())) {
      shape = like.sym_sizes().vec();
      if (weight && grouped) shape.insert(shape.begin(), groups);
    }
    result.push_back(at::empty_symint(shape, like.options()));
  };
  add(input, false);
  for (const Tensor& h : hx) add(h, false);
  for (const Tensor& w : weights) add(w, true);
  return result;
}

TORCH_LIBRARY_IMPL(fastrnn, Meta, m) {
  for_each_cell([&]<CellKind kind>() {
    m.impl((std::string(name_of(kind)) + "_layer").c_str(), layer_meta<kind>);
    m.impl((std::string(name_of(kind)) + "_layer_backward").c_str(), backward_meta<kind>);
  });
}

template <class Function>
c10::TypedOperatorHandle<Function> find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fastrnn::" + name).c_str(), "").typed<Function>();
}

template <class Function>
std::vector<c10::TypedOperatorHandle<Function>> find_for_cells(const char* suffix) {
  std::vector<c10::TypedOperatorHandle<Function>> handles;
  for (const char* cell : kCellNames) handles.push_back(find<Function>(std::string(cell) + suffix));
  return handles;
}

}  // namespace

const c10::TypedOperatorHandle<LayerFunction>& layer_op(CellKind kind) {
  static const auto kHandles = find_for_cells<LayerFunction>("_layer");
  return kHandles[static_cast<size_t>(kind)];
}
const c10::TypedOperatorHandle<BackwardFunction>& backward_op(CellKind kind) {
  static const auto kHandles = find_for_cells<BackwardFunction>("_layer_backward");
  return kHandles[static_cast<size_t>(kind)];
}
const c10::TypedOperatorHandle<ReferenceFunction>& reference_op() {
  static const auto kHandle = find<ReferenceFunction>("reference_layer");
  return kHandle;
}
const c10::TypedOperatorHandle<ReferenceBackwardFunction>& reference_backward_op() {
  static const auto kHandle = find<ReferenceBackwardFunction>("reference_backward");
  return kHandle;
}
const c10::TypedOperatorHandle<ReferenceDoubleBackwardFunction>& reference_double_backward_op() {
  static const auto kHandle = find<ReferenceDoubleBackwardFunction>("reference_double_backward");
  return kHandle;
}

}  // namespace fastrnn
