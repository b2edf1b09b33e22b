// Streaming sessions for Python: tensors are checked and copied in and out here, with no dispatcher between. By pybind11
// and not an op: a call of an op costs more than a step of a small layer.
#include "ops/streaming.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <memory>
#include <optional>

#include "cpu/capability.h"
#include "cpu/streaming.h"
#include "ops/checks.h"

namespace fastrnn {
namespace {

// A tensor whose numbers can be read where they lie: no subclass with other semantics, no batch of vmap, no fake, none
// without memory.
const Tensor& plain_tensor(py::handle object, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_Check(object.ptr()), name, " should be a Tensor, got: ", Py_TYPE(object.ptr())->tp_name);
  const Tensor& t = THPVariable_Unpack(object.ptr());
  constexpr c10::DispatchKeySet kNotPlain({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                           c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
                                           c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                           c10::DispatchKey::ZeroTensor});
  TORCH_CHECK_VALUE(t.is_cpu() && t.layout() == at::kStrided && !t.key_set().has_any(kNotPlain), name,
                    " should be a plain tensor on the CPU, got one on ", t.device(), " with the keys ", t.key_set());
  return t;
}

void check_dtype(const Tensor& t, at::ScalarType expected, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, name, " should be of the module's dtype ", expected,
                   ", got: ", t.scalar_type());
}

// Bytes that a tensor reaches, [first, last).
std::pair<const char*, const char*> extent(const Tensor& t) {
  const auto* first = static_cast<const char*>(t.const_data_ptr());
  int64_t last = 1;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return {first, first + last * t.element_size()};
}

void check_out(const Tensor& out, const Tensor& input, at::IntArrayRef shape) {
  check_dtype(out, input.scalar_type(), "out");
  TORCH_CHECK_VALUE(out.sizes() == shape, "out should have the shape ", shape, ", got: ", out.sizes());
  TORCH_CHECK_VALUE(!out.requires_grad(), "out should not require grad: a session records nothing");
  TORCH_CHECK_VALUE(at::has_internal_overlap(out) != at::MemOverlap::Yes,
                    "out should not share memory between its elements");
}

// What is read before anything is written may lie anywhere; of several steps, only where each overwrites itself.
void check_no_partial_overlap(const Tensor& out, const Tensor& input) {
  const auto [a, a_end] = extent(out);
  const auto [b, b_end] = extent(input);
  const bool same = a == b && out.sizes() == input.sizes() && out.strides() == input.strides();
  TORCH_CHECK_VALUE(same || a_end <= b || b_end <= a, "out should be the input itself or share no memory with it");
}

// Where the values of a step, of a row of the batch, of a feature lie: strides in elements.
struct Strides {
  int64_t step, row, feature;
};

// Rows of features to rows of features, converted where the types differ.
template <class From, class To>
void copy_rows(const From* from, Strides a, To* to, Strides b, int64_t rows, int64_t features) {
  for (int64_t n = 0; n < rows; ++n, from += a.row, to += b.row) {
    if (std::is_same_v<From, To> && a.feature == 1 && b.feature == 1) {
      std::memcpy(to, from, features * sizeof(To));
      continue;
    }
    for (int64_t j = 0; j < features; ++j) to[j * b.feature] = static_cast<To>(from[j * a.feature]);
  }
}

// Rows of a matrix of the session's own.
Strides rows_of(int64_t width) { return {0, width, 1}; }

template <class F>
void with_dtype(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    case at::kBFloat16:
      return f(at::BFloat16());
    default:
      return f(at::Half());
  }
}

// The parameters of a stack in the type of a session, checked as an op would; the tensors stay alive in `held`.
template <class T>
std::vector<StreamingWeights<T>> weights_of(CellKind kind, const Tensors& flat, int64_t layers, at::ScalarType dtype,
                                            Tensors& held) {
  TORCH_CHECK_VALUE(layers >= 1 && flat.size() % layers == 0, "Expected as many weights for each of ", layers,
                    " layers, got ", flat.size());
  const size_t per_layer = flat.size() / layers;
  std::vector<StreamingWeights<T>> result;
  for (int64_t i = 0; i < layers; ++i) {
    const TensorList weights = TensorList(flat).slice(i * per_layer, per_layer);
    TORCH_CHECK(weights.empty() || (weights[0].is_cpu() && weights[0].dim() == 2),
                "weights should be matrices on the CPU, got one on ", weights[0].device());
    const Tensor like = at::empty({1, 1, weights[0].size(1)}, at::TensorOptions().dtype(dtype));
    const Layout l = check_layer(kind, like, {}, weights, {}, {}, {}, false, false);
    const auto data = [&](bool exists, int index) -> const T* {
      if (!exists) return nullptr;
      held.push_back(weights[index].detach().resolve_neg().to(c10::CppTypeToScalarType<T>::value).contiguous());
      return held.back().const_data_ptr<T>();
    };
    StreamingWeights<T> w;
    w.shape = {l.inputs.expect_int(), l.units.expect_int(), l.outputs.expect_int(), l.projected};
    w.w_ih = data(true, l.w_ih(0));
    w.w_hh = data(true, l.w_hh(0));
    w.b_ih = data(l.biases, l.b_ih(0));
    w.b_hh = data(l.biases, l.b_hh(0));
    w.w_hr = data(l.projected, l.w_hr(0));
    result.push_back(w);
  }
  return result;
}

