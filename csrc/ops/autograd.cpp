// Autograd and autocast, once for all cells. The nodes are written by hand, as torch's own generated code is: an
// autograd::Function refuses torch.func, register_autograd drops forward-mode tangents.
#include "ops/autograd.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace fastrnn {
namespace {

namespace ag = torch::autograd;

// Node is an intrusive_ptr_target from torch 2.12 on, a shared_ptr's object before.
#if __has_include(<torch/csrc/autograd/node.h>)
template <class N>
auto make_node() {
  return c10::make_intrusive<N>();
}
#else
template <class N>
auto make_node() {
  return std::shared_ptr<N>(new N(), ag::deleteNode);
}
#endif

// The arguments that have a gradient, as one list: input, hx, weights.
Tensors differentiable(const Tensor& input, TensorList hx, TensorList weights) {
  Tensors all{input};
  all.reserve(1 + hx.size() + weights.size());
  all.insert(all.end(), hx.begin(), hx.end());
  all.insert(all.end(), weights.begin(), weights.end());
  return all;
}

Tensors defined(const OptionalTensors& tensors) {
  Tensors all;
  for (size_t i = 0; i < tensors.size(); ++i) all.push_back(or_undefined(tensors.get(i)));
  return all;
}

OptionalTensors as_optional(const Tensors& tensors) {
  OptionalTensors list;
  list.reserve(tensors.size());
  for (const Tensor& t : tensors) list.push_back(or_none(t));
  return list;
}

Mask as_mask(const std::vector<bool>& values) {
  Mask mask;
  mask.reserve(values.size());
  for (const bool value : values) mask.push_back(value);
  return mask;
}

// What both nodes keep: everything that they need to call an op with the arguments of the layer once more.
struct SavedLayer {
  CellKind kind = CellKind::kLstm;
  size_t states = 0;                     // of hx
  std::vector<ag::SavedVariable> inputs;  // input, hx, weights
  ag::SavedVariable lengths, reset, batch_sizes;
  bool bidirectional = false, batch_first = false;

  void save(CellKind cell, const Tensors& all, size_t hx_size, const OptionalTensor& l, const OptionalTensor& r,
            const OptionalTensor& b, bool two, bool first) {
    kind = cell;
    states = hx_size;
    inputs.reserve(all.size());
    for (const Tensor& t : all) inputs.emplace_back(t, false);
    lengths = ag::SavedVariable(or_undefined(l), false);
    reset = ag::SavedVariable(or_undefined(r), false);
    batch_sizes = ag::SavedVariable(or_undefined(b), false);
    bidirectional = two;
    batch_first = first;
  }
  Tensors unpack() const {
    Tensors all;
    all.reserve(inputs.size());
    for (const ag::SavedVariable& v : inputs) all.push_back(v.unpack());
    return all;
  }
  void release() {
    for (ag::SavedVariable& v : inputs) v.reset_data();
    lengths.reset_data();
    reset.reset_data();
    batch_sizes.reset_data();
  }
  // for torch's compiled autograd, which traces through the nodes
  void collect(torch::dynamo::autograd::CompiledNodeArgs& args) const {
    const_cast<SavedLayer*>(this)->each_variable([&](const ag::SavedVariable& v) { args.collect(v, false); });
    args.collect(bidirectional);
    args.collect(batch_first);
    args.collect(static_cast<int64_t>(states));
    args.collect(static_cast<int64_t>(kind));
  }
  template <class F>
  void each_variable(const F& f) {
    for (ag::SavedVariable& v : inputs) f(v);
    f(lengths);
    f(reset);
    f(batch_sizes);
  }
};

// The two lists within input, hx, weights.
TensorList hx_of(const Tensors& all, size_t states) { return TensorList(all).slice(1, states); }
TensorList weights_of(const Tensors& all, size_t states) { return TensorList(all).slice(1 + states); }

// Edges: grad_outputs, input, hx, weights. Not for compiled autograd, which refuses the autograd call in the reference.
struct LayerDoubleBackward : public ag::Node {
  SavedLayer layer;
  std::vector<ag::SavedVariable> grad_outputs;
  std::vector<bool> mask;
  c10::SymInt groups = 0;
  bool released = false;

  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, ag::ERR_BACKWARD_TWICE);
    Tensors outer;
    for (const ag::SavedVariable& v : grad_outputs) outer.push_back(v.unpack());
    const Tensors all = layer.unpack();
    ag::variable_list result(outer.size() + all.size());
    bool any = false;
    for (const Tensor& g : grads) any = any || g.defined();
    if (!any) return result;  // nothing came in, nothing goes out
    std::vector<bool> need;
    for (size_t i = 0; i < result.size(); ++i) {
      const bool exists = i >= outer.size() || outer[i].defined();
      need.push_back(exists && task_should_compute_output(i));
    }
    const Tensors computed = reference_double_backward_op().call(
        name_of(layer.kind), as_optional(grads), as_optional(outer), all[0], hx_of(all, layer.states),
        weights_of(all, layer.states), or_none(layer.lengths.unpack()), or_none(layer.reset.unpack()),
        or_none(layer.batch_sizes.unpack()), layer.bidirectional, layer.batch_first, as_mask(mask), groups,
        as_mask(need));
    for (size_t i = 0; i < result.size(); ++i) {
      if (need[i]) result[i] = computed[i];
    }
    return result;
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released = true;
    layer.release();
    for (ag::SavedVariable& v : grad_outputs) v.reset_data();
  }
  std::string name() const override { return "RecurrentLayerBackwardBackward"; }
};

