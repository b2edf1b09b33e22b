#include "ops/stepwise.h"

#include <ATen/ops/_assert_async.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cuda/kernels.h"
#include "ops/layer_op.h"
#include "ops/persistent.h"
#include "ops/rows.h"

namespace fastrnn {
namespace {

const void* pointer(const Tensor& t) { return t.defined() && t.numel() > 0 ? t.const_data_ptr() : nullptr; }
void* mutable_pointer(const Tensor& t) { return t.defined() && t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

// out = a b, matrices or batches of them. 16-bit operands have a float32 product: it is a sum.
void product(Tensor out, const Tensor& a, const Tensor& b) {
  const bool matrices = out.dim() == 2;
  if (a.scalar_type() == out.scalar_type()) {
    matrices ? at::mm_out(out, a, b) : at::bmm_out(out, a, b);
  } else if (a.is_cuda()) {
    matrices ? at::mm_out(out, a, b, out.scalar_type()) : at::bmm_out(out, a, b, out.scalar_type());
  } else {  // a GPU that is emulated on the CPU, whose GEMMs have no such form
    out.copy_(a.to(out.scalar_type()).matmul(b.to(out.scalar_type())));
  }
}

// The rows of a layer on its device, step by step.
class Steps {
 public:
  Steps(const Layout& l, const Sizes& z, const Tensor& input, const OptionalTensor& lengths,
        const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool batch_first)
      // lengths and resets are on the device: the host reads the layout only
      : host_(l, input, std::nullopt, std::nullopt, batch_sizes, batch_first),
        batch_first_(batch_first),
        packed_(batch_sizes.has_value()) {
    table_.steps = z.steps;
    table_.batch = z.batch;
    table_.total = host_.total();
    table_.batch_stride = host_.rows().batch_stride;
    table_.directions = l.directions;
    if (lengths.has_value()) {
      lengths_ = lengths->contiguous();
      table_.lengths = lengths_.const_data_ptr<int64_t>();
      at::_assert_async(lengths_.ge(0).logical_and_(lengths_.le(z.steps)).all(),
                        "lengths should be between 0 and " + std::to_string(z.steps));
    }
    if (reset.has_value()) {
      reset_ = reset->contiguous();
      table_.reset = reset_.const_data_ptr<bool>();
      table_.reset_step_stride = batch_first ? 1 : z.batch;
      table_.reset_batch_stride = batch_first ? z.steps : 1;
    }
  }

  int64_t total() const { return host_.total(); }
  // The row of (t, n) is t * step_stride() + n * batch_stride, but in packed data.
  int64_t step_stride() const { return batch_first_ ? 1 : table_.batch; }
  const Rows* packed() const { return packed_ ? &host_.rows() : nullptr; }

  // The table of step `s` of a scan that goes with the direction of the data, or `against` it.
  const StepTable& at(int64_t s, bool against) {
    for (int d = 0; d < table_.directions; ++d) {
      const bool up = (d == 0) != against;
      const int64_t t = up ? s : table_.steps - 1 - s, before = d == 0 ? t - 1 : t + 1;
      const Rows& rows = host_.rows();
      table_.step[d] = {t, rows.active[t], t + 1 < table_.steps ? rows.active[t + 1] : 0, rows.offset[t],
                        0 <= before && before < table_.steps ? rows.offset[before] : 0};
    }
    return table_;
  }
  // Rows of the batch that some direction visits in the step that `at` has last been asked for.
  int64_t visited() const {
    return std::max(table_.step[0].visited, table_.directions == 2 ? table_.step[1].visited : 0);
  }

  // [N, outputs] rows that start anew at t = 0 drop their initial state in the forward direction.
  void drop_initial(Tensor hidden) const {
    if (reset_.defined()) hidden.masked_fill_(reset_.select(batch_first_ ? 1 : 0, 0).unsqueeze(1), 0);
  }
  // bool [N, 1]: rows without steps; undefined if none can be.
  Tensor empty_rows() const { return lengths_.defined() ? lengths_.le(0).unsqueeze(1) : Tensor(); }
  // [rows, columns] with zeros in the rows that are not valid, NaN or not.
  Tensor without_padding(const Tensor& t) const {
    if (!lengths_.defined()) return t;
    const Tensor step = at::arange(table_.steps, lengths_.options());
    const Tensor padding = batch_first_ ? step.unsqueeze(0).ge(lengths_.unsqueeze(1))
                                        : step.unsqueeze(1).ge(lengths_.unsqueeze(0));
    return t.masked_fill(padding.reshape({-1, 1}), 0);
  }

 private:
  RowTable host_;
  Tensor lengths_, reset_;
  StepTable table_;
  bool batch_first_, packed_;
};

// The same weight of both directions, as one batch of matrices [D, *, *].
Tensor both(const Tensors& weights, int first, int second, int64_t directions) {
  return directions == 1 ? weights[first].unsqueeze(0) : at::stack({weights[first], weights[second]});
}

// out [D, N, width] = a weights, as far as a step's rows go. One direction's is a plain matrix. A step of few rows takes the
// device less time than the host needs to make views of tensors, so those of whole steps are made once.
class StepProduct {
 public:
  StepProduct() = default;
  StepProduct(const Tensor& out, const Tensor& a, const Tensor& weights)
      : alone_(out.size(0) == 1),
        out_(alone_ ? out[0] : out),
        a_(alone_ ? a[0] : a),
        weights_(alone_ ? weights[0] : weights) {}

  void operator()(int64_t rows) const {
    const int64_t dimension = alone_ ? 0 : 1;
    if (rows == out_.size(dimension)) {
      product(out_, a_, weights_);
    } else if (rows > 0) {
      product(out_.narrow(dimension, 0, rows), a_.narrow(dimension, 0, rows), weights_);
    }
  }

 private:
  bool alone_ = true;
  Tensor out_, a_, weights_;
};

}  // namespace

Tensors stepwise_layer(CellKind kind, const Gpu& gpu, const Tensor& input, TensorList hx_list, TensorList weight_list,
                       const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                       bool bidirectional, bool batch_first, bool need_steps, bool need_reserve) {
  const Layout l = check_layer(kind, input, hx_list, weight_list, lengths, reset, batch_sizes, bidirectional,
                               batch_first);
  const Sizes z(l);
  const CellTraits& cell = traits(kind);
  const Storage storage = storage_of(input);
  const Tensors hx = contiguous(hx_list), weights = contiguous(weight_list);
  Steps steps(l, z, input, lengths, reset, batch_sizes, batch_first);
  const auto options = input.options(), sums = options.dtype(accumulate_type(input));
  const int64_t gate_width = cell.gates * z.units;

  LayerResult result(kind, z, input.sizes(), options, input.scalar_type(), need_steps);
  const int64_t columns = z.units * (need_reserve ? l.reserve_columns_in_units(kind) : cell.gates);
  const Tensor gates = result.allocate_gates(z, columns, sums);
  const Tensor x = input.reshape({steps.total(), z.inputs});
  if (x.numel() == 0) gates.zero_();  // no inputs: a product over nothing
  for (int d = 0; d < l.directions && x.numel() > 0; ++d) {
    product(gates.select(0, d).view({steps.total(), columns}).narrow(1, 0, gate_width), x, weights[l.w_ih(d)].t());
  }

  StepForward p;
  p.units = z.units;
  p.outputs = z.outputs;
  p.projected = l.projected;
  p.save = need_reserve;
  p.gates = mutable_pointer(gates);
  p.gates_stride = columns;
  for (int d = 0; d < l.directions && l.biases; ++d) {
    p.b_ih[d] = pointer(weights[l.b_ih(d)]);
    p.b_hh[d] = pointer(weights[l.b_hh(d)]);
  }
  if (!hx.empty()) p.h0 = pointer(hx[0]);
  if (hx.size() > 1) p.c0 = pointer(hx[1]);
  p.output = mutable_pointer(result.output);
  p.cells = mutable_pointer(result.cells);
  p.h_n = mutable_pointer(result.h_n);
  p.c_n = mutable_pointer(result.c_n);
  p.table = steps.at(0, false);
  if (run_persistent(kind, storage, gpu, l, weights, p, steps.step_stride(), steps.packed())) {
    return result.with_reserve(need_reserve ? gates : empty({0}, sums));
  }

  const auto zeros_or = [&](size_t s, int64_t width, const at::TensorOptions& type) {
    Tensor initial = at::zeros({z.directions, z.batch, width}, type);
    if (s >= hx.size()) return initial;
    initial.copy_(hx[s]);
    steps.drop_initial(initial[0]);
    return initial;
  };
  const Tensor hidden = zeros_or(0, z.outputs, options);
  // the element state: c, or h once more, not rounded to 16 bits
  const Tensor state = zeros_or(cell.states - 1, z.units, sums);
  const Tensor recurrent = at::empty({z.directions, z.batch, gate_width}, sums);
  const Tensor w_hh = both(weights, l.w_hh(0), l.w_hh(1), z.directions).transpose(1, 2);
  Tensor activation, projected, w_hr;
  if (l.projected) {
    activation = at::empty({z.directions, z.batch, z.units}, options);
    projected = at::empty({z.directions, z.batch, z.outputs}, sums);
    w_hr = both(weights, l.w_hr(0), l.w_hr(1), z.directions).transpose(1, 2);
  }

  p.hidden = mutable_pointer(hidden);
  p.state = mutable_pointer(state);
  p.activation = mutable_pointer(activation);
  p.product = pointer(projected);
  const StepProduct of_hidden(recurrent, hidden, w_hh);
  const StepProduct of_activation = l.projected ? StepProduct(projected, activation, w_hr) : StepProduct();
  for (int64_t s = 0; s < z.steps; ++s) {
    p.table = steps.at(s, false);
    if (s > 0 || !hx.empty()) {
      of_hidden(steps.visited());
      p.recurrent = pointer(recurrent);
    }
    forward_step(kind, storage, p, gpu.stream);
    if (l.projected) {
      of_activation(steps.visited());
      forward_projected(storage, p, gpu.stream);
    }
  }
  return result.with_reserve(need_reserve ? gates : empty({0}, sums));
}

Tensors stepwise_layer_backward(CellKind kind, const Gpu& gpu, const OptionalTensors& grad_outputs, const Tensor& input,
                                TensorList hx_list, TensorList weight_list, const OptionalTensor& lengths,
                                const OptionalTensor& reset, const OptionalTensor& batch_sizes, const Tensor& output_,
                                const Tensor& reserve_, bool bidirectional, bool batch_first, const Mask& mask,
                                int64_t groups) {
  const WithoutAutocast guard;
  const Layout l = check_backward(kind, grad_outputs, input, hx_list, weight_list, lengths, reset, batch_sizes, output_,
                                  reserve_, bidirectional, batch_first, mask, groups);
  check_grad_outputs(kind, l, grad_outputs, input, output_);
  const Sizes z(l);
  const CellTraits& cell = traits(kind);
  const Storage storage = storage_of(input);
  const Tensors hx = contiguous(hx_list), weights = contiguous(weight_list);
  const Tensor output = output_.contiguous(), reserve = reserve_.contiguous();
  Steps steps(l, z, input, lengths, reset, batch_sizes, batch_first);
  const int64_t total = steps.total(), gate_width = cell.gates * z.units, reserve_columns = reserve.size(-1);
  const auto options = input.options(), sums = options.dtype(accumulate_type(input));

  const Tensor x = steps.without_padding(input.reshape({total, z.inputs}));
  BackwardArguments a{kind, l, z, {}, hx, weights, batch_first, mask, groups};
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    const Tensor g = readable_gradient(grad_outputs.get(i));
    a.grads.push_back(g.defined() ? g.to(options.dtype()).contiguous() : g);
  }