// What Python sees, whatever the type: `dtype` is the module's; 16-bit ones compute in float.
class PySession {
 public:
  virtual ~PySession() = default;
  virtual py::object step(py::handle x, py::handle out) = 0;
  virtual py::object chunk(py::handle x, py::handle out) = 0;
  virtual std::vector<Tensor> state() = 0;
  virtual void set_state(const Tensors& states) = 0;
  virtual void reset(py::handle mask) = 0;
  virtual void refresh(const Tensors& weights) = 0;
  virtual int64_t packed_bytes() const = 0;
};

template <class T>
class TypedSession : public PySession {
 public:
  TypedSession(CellKind kind, const Tensors& weights, int64_t layers, int64_t batch, WeightType type,
               at::ScalarType dtype, bool batch_first)
      : kind_(kind), dtype_(dtype), batch_first_(batch_first) {
    Tensors held;
    session_.emplace(kind, weights_of<T>(kind, weights, layers, dtype, held), batch, type);
    for (int64_t l = 1; l < layers; ++l) {  // their states are one tensor
      const LayerShape &first = session_->shape(0), &shape = session_->shape(l);
      TORCH_CHECK_VALUE(shape.units == first.units && shape.outputs == first.outputs,
                        "the layers should be of one size, got: ", first.units, " and ", shape.units, " units, ",
                        first.outputs, " and ", shape.outputs, " outputs");
    }
  }

  py::object step(py::handle x, py::handle out) override {
    const Tensor& input = plain_tensor(x, "x");
    const int64_t dim = input.dim(), batch = session_->batch(), inputs = session_->inputs();
    if (C10_UNLIKELY(!(dim == 2 && input.size(0) == batch && input.size(1) == inputs) &&
                     !(dim == 1 && batch == 1 && input.size(0) == inputs))) {
      TORCH_CHECK_VALUE(false, "x should have the shape ", batch == 1 ? "(I,) or " : "", "(N, I) = (", batch, ", ",
                        inputs, "), got: ", input.sizes());
    }
    const int64_t sizes[2] = {batch, session_->outputs()};
    return run(input, out, at::IntArrayRef(sizes + 2 - dim, dim), 1, false);
  }

  py::object chunk(py::handle x, py::handle out) override {
    const Tensor& input = plain_tensor(x, "x");
    const int64_t dim = input.dim(), batch = session_->batch(), inputs = session_->inputs();
    const bool unbatched = dim == 2 && batch == 1;
    const int time = dim == 3 && batch_first_ ? 1 : 0;
    TORCH_CHECK_VALUE((dim == 3 && input.size(1 - time) == batch && input.size(2) == inputs) ||
                          (unbatched && input.size(1) == inputs),
                      "x should have the shape ", batch == 1 ? "(T, I) or " : "",
                      batch_first_ ? "(N, T, I)" : "(T, N, I)", " with N = ", batch, " and I = ", inputs,
                      ", got: ", input.sizes());
    const int64_t steps = input.size(time), outputs = session_->outputs();
    TORCH_CHECK_VALUE(steps > 0, "x should have at least one step, got: ", input.sizes());
    int64_t sizes[3] = {time == 0 ? steps : batch, time == 0 ? batch : steps, outputs};
    if (unbatched) sizes[1] = outputs;
    return run(input, out, at::IntArrayRef(sizes, dim), steps, true);
  }