struct LayerBackward : public ag::Node {  // edges: input, hx, weights
  SavedLayer layer;
  ag::SavedVariable output, reserve;
  bool released = false;

  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, ag::ERR_BACKWARD_TWICE);
    const Tensors all = layer.unpack();
    ag::variable_list result(all.size());
    bool any = false;
    for (const Tensor& g : grads) any = any || g.defined();
    if (!any) return result;
    std::vector<bool> mask;
    for (size_t i = 0; i < all.size(); ++i) mask.push_back(task_should_compute_output(i));
    const Tensors computed = backward_op(layer.kind)
                                 .call(as_optional(grads), all[0], hx_of(all, layer.states),
                                       weights_of(all, layer.states), or_none(layer.lengths.unpack()),
                                       or_none(layer.reset.unpack()), or_none(layer.batch_sizes.unpack()),
                                       output.unpack(getptr()), reserve.unpack(), layer.bidirectional,
                                       layer.batch_first, as_mask(mask), 0);
    for (size_t i = 0; i < result.size(); ++i) {
      if (mask[i]) result[i] = computed[i];
    }
    return result;
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released = true;
    layer.release();
    output.reset_data();
    reserve.reset_data();
  }
  std::string name() const override { return "RecurrentLayerBackward"; }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    layer.collect(args);
    args.collect(output, true);
    args.collect(reserve, false);
  }
  ag::variable_list apply_with_saved(const ag::variable_list& grads,
                                     torch::dynamo::autograd::SwapSavedVariables& saved) override {
    layer.each_variable([&](ag::SavedVariable& v) { saved.before(v); });
    saved.before(output);
    saved.before(reserve);
    ag::variable_list result = apply(ag::variable_list(grads));
    layer.each_variable([&](ag::SavedVariable& v) { saved.after(v); });
    saved.after(output);
    saved.after(reserve);
    return result;
  }
};

