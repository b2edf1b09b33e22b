// The ops on the CPU: tensors to params, allocation, and the GEMMs around the scan.
#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <pthread.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

#include "ops/checks.h"
#include "ops/rows.h"

namespace fastrnn {
namespace {

// Threads of OpenMP do not survive a fork: a child that calls them would wait forever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

CpuMachine machine() {
  const bool serial = at::in_parallel_region() || forked;
  return {serial ? 1 : at::get_num_threads(), l2_cache_bytes()};
}

// The integers of a layout; tensors with data have no symbolic sizes.
struct Sizes {
  int64_t steps, batch, inputs, units, outputs;
  explicit Sizes(const Layout& l)
      : steps(l.steps.expect_int()),
        batch(l.batch.expect_int()),
        inputs(l.inputs.expect_int()),
        units(l.units.expect_int()),
        outputs(l.outputs.expect_int()) {}
};

Scan make_scan(CellKind kind, const Layout& l, const Sizes& z, const RowTable& table, int element_size, bool backward) {
  Scan scan{kind, {z.inputs, z.units, z.outputs, l.projected}, table.rows(), {}, l.directions};
  const CpuProblem problem{traits(kind).gates, z.steps,      z.batch,        scan.shape,
                           l.directions,       element_size, table.ragged(), backward};
  scan.plan = plan_cpu(problem, machine());
  return scan;
}

template <class T>
const T* data(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.const_data_ptr<T>() : nullptr;
}

// Slice d of a tensor whose first dimension is the direction; null stays null.
template <class T>
auto direction(T* p, int d, int64_t stride) {
  return p == nullptr ? nullptr : p + d * stride;
}

Tensors contiguous(TensorList tensors, at::ScalarType type) {
  Tensors result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(t.to(type).contiguous());
  return result;
}

template <class T>
Tensors forward(CellKind kind, const Layout& l, const Tensor& input, const Tensors& hx, const Tensors& weights,
                const RowTable& table, bool need_steps, bool need_reserve) {
  const CellTraits& cell = traits(kind);
  const Sizes z(l);
  const auto options = input.options();
  Scan scan = make_scan(kind, l, z, table, sizeof(T), false);
  const bool projects = scan.plan.recurrent == Recurrent::kNatural || scan.plan.fused_input;
  const int64_t directions = l.directions, total = table.total();

  const auto by_rows = [&](int64_t last) {
    std::vector<int64_t> shape = input.sizes().vec();
    shape.back() = last;
    return shape;
  };
  const auto allocate = [&](int64_t columns) {
    return table.ragged() && !l.packed ? at::zeros(by_rows(columns), options) : at::empty(by_rows(columns), options);
  };
  Tensors result;
  result.push_back(allocate(directions * z.outputs));
  result.push_back(at::empty({directions, z.batch, z.outputs}, options));
  const bool has_cell = cell.states > 1;
  if (has_cell) result.push_back(at::empty({directions, z.batch, z.units}, options));
  if (has_cell && need_steps) result.push_back(allocate(directions * z.units));

  // The input projection's buffer is the reserve: its first G columns, in units of H, turn into the activated gates.
  // Where the scan multiplies the input itself, and nothing is saved, there is no buffer.
  const int64_t columns = z.units * (need_reserve ? l.reserve_columns_in_units(kind) : cell.gates);
  std::vector<int64_t> gates_shape = by_rows(columns);
  gates_shape.insert(gates_shape.begin(), directions);
  if (projects && !need_reserve) gates_shape.assign({0});
  Tensor gates = at::empty(gates_shape, options);
  if (need_reserve && table.ragged() && !l.packed) gates.zero_();

  const Tensor x = input.reshape({total, z.inputs});
  const int64_t bias_width = (cell.gates + cell.separate) * z.units;
  const Tensor bias = at::empty({directions, bias_width}, options);
  ForwardParams<T> params[2];
  Tensor products[2];
  for (int d = 0; d < l.directions; ++d) {
    ForwardParams<T>& p = params[d];
    p.reverse = d == 1;
    p.w_hh = data<T>(weights[l.w_hh(d)]);
    if (l.projected) p.w_hr = data<T>(weights[l.w_hr(d)]);
    T* direction_bias = bias.mutable_data_ptr<T>() + d * bias_width;
    sum_biases(cell.gates, cell.separate, z.units, l.biases ? weights[l.b_ih(d)].const_data_ptr<T>() : nullptr,
               l.biases ? weights[l.b_hh(d)].const_data_ptr<T>() : nullptr, direction_bias);
    p.bias = direction_bias;
    if (!hx.empty()) p.h0 = direction(data<T>(hx[0]), d, z.batch * z.outputs);
    if (hx.size() > 1) p.c0 = direction(data<T>(hx[1]), d, z.batch * z.units);
    if (gates.numel() > 0) p.gates = gates.mutable_data_ptr<T>() + d * total * columns;
    p.gates_stride = columns;
    p.save = need_reserve;
    p.output = result[0].mutable_data_ptr<T>() + d * z.outputs;
    p.output_stride = directions * z.outputs;
    p.h_n = result[1].mutable_data_ptr<T>() + d * z.batch * z.outputs;
    if (has_cell) p.c_n = result[2].mutable_data_ptr<T>() + d * z.batch * z.units;
    if (has_cell && need_steps) {
      p.cells = result[3].mutable_data_ptr<T>() + d * z.units;
      p.cells_stride = directions * z.units;
    }
    if (projects) {
      p.w_ih = data<T>(weights[l.w_ih(d)]);
      p.input = data<T>(x);
    } else if (total > 0) {
      Tensor projection = gates.select(0, d).view({total, columns}).narrow(1, 0, cell.gates * z.units);
      at::mm_out(projection, x, weights[l.w_ih(d)].t());
      if (scan.plan.recurrent == Recurrent::kProduct && p.h0 != nullptr) {
        products[d] = at::mm(hx[0].select(0, d), weights[l.w_hh(d)].t());
        p.product = data<T>(products[d]);
      }
    }
  }

  const auto& kernels = cpu_kernels().get<T>(kind);
  const Tensor scratch = at::empty({kernels.forward_scratch(scan)}, options.dtype(at::kByte));
  kernels.forward(scan, params, scratch.mutable_data_ptr());
  result.push_back(need_reserve ? gates : at::empty({0}, options));
  return result;
}

// The h that entered each step, [rows, outputs]: the output of the step before, the initial state, or zeros.
template <class T>
Tensor previous_outputs(const Rows& rows, int64_t total, const Tensor& output, int d, const Tensor& h0, int64_t width) {
  Tensor previous = at::zeros({total, width}, output.options());
  T* to = previous.mutable_data_ptr<T>();
  const bool reverse = d == 1;
  const int64_t stride = output.size(-1);
  const T* from = output.const_data_ptr<T>() + d * width;
  const T* initial = data<T>(h0);
  constexpr int64_t kElementsWorthAThread = 32768;
  const int64_t grain = std::max<int64_t>(1, kElementsWorthAThread / std::max<int64_t>(1, rows.batch * width));
  const auto copy_steps = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < rows.active[t]; ++i) {
        const int64_t n = rows.order[i];
        const T* source = rows.flows(t, n, reverse) ? from + rows.row(reverse ? t + 1 : t - 1, n) * stride
                          : rows.enters(t, n, reverse) && initial != nullptr ? initial + n * width
                                                                             : nullptr;
        if (source != nullptr) std::memcpy(to + rows.row(t, n) * width, source, width * sizeof(T));
      }
    }
  };
  if (machine().threads == 1) {
    copy_steps(0, rows.steps);
  } else {
    at::parallel_for(0, rows.steps, grain, copy_steps);
  }
  return previous;
}

