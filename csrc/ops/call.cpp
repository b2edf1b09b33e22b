// A short way from Python to the ops of the layers. That of torch.ops matches the arguments with a schema, boxes each and
// unboxes the results, which takes longer than a small layer; this one reads them off their positions. Both end in the
// dispatcher, with autograd, autocast and transforms.
#include "ops/call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

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

// The results but for the reserve, or None where the call has to go by torch.ops.
template <CellKind kind>
std::optional<Tensors> layer(py::handle input, py::handle hx, py::handle weights, py::handle lengths, py::handle reset,
                             py::handle batch_sizes, bool bidirectional, bool batch_first, bool need_steps) {
  Tensor x;
  Tensors states, w;
  OptionalTensor rows[3];
  const bool plain = !watched() && read(input, x) && read(hx, states) && read(weights, w) && read(lengths, rows[0]) &&
                     read(reset, rows[1]) && read(batch_sizes, rows[2]);
  if (!plain) return std::nullopt;
  py::gil_scoped_release no_gil;
  Tensors results = layer_op(kind).call(x, states, w, rows[0], rows[1], rows[2], bidirectional, batch_first, need_steps,
                                        /*need_reserve=*/false);
  results.pop_back();
  return results;
}

}  // namespace

void bind_layers(py::module_& m) {
  py::dict layers;
  for_each_cell([&]<CellKind kind>() {
    layers[name_of(kind)] = py::cpp_function(torch::wrap_pybind_function(layer<kind>), py::name(name_of(kind)));
  });
  m.attr("layers") = layers;
}

}  // namespace fastrnn