  std::vector<Tensor> state() override {
    const InUse guard(in_use_);
    std::vector<Tensor> result;
    for (int which = 0; which < traits(kind_).states; ++which) {
      const int64_t width = state_width(which), depth = session_->depth(), batch = session_->batch();
      Tensor t = at::detail::empty_cpu({depth, batch, width}, c10::CppTypeToScalarType<T>::value);
      for (int64_t l = 0; l < depth; ++l) {
        copy_rows(state_of(which, l), rows_of(padded(width)), t.mutable_data_ptr<T>() + l * batch * width,
                  rows_of(width), batch, width);
      }
      result.push_back(t);
    }
    return result;
  }

  void set_state(const Tensors& states) override {
    const InUse guard(in_use_);
    const int64_t depth = session_->depth(), batch = session_->batch();
    TORCH_CHECK_VALUE(static_cast<int>(states.size()) == traits(kind_).states, "state should be ", traits(kind_).states,
                      " tensors, got: ", states.size());
    Tensors converted;
    for (size_t which = 0; which < states.size(); ++which) {  // all are checked before any is taken over
      const Tensor& t = states[which];
      const int64_t shape[] = {depth, batch, state_width(which)};
      TORCH_CHECK_VALUE(t.is_cpu() && t.sizes() == at::IntArrayRef(shape), "state[", which,
                        "] should be a tensor on the CPU of the shape ", at::IntArrayRef(shape), ", got: ", t.sizes(),
                        " on ", t.device());
      constexpr auto type = c10::CppTypeToScalarType<T>::value;
      TORCH_CHECK_TYPE(t.scalar_type() == dtype_ || t.scalar_type() == type, "state[", which, "] should be of dtype ",
                       dtype_, dtype_ == type ? "" : " or float32", ", got: ", t.scalar_type());
      converted.push_back(t.detach().resolve_neg().to(type).contiguous());
    }
    for (size_t which = 0; which < states.size(); ++which) {
      const int64_t width = state_width(which);
      for (int64_t l = 0; l < depth; ++l) {
        copy_rows(converted[which].const_data_ptr<T>() + l * batch * width, rows_of(width), state_of(which, l),
                  rows_of(padded(width)), batch, width);
      }
    }
  }

  void reset(py::handle mask) override {
    const InUse guard(in_use_);
    if (mask.is_none()) return session_->reset();
    const Tensor& rows = plain_tensor(mask, "mask");
    TORCH_CHECK_TYPE(rows.scalar_type() == at::kBool, "mask should be a Tensor of bool, got: ", rows.scalar_type());
    TORCH_CHECK_VALUE(rows.dim() == 1 && rows.size(0) == session_->batch(), "mask should have the shape (N,) = (",
                      session_->batch(), ",), got: ", rows.sizes());
    const bool* row = rows.const_data_ptr<bool>();
    for (int64_t n = 0; n < session_->batch(); ++n) {
      if (row[n * rows.stride(0)]) session_->reset_row(n);
    }
  }

  void refresh(const Tensors& weights) override {
    const InUse guard(in_use_);
    Tensors held;
    session_->refresh(weights_of<T>(kind_, weights, session_->depth(), dtype_, held));
  }

  int64_t packed_bytes() const override { return session_->packed_bytes(); }

 private:
  // A session has one state: a second thread in it would be an error, and not one that shows.
  class InUse {
   public:
    explicit InUse(std::atomic_flag& flag) : flag_(flag) {
      TORCH_CHECK(!flag.test_and_set(std::memory_order_acquire), "a session is used by one thread at a time");
    }
    ~InUse() { flag_.clear(std::memory_order_release); }
    InUse(const InUse&) = delete;
    InUse& operator=(const InUse&) = delete;

   private:
    std::atomic_flag& flag_;
  };

  // The layers are alike: the constructor has checked it.
  int64_t state_width(size_t which) const { return which == 0 ? session_->outputs() : session_->shape(0).units; }
  T* state_of(size_t which, int64_t layer) { return which == 0 ? session_->h(layer) : session_->c(layer); }

  // Of a step [I] or [N, I], or of a chunk [T, I], [T, N, I] or [N, T, I]; the output is laid out alike.
  Strides strides_of(const Tensor& t, bool chunk) const {
    const int64_t dim = t.dim(), feature = t.stride(dim - 1);
    if (!chunk) return {0, dim == 2 ? t.stride(0) : 0, feature};
    if (dim == 2) return {t.stride(0), 0, feature};
    return {t.stride(batch_first_ ? 1 : 0), t.stride(batch_first_ ? 0 : 1), feature};
  }