// Weight gradients: a product over all rows, or over the rows of each of `groups` blocks of the batch.
class Reduction {
 public:
  Reduction(const Sizes& z, bool batch_first, int64_t groups) : z_(z), batch_first_(batch_first), groups_(groups) {}

  bool by_groups() const { return groups_ > 0; }

  // grad^T x: [rows, A], [rows, B] -> [A, B] or [groups, A, B]
  Tensor outer(const Tensor& grad, const Tensor& x) const {
    if (groups_ == 0) return at::mm(grad.t(), x);
    return at::bmm(grouped(grad).transpose(1, 2), grouped(x));
  }
  // [rows, A] -> [A] or [groups, A]
  Tensor sum(const Tensor& grad) const { return groups_ == 0 ? grad.sum(0) : grouped(grad).sum(1); }

 private:
  Tensor grouped(const Tensor& t) const {
    const int64_t rows = z_.batch / groups_;
    if (batch_first_) return t.reshape({groups_, rows * z_.steps, t.size(1)});
    return t.reshape({z_.steps, groups_, rows, t.size(1)})
        .transpose(0, 1)
        .reshape({groups_, z_.steps * rows, t.size(1)});
  }
  const Sizes& z_;
  bool batch_first_;
  int64_t groups_;
};

// One direction of the backward pass after its scan: everything that is a GEMM or a sum.
struct DirectionGradients {
  const CellTraits& cell;
  const Sizes& z;
  Tensor grad_gates;      // [rows, (G+S)*H]
  Tensor previous;        // [rows, outputs]
  Tensor grad_projected;  // [rows, P]
  Tensor activation;      // [rows, H] projected only

