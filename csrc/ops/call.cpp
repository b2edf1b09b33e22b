// A short way from Python to the ops of the layers. That of torch.ops matches the arguments with a schema, boxes each and
// unboxes the results, which takes longer than a small layer; this one reads them off their positions. Both end in the
// dispatcher, with autograd, autocast and transforms; layers beside one another, which want nothing of those, do not.
#include "ops/call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops/cpu_stack.h"
#include "ops/ops.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

// Does anyone want to see calls of torch.ops: a trace, or a mode of __torch_function__ or __torch_dispatch__?
bool watched() {
  constexpr c10::DispatchKeySet kWatching(
      {c10::DispatchKey::Tracer, c10::DispatchKey::Python, c10::DispatchKey::PreDispatch});
  return at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_local_dispatch_key_set().included_.has_any(kWatching);
}

// An argument as the op takes it; false if it is for torch.ops: subclasses of Tensor may have a __torch_function__, and
// what is no tensor is refused there.
bool read(py::handle object, Tensor& to) {
  if (!THPVariable_CheckExact(object.ptr())) return false;
  to = THPVariable_Unpack(object.ptr());
  return true;
}
bool read(py::handle object, OptionalTensor& to) { return object.is_none() || read(object, to.emplace()); }
bool read(py::handle object, Tensors& to) {
  if (!PyList_CheckExact(object.ptr()) && !PyTuple_CheckExact(object.ptr())) return false;
  const auto count = PySequence_Fast_GET_SIZE(object.ptr());
  to.resize(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read(PySequence_Fast_GET_ITEM(object.ptr(), i), to[i])) return false;
  }
  return true;
}

struct Arguments {
  Tensor input;
  Tensors hx, weights;
  OptionalTensor lengths, reset, batch_sizes;

  // False if the call has to go by torch.ops.
  bool read_input(py::handle x) { return !watched() && read(x, input); }
  bool read_others(py::handle states, py::handle w, py::handle l, py::handle r, py::handle b) {
    return read(states, hx) && read(w, weights) && read(l, lengths) && read(r, reset) && read(b, batch_sizes);
  }
};

// The results but for the reserve, or None where the call has to go by torch.ops.
template <CellKind kind>
std::optional<Tensors> layer(py::handle input, py::handle hx, py::handle weights, py::handle lengths, py::handle reset,
                             py::handle batch_sizes, bool bidirectional, bool batch_first, bool need_steps) {
  Arguments a;
  if (!a.read_input(input) || !a.read_others(hx, weights, lengths, reset, batch_sizes)) return std::nullopt;
  py::gil_scoped_release no_gil;
  Tensors results = layer_op(kind).call(a.input, a.hx, a.weights, a.lengths, a.reset, a.batch_sizes, bidirectional,
                                        batch_first, need_steps, /*need_reserve=*/false);
  results.pop_back();
  return results;
}

// A layer's only step: [N, *] for [1, N, *], and the states alone, or None where the call has to go by torch.ops. What
// returns are no views, which could not be changed in place.
template <CellKind kind>
std::optional<Tensors> cell(py::handle input, py::handle hx, py::handle weights) {
  Arguments a;
  if (!a.read_input(input) || !a.read_others(hx, weights, py::none(), py::none(), py::none())) return std::nullopt;
  py::gil_scoped_release no_gil;
  for (Tensor& state : a.hx) state = state.unsqueeze(0);
  const Tensors results = layer_op(kind).call(a.input.unsqueeze(0), a.hx, a.weights, {}, {}, {}, false, false, false,
                                              /*need_reserve=*/false);
  Tensors states;
  for (int s = 0; s < traits(kind).states; ++s) {
    const Tensor& state = results[1 + s];
    states.push_back(at::_unsafe_view_symint(state, state.sym_sizes().slice(1)));
  }
  return states;
}

// All layers of a stack at once, or None where they have to be called one after another.
template <CellKind kind>
std::optional<Tensors> stack(int64_t layers, py::handle input, py::handle hx, py::handle weights, py::handle lengths,
                             py::handle reset, py::handle batch_sizes, bool batch_first) {
  Arguments a;
  if (!a.read_input(input) || !may_run_side_by_side(layers, a.input, batch_first) ||
      !a.read_others(hx, weights, lengths, reset, batch_sizes)) {
    return std::nullopt;
  }
  py::gil_scoped_release no_gil;
  return layers_side_by_side(kind, layers, a.input, a.hx, a.weights, a.lengths, a.reset, a.batch_sizes, batch_first);
}

template <class Function>
void bind(py::dict& by_cell, CellKind kind, Function* function) {
  by_cell[name_of(kind)] = py::cpp_function(torch::wrap_pybind_function(function), py::name(name_of(kind)));
}

}  // namespace

void bind_layers(py::module_& m) {
  py::dict layers, cells, stacks;
  for_each_cell([&]<CellKind kind>() {
    bind(layers, kind, layer<kind>);
    bind(cells, kind, cell<kind>);
    bind(stacks, kind, stack<kind>);
  });
  m.def("watched", &watched);
  m.attr("layers") = layers;
  m.attr("cells") = cells;
  m.attr("stacks") = stacks;
}

}  // namespace fastrnn