template <CellKind kind>
Tensors layer_autograd(c10::DispatchKeySet keys, const Tensor& input, TensorList hx, TensorList weights,
                       const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                       bool bidirectional, bool batch_first, bool need_steps, bool need_reserve) {
  if (C10_UNLIKELY(any_has_tangent(input) || any_has_tangent(hx) ||
                   any_has_tangent(weights))) {  // forward-mode AD: by the reference, whose ops know their tangents
    const Layout l = check_layer(kind, input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first);
    Tensors result = reference_op().call(name_of(kind), input, hx, weights, lengths, reset, batch_sizes, bidirectional,
                                         batch_first, need_steps);
    std::vector<c10::SymInt> shape{0};
    if (need_reserve) {  // nothing reads it, but it has to have its shape
      shape = l.by_rows(input, {l.units * l.reserve_columns_in_units(kind)});
      shape.insert(shape.begin(), l.directions);
    }
    result.push_back(at::empty_symint(shape, input.options().dtype(accumulate_type(input))));
    return result;
  }
  const bool requires_grad = any_requires_grad(input) || any_requires_grad(hx) || any_requires_grad(weights);
  Tensors result;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    result = layer_op(kind).redispatch(keys & c10::after_autograd_keyset, input, hx, weights, lengths, reset,
                                       batch_sizes, bidirectional, batch_first, need_steps,
                                       need_reserve || requires_grad);
  }
  if (requires_grad) {
    const Tensors all = differentiable(input, hx, weights);
    auto node = make_node<LayerBackward>();
    node->set_next_edges(ag::collect_next_edges(all));
    node->layer.save(kind, all, hx.size(), lengths, reset, batch_sizes, bidirectional, batch_first);
    for (size_t i = 0; i + 1 < result.size(); ++i) ag::set_history(result[i], node);
    node->output = ag::SavedVariable(result.front(), true);
    node->reserve = ag::SavedVariable(result.back(), false);
  }
  return result;
}

template <CellKind kind>
Tensors backward_autograd(c10::DispatchKeySet keys, const OptionalTensors& grad_outputs, const Tensor& input,
                          TensorList hx, TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset,
                          const OptionalTensor& batch_sizes, const Tensor& output, const Tensor& reserve,
                          bool bidirectional, bool batch_first, const Mask& mask, c10::SymInt groups) {
  const Tensors inputs = differentiable(input, hx, weights);
  Tensors all = defined(grad_outputs);
  const size_t grads = all.size();
  all.insert(all.end(), inputs.begin(), inputs.end());
  if (C10_UNLIKELY(any_has_tangent(all))) {
    return reference_backward_op().call(name_of(kind), grad_outputs, input, hx, weights, lengths, reset, batch_sizes,
                                        bidirectional, batch_first, mask, groups);
  }
  const bool requires_grad = any_requires_grad(all);
  Tensors result;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    result = backward_op(kind).redispatch(keys & c10::after_autograd_keyset, grad_outputs, input, hx, weights, lengths,
                                          reset, batch_sizes, output, reserve, bidirectional, batch_first, mask,
                                          groups);
  }
  if (requires_grad) {
    auto node = make_node<LayerDoubleBackward>();
    node->set_next_edges(ag::collect_next_edges(all));
    node->layer.save(kind, inputs, hx.size(), lengths, reset, batch_sizes, bidirectional, batch_first);
    for (size_t i = 0; i < grads; ++i) node->grad_outputs.emplace_back(all[i], false);
    for (size_t i = 0; i < mask.size(); ++i) node->mask.push_back(mask.get(i));
    node->groups = groups;
    for (Tensor& t : result) ag::set_history(t, node);
  }
  return result;
}

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
  for_each_cell([&]<CellKind kind>() {
    m.impl((std::string(name_of(kind)) + "_layer").c_str(), layer_autograd<kind>);
    m.impl((std::string(name_of(kind)) + "_layer_backward").c_str(), backward_autograd<kind>);
  });
}

template <CellKind kind, c10::DeviceType device, c10::DispatchKey key>
Tensors layer_autocast(const Tensor& input, TensorList hx, TensorList weights, const OptionalTensor& lengths,
                       const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool bidirectional,
                       bool batch_first, bool need_steps, bool need_reserve) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](TensorList tensors) { return at::autocast::cached_cast(type, tensors, device); };
  return layer_op(kind).call(at::autocast::cached_cast(type, input, device), cast(hx), cast(weights), lengths, reset,
                             batch_sizes, bidirectional, batch_first, need_steps, need_reserve);
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCPU, m) {
  for_each_cell([&]<CellKind kind>() {
    m.impl((std::string(name_of(kind)) + "_layer").c_str(),
           layer_autocast<kind, c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  });
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCUDA, m) {
  for_each_cell([&]<CellKind kind>() {
    m.impl((std::string(name_of(kind)) + "_layer").c_str(),
           layer_autocast<kind, c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
  });
}

}  // namespace
}  // namespace fastrnn