  Tensor input_gates() const { return grad_gates.narrow(1, 0, cell.gates * z.units); }
  // The recurrent gates are these two: the separate ones have theirs behind those of the gates.
  int64_t adding() const { return (cell.gates - cell.separate) * z.units; }
  Tensor adding_gates() const { return grad_gates.narrow(1, 0, adding()); }
  Tensor separate_gates() const { return grad_gates.narrow(1, cell.gates * z.units, cell.separate * z.units); }

  Tensor grad_w_hh(const Reduction& reduction) const {
    if (cell.separate == 0) return reduction.outer(grad_gates, previous);
    if (reduction.by_groups()) {
      return at::cat({reduction.outer(adding_gates(), previous), reduction.outer(separate_gates(), previous)}, 1);
    }
    // the same without putting the two parts together afterwards: for one step that copy costs as much as the product
    Tensor whole = at::empty({cell.gates * z.units, z.outputs}, grad_gates.options());
    Tensor first = whole.narrow(0, 0, adding()), last = whole.narrow(0, adding(), cell.separate * z.units);
    at::mm_out(first, adding_gates().t(), previous);
    at::mm_out(last, separate_gates().t(), previous);
    return whole;
  }

  Tensor grad_b_hh(const Reduction& reduction) const {
    if (cell.separate == 0) return reduction.sum(grad_gates);
    return at::cat({reduction.sum(adding_gates()), reduction.sum(separate_gates())}, -1);
  }
};