  // `shape` is the output's.
  py::object run(const Tensor& input, py::handle given, at::IntArrayRef shape, int64_t steps, bool chunk) {
    check_dtype(input, dtype_, "x");
    const InUse guard(in_use_);
    const bool fresh = given.is_none();
    const Tensor out = fresh ? Tensor(at::detail::empty_cpu(shape, dtype_)) : plain_tensor(given, "out");
    if (!fresh) {
      check_out(out, input, shape);
      if (chunk) check_no_partial_overlap(out, input);
      out.unsafeGetTensorImpl()->bump_version();
    }
    with_dtype(dtype_, [&](auto zero) {
      using Storage = decltype(zero);
      const auto* from = input.const_data_ptr<Storage>();
      auto* to = out.mutable_data_ptr<Storage>();
      if (steps * session_->packed_bytes() > kBytesWorthTheLock) {
        const py::gil_scoped_release release;
        advance(from, strides_of(input, chunk), to, strides_of(out, chunk), steps);
      } else {
        advance(from, strides_of(input, chunk), to, strides_of(out, chunk), steps);
      }
    });
    if (!fresh) return py::reinterpret_borrow<py::object>(given);
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(out));
  }

  template <class Storage>
  void advance(const Storage* from, Strides a, Storage* to, Strides b, int64_t steps) {
    const int64_t batch = session_->batch(), inputs = session_->inputs(), outputs = session_->outputs();
    const int64_t of_input = batch * padded(inputs), of_output = batch * padded(outputs);  // a step
    if constexpr (std::is_same_v<Storage, T>) {
      const auto plain = [&](Strides of, int64_t width) {
        return of.feature == 1 && (batch == 1 || of.row == width) && (steps == 1 || of.step == batch * width);
      };
      if (plain(a, inputs) && plain(b, outputs)) return session_->chunk(from, to, steps);
    }
    const auto read = [&](int64_t t, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        copy_rows(from + (t + i) * a.step, a, session_->input() + i * of_input, rows_of(padded(inputs)), batch, inputs);
      }
      return session_->input();
    };
    const auto write = [&](int64_t t, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        copy_rows(session_->output() + i * of_output, rows_of(padded(outputs)), to + (t + i) * b.step, b, batch,
                  outputs);
      }
    };
    session_->chunk(steps, read, write);
  }

  static constexpr int64_t kBytesWorthTheLock = 1 << 20;  // to let other Python threads run costs some 100 ns

  CellKind kind_;
  at::ScalarType dtype_;
  bool batch_first_;
  std::optional<StreamingSession<T>> session_;
  std::atomic_flag in_use_;
};

WeightType weight_type_of(const std::string& name) {
  if (name == "bfloat16") return WeightType::kBfloat16;
  if (name == "int8") return WeightType::kInt8;
  return WeightType::kFull;
}

std::unique_ptr<PySession> make_session(const std::string& cell, const Tensors& weights, int64_t layers, int64_t batch,
                                        const std::string& weight_type, bool batch_first) {
  TORCH_CHECK_VALUE(!weights.empty(), "a session needs weights");
  const at::ScalarType dtype = weights[0].scalar_type();
  const CellKind kind = kind_of(cell);
  const WeightType type = weight_type_of(weight_type);
  if (dtype == at::kDouble) {
    return std::make_unique<TypedSession<double>>(kind, weights, layers, batch, type, dtype, batch_first);
  }
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "a session needs weights of float32, float64, bfloat16 or float16, got: ", dtype);
  return std::make_unique<TypedSession<float>>(kind, weights, layers, batch, type, dtype, batch_first);
}

}  // namespace

void bind_streaming(py::module_& m) {
  // torch registers the like, but for modules that were built with its own version of pybind11
  py::register_local_exception_translator([](std::exception_ptr exception) {
    try {
      if (exception) std::rethrow_exception(exception);
    } catch (const c10::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
    } catch (const c10::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });
  m.def("has_int8_dot", &has_int8_dot);
  py::class_<PySession>(m, "StreamingSession")
      .def(py::init(&make_session), py::arg("cell"), py::arg("weights"), py::arg("num_layers"), py::arg("batch_size"),
           py::arg("weight_type"), py::arg("batch_first"))
      .def("step", &PySession::step, py::arg("x"), py::arg("out"))
      .def("chunk", &PySession::chunk, py::arg("x"), py::arg("out"))
      .def("state", &PySession::state)
      .def("set_state", &PySession::set_state)
      .def("reset", &PySession::reset)
      .def("refresh", &PySession::refresh)
      .def("packed_bytes", &PySession::packed_bytes);
}

}  // namespace fastrnn