  const auto by_rows = [&](int64_t width) { return at::empty({z.directions, total, width}, options); };
  const auto by_batch = [&](int64_t width, const at::TensorOptions& type) {
    return at::empty({z.directions, z.batch, width}, type);
  };
  bool wants_recurrent = false, wants_w_hh = false;
  for (int d = 0; d < l.directions; ++d) {
    wants_recurrent = wants_recurrent || a.wants_recurrent(d);
    wants_w_hh = wants_w_hh || a.wants_weight(l.w_hh(d));
  }
  const Tensor carry = at::zeros({z.directions, z.batch, z.units}, sums);
  const Tensor grad_first = a.wants_states() ? at::zeros({z.directions, z.batch, gate_width}, options) : Tensor();
  const Tensor grad_gates = by_rows(gate_width);
  const Tensor grad_recurrent = cell.separate > 0 && wants_recurrent ? by_rows(gate_width) : Tensor();
  const Tensor previous = wants_w_hh ? by_rows(z.outputs) : Tensor();
  const Tensor grad_projected = l.projected ? by_rows(z.outputs) : Tensor();
  StepBackward p;
  p.units = z.units;
  p.outputs = z.outputs;
  p.projected = l.projected;
  p.reserve = pointer(reserve);
  p.reserve_stride = reserve_columns;
  p.output = pointer(output);
  if (!hx.empty()) p.h0 = pointer(hx[0]);
  if (hx.size() > 1) p.c0 = pointer(hx[1]);
  p.grad_output = pointer(a.grads[0]);
  p.grad_h_n = pointer(a.grads[1]);
  if (cell.states > 1) p.grad_c_n = pointer(a.grads[2]);
  if (a.grads.size() > static_cast<size_t>(1 + cell.states)) p.grad_cells = pointer(a.grads[3]);
  p.carry = mutable_pointer(carry);
  p.grad_gates = mutable_pointer(grad_gates);
  p.grad_recurrent = mutable_pointer(grad_recurrent);
  p.grad_first = mutable_pointer(grad_first);
  p.previous = mutable_pointer(previous);
  p.grad_projected = mutable_pointer(grad_projected);