template <class T>
Tensors backward(CellKind kind, const Layout& l, const OptionalTensors& grad_outputs, const Tensor& input,
                 const Tensors& hx, const Tensors& weights, const RowTable& table, const Tensor& output,
                 const Tensor& reserve, bool batch_first, const Mask& mask, int64_t groups) {
  const CellTraits& cell = traits(kind);
  const Sizes z(l);
  const auto options = input.options();
  const auto type = input.scalar_type();
  const Rows& rows = table.rows();
  const int64_t total = table.total(), directions = l.directions;
  const Scan scan = make_scan(kind, l, z, table, sizeof(T), true);

  Tensors result(1 + hx.size() + weights.size());
  const size_t first_weight = 1 + hx.size();
  const auto wants_weight = [&](int index) { return mask.get(first_weight + index); };
  bool wants_hx = false;
  for (size_t s = 0; s < hx.size(); ++s) wants_hx = wants_hx || mask.get(1 + s);

  Tensors grads;
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    const Tensor g = or_undefined(grad_outputs.get(i));
    grads.push_back(g.defined() ? g.to(type).contiguous() : g);
  }
  const bool has_cell = cell.states > 1;
  const bool has_steps = grads.size() > static_cast<size_t>(1 + cell.states);

  const int64_t gate_columns = (cell.gates + cell.separate) * z.units;
  const int64_t reserve_columns = reserve.size(-1);
  const std::optional<Tensor> valid = table.valid_rows();
  BackwardParams<T> params[2];
  std::vector<DirectionGradients> each;
  const Tensor carry = at::zeros({directions, z.batch, z.units}, options);
  const Tensor grad_first = wants_hx ? at::empty({directions, z.batch, cell.gates * z.units}, options) : Tensor();
  for (int d = 0; d < l.directions; ++d) {
    DirectionGradients g{cell, z, {}, {}, {}, {}};
    // groups reduce over every row, so those that the scan does not visit have to be zero
    g.grad_gates = valid && groups > 0 ? at::zeros({total, gate_columns}, options)
                                       : at::empty({total, gate_columns}, options);
    if (l.projected) {
      g.grad_projected = valid && groups > 0 ? at::zeros({total, z.outputs}, options)
                                             : at::empty({total, z.outputs}, options);
      g.activation = reserve.select(0, d).view({total, reserve_columns}).narrow(1, cell.saved * z.units, z.units);
    }
    if (cell.carries_h || wants_weight(l.w_hh(d))) {
      g.previous = previous_outputs<T>(rows, total, output, d, hx.empty() ? Tensor() : hx[0].select(0, d), z.outputs);
    }
    BackwardParams<T>& p = params[d];
    p.reverse = d == 1;
    p.w_hh = data<T>(weights[l.w_hh(d)]);
    if (l.projected) p.w_hr = data<T>(weights[l.w_hr(d)]);
    p.reserve = direction(data<T>(reserve), d, total * reserve_columns);
    p.reserve_stride = reserve_columns;
    p.previous_h = data<T>(g.previous);
    if (hx.size() > 1) p.c0 = direction(data<T>(hx[1]), d, z.batch * z.units);
    p.grad_output = direction(data<T>(grads[0]), d, z.outputs);
    p.grad_output_stride = directions * z.outputs;
    p.grad_h_n = direction(data<T>(grads[1]), d, z.batch * z.outputs);
    if (has_cell) p.grad_c_n = direction(data<T>(grads[2]), d, z.batch * z.units);
    if (has_steps) {
      p.grad_cells = direction(data<T>(grads[3]), d, z.units);
      p.grad_cells_stride = directions * z.units;
    }
    p.grad_gates = g.grad_gates.mutable_data_ptr<T>();
    if (l.projected) p.grad_projected = g.grad_projected.mutable_data_ptr<T>();
    p.carry = carry.mutable_data_ptr<T>() + d * z.batch * z.units;
    if (wants_hx) p.grad_first = grad_first.mutable_data_ptr<T>() + d * z.batch * cell.gates * z.units;
    each.push_back(std::move(g));
  }
  const auto& kernels = cpu_kernels().get<T>(kind);
  {
    const Tensor scratch = at::empty({kernels.backward_scratch(scan)}, options.dtype(at::kByte));
    kernels.backward(scan, params, scratch.mutable_data_ptr());
  }

  // Rows beyond a length: gathered away, so that nothing of them, NaN included, enters a product.
  Tensor x = input.reshape({total, z.inputs});
  if (valid) {
    const auto clean = [&](const Tensor& t) {
      if (!t.defined()) return t;
      const Tensor kept = t.index_select(0, *valid);
      return groups == 0 ? kept : at::zeros_like(t).index_copy_(0, *valid, kept);
    };
    x = clean(x);
    for (DirectionGradients& g : each) {
      g.grad_gates = clean(g.grad_gates);
      g.previous = clean(g.previous);
      g.grad_projected = clean(g.grad_projected);
      g.activation = clean(g.activation);
    }
  }

  const Reduction reduction(z, batch_first, groups);
  Tensor grad_x;
  for (int d = 0; d < l.directions; ++d) {
    const DirectionGradients& g = each[d];
    const auto put = [&](int index, const Tensor& value) { result[first_weight + index] = value; };
    if (mask.get(0)) {
      grad_x = d == 0 ? at::mm(g.input_gates(), weights[l.w_ih(d)])
                      : grad_x.addmm_(g.input_gates(), weights[l.w_ih(d)]);
    }
    if (wants_weight(l.w_ih(d))) put(l.w_ih(d), reduction.outer(g.input_gates(), x));
    if (wants_weight(l.w_hh(d))) put(l.w_hh(d), g.grad_w_hh(reduction));
    if (l.biases && wants_weight(l.b_ih(d))) put(l.b_ih(d), reduction.sum(g.input_gates()));
    if (l.biases && wants_weight(l.b_hh(d))) {
      const bool same = cell.separate == 0 && wants_weight(l.b_ih(d));
      put(l.b_hh(d), same ? result[first_weight + l.b_ih(d)].clone() : g.grad_b_hh(reduction));
    }
    if (l.projected && wants_weight(l.w_hr(d))) put(l.w_hr(d), reduction.outer(g.grad_projected, g.activation));
  }
  if (mask.get(0)) {
    if (valid && groups == 0) grad_x = at::zeros({total, z.inputs}, options).index_copy_(0, *valid, grad_x);
    result[0] = grad_x.view(input.sizes());
  }
  if (wants_hx && mask.get(1)) {
    Tensor grad_h0 = at::empty({directions, z.batch, z.outputs}, options);
    for (int d = 0; d < l.directions; ++d) {
      Tensor slice = grad_h0.select(0, d);
      at::mm_out(slice, grad_first.select(0, d), weights[l.w_hh(d)]);
    }
    if (cell.carries_h) grad_h0.add_(carry);
    if (valid && grads[1].defined()) {  // a row without steps hands its initial state through
      for (int64_t n = 0; n < z.batch; ++n) {
        if (rows.length[n] == 0) grad_h0.select(1, n).copy_(grads[1].select(1, n));
      }
    }
    result[1] = grad_h0;
  }
  if (wants_hx && has_cell && mask.get(2)) result[2] = carry;
  return result;
}

template <class F>
auto with_type(const Tensor& input, const F& f) {
  switch (input.scalar_type()) {
    case at::kDouble:
      return f(double());
    case at::kFloat:
    case at::kBFloat16:  // 16-bit storage has its states, gates and sums in float32
    case at::kHalf:
      return f(float());
    default:
      TORCH_CHECK(false, "Expected float64, float32, bfloat16 or float16, got ", input.scalar_type());
  }
}

template <CellKind kind>
Tensors layer(const Tensor& input, TensorList hx, TensorList weights, const OptionalTensor& lengths,
              const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool bidirectional, bool batch_first,
              bool need_steps, bool need_reserve) {
  const Layout l = check_layer(kind, input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first);
  const RowTable table(l, input, lengths, reset, batch_sizes, batch_first);
  return with_type(input, [&](auto zero) {
    using T = decltype(zero);
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    Tensors result = forward<T>(kind, l, input.to(type).contiguous(), contiguous(hx, type), contiguous(weights, type),
                                table, need_steps, need_reserve);
    for (size_t i = 0; i + 1 < result.size(); ++i) result[i] = result[i].to(input.scalar_type());
    return result;
  });
}

template <CellKind kind>
Tensors layer_backward(const OptionalTensors& grad_outputs, const Tensor& input, TensorList hx, TensorList weights,
                       const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                       const Tensor& output, const Tensor& reserve, bool bidirectional, bool batch_first,
                       const Mask& mask, c10::SymInt symbolic_groups) {
  const Layout l = check_backward(kind, grad_outputs, input, hx, weights, lengths, reset, batch_sizes, output, reserve,
                                  bidirectional, batch_first, mask, symbolic_groups);
  const RowTable table(l, input, lengths, reset, batch_sizes, batch_first);
  check_grad_outputs(kind, l, grad_outputs, input, output);
  const int64_t groups = symbolic_groups.expect_int();
  Tensors result = with_type(input, [&](auto zero) {
    using T = decltype(zero);
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    return backward<T>(kind, l, grad_outputs, input.to(type).contiguous(), contiguous(hx, type),
                       contiguous(weights, type), table, output.to(type).contiguous(), reserve.to(type).contiguous(),
                       batch_first, mask, groups);
  });
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = result[i].defined() ? result[i].to(input.scalar_type()) : at::empty({0}, input.options());
  }
  return result;
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  for_each_cell([&]<CellKind kind>() {
    m.impl((std::string(name_of(kind)) + "_layer").c_str(), layer<kind>);
    m.impl((std::string(name_of(kind)) + "_layer_backward").c_str(), layer_backward<kind>);
  });
}

}  // namespace
}  // namespace fastrnn