  p.table = steps.at(0, true);
  if (!run_persistent(kind, storage, gpu, l, weights, p, steps.step_stride(), steps.packed())) {
    const Tensor step_gates = by_batch(gate_width, options), grad_hidden = by_batch(z.outputs, sums);
    const Tensor w_hh = both(weights, l.w_hh(0), l.w_hh(1), z.directions);
    Tensor step_projected, grad_activation, w_hr;
    if (l.projected) {
      step_projected = by_batch(z.outputs, options);
      grad_activation = by_batch(z.units, sums);
      w_hr = both(weights, l.w_hr(0), l.w_hr(1), z.directions);
    }
    p.grad_activation = pointer(grad_activation);
    p.step_gates = mutable_pointer(step_gates);
    p.step_projected = mutable_pointer(step_projected);
    const StepProduct of_gates(grad_hidden, step_gates, w_hh);
    const StepProduct of_projected = l.projected ? StepProduct(grad_activation, step_projected, w_hr) : StepProduct();
    for (int64_t s = 0; s < z.steps; ++s) {
      if (s > 0) {
        of_gates(steps.visited());
        p.product = pointer(grad_hidden);
      }
      p.table = steps.at(s, true);
      if (l.projected) {
        backward_projected(storage, p, gpu.stream);
        of_projected(steps.visited());
      }
      backward_step(kind, storage, p, gpu.stream);
    }
  }

  const bool short_sums = options.dtype() == at::kFloat;  // cuBLAS's; torch's LSTM adds up by steps
  LayerGradients gradients(a, total, {.short_sums = short_sums});
  for (int d = 0; d < l.directions; ++d) {
    std::vector<RowFactor> states;
    if (previous.defined()) states.push_back({0, previous[d]});
    const Tensor& recurrent = grad_recurrent.defined() ? grad_recurrent : grad_gates;
    gradients.add(d, {0, grad_gates[d], {recurrent[d]}, x, {}}, states);
    if (l.projected) {
      const Tensor saved = reserve.select(0, d).view({total, reserve_columns});
      gradients.add_projection(d, grad_projected[d],
                               saved.narrow(1, cell.saved * z.units, z.units).to(options.dtype()));
    }
  }
  Tensors result = gradients.finish(grad_first, carry, steps.empty_rows());
  if (a.wants_input()) result[0] = result[0].view(input.sizes());
  for (Tensor& t : result) t = t.defined() ? t.to(options.dtype()) : at::empty({0}, options);
  return result;
}

}  // namespace fastrnn
