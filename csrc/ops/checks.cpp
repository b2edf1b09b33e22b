#include "ops/checks.h"

#include <c10/core/SymBool.h>

namespace fastrnn {
namespace {

using c10::SymInt;

// `shape` is told in the message as it should be; sizes are compared without specialising symbolic ones.
void check_shape(const Tensor& t, const char* name, c10::ArrayRef<SymInt> shape) {
  TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), "Expected ", name, " to be ", shape.size(), "-D, got ",
              t.dim(), "-D");
  for (size_t i = 0; i < shape.size(); ++i) {
    TORCH_SYM_CHECK(t.sym_size(static_cast<int64_t>(i)).sym_eq(shape[i]), "Expected ", name, " size ", shape, ", got ",
                    t.sym_sizes());
  }
}

void check_like_input(const Tensor& t, const Tensor& input, const char* what) {
  TORCH_CHECK(t.device() == input.device(), "Input and ", what,
              " tensors are not at the same device, found input tensor at ", input.device(), " and ", what,
              " tensor at ", t.device());
  TORCH_CHECK(t.scalar_type() == input.scalar_type(), "Input and ", what,
              " tensors are not the same dtype, found input tensor with ", input.scalar_type(), " and ", what,
              " tensor with ", t.scalar_type());
}

void check_weights(const CellTraits& cell, const Layout& l, const Tensor& input, TensorList weights) {
  const SymInt rows = l.units * cell.gates;
  for (int d = 0; d < l.directions; ++d) {
    const auto check = [&](int index, const char* name, std::initializer_list<SymInt> shape) {
      check_like_input(weights[index], input, "parameter");
      check_shape(weights[index], name, c10::ArrayRef<SymInt>(shape.begin(), shape.size()));
    };
    check(l.w_ih(d), "w_ih", {rows, l.inputs});
    check(l.w_hh(d), "w_hh", {rows, l.outputs});
    if (l.biases) {
      check(l.b_ih(d), "b_ih", {rows});
      check(l.b_hh(d), "b_hh", {rows});
    }
    if (l.projected) check(l.w_hr(d), "w_hr", {l.outputs, l.units});
  }
}

void check_rows(const Layout& l, const Tensor& input, const OptionalTensor& lengths, const OptionalTensor& reset,
                bool batch_first) {
  if (lengths.has_value()) {
    TORCH_CHECK(lengths->scalar_type() == at::kLong, "Expected lengths to be int64, got ", lengths->scalar_type());
    TORCH_CHECK(lengths->device() == input.device(), "Expected lengths on ", input.device(), ", got ",
                lengths->device());
    const SymInt shape[] = {l.batch};
    check_shape(*lengths, "lengths", shape);
  }
  if (reset.has_value()) {
    TORCH_CHECK(reset->scalar_type() == at::kBool, "Expected reset to be bool, got ", reset->scalar_type());
    TORCH_CHECK(reset->device() == input.device(), "Expected reset on ", input.device(), ", got ", reset->device());
    const SymInt shape[] = {batch_first ? l.batch : l.steps, batch_first ? l.steps : l.batch};
    check_shape(*reset, "reset", shape);
  }
}

}  // namespace

std::vector<SymInt> Layout::by_rows(const Tensor& input, std::initializer_list<SymInt> last) const {
  std::vector<SymInt> shape;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) shape.push_back(input.sym_size(i));
  shape.insert(shape.end(), last);
  return shape;
}

Layout check_layer(CellKind kind, const Tensor& input, TensorList hx, TensorList weights, const OptionalTensor& lengths,
                   const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool bidirectional,
                   bool batch_first) {
  const CellTraits& cell = traits(kind);
  Layout l;
  l.directions = bidirectional ? 2 : 1;
  l.packed = batch_sizes.has_value();

  TORCH_CHECK(at::isFloatingType(input.scalar_type()), "Expected a floating point input, got ", input.scalar_type());
  TORCH_CHECK(weights.size() % l.directions == 0, "Expected as many weights for each direction, got ", weights.size());
  const size_t per_direction = weights.size() / l.directions;
  TORCH_CHECK(per_direction >= 2 && per_direction <= 5, "Expected 2 to 5 weights for each direction, got ",
              per_direction);
  l.biases = per_direction >= 4;
  l.projected = per_direction % 2 == 1;
  TORCH_CHECK(!l.projected || traits(kind).projects, "Only the LSTM has a projection, got ", per_direction, " weights");
  TORCH_CHECK(hx.empty() || hx.size() == static_cast<size_t>(cell.states), "Expected ", cell.states,
              " initial states or none, got ", hx.size());
  for (const Tensor& w : weights) TORCH_CHECK(w.defined(), "Expected weights, got an undefined tensor");
  for (const Tensor& h : hx) TORCH_CHECK(h.defined(), "Expected initial states, got an undefined tensor");

  const int64_t dims = l.packed ? 2 : 3;
  TORCH_CHECK(input.dim() == dims, "input must have ", dims, " dimensions, got ", input.dim());
  TORCH_CHECK(weights[0].dim() == 2 && weights[1].dim() == 2, "Expected w_ih and w_hh to be 2-D, got ",
              weights[0].dim(), "-D and ", weights[1].dim(), "-D");
  l.inputs = weights[0].sym_size(1);
  l.units = weights[1].sym_size(0) / cell.gates;
  l.outputs = l.projected ? weights[l.w_hr(0)].sym_size(0) : l.units;
  TORCH_SYM_CHECK(input.sym_size(-1).sym_eq(l.inputs), "input.size(-1) must be equal to input_size. Expected ",
                  l.inputs, ", got ", input.sym_size(-1));
  check_weights(cell, l, input, weights);

  if (l.packed) {
    TORCH_CHECK(!lengths.has_value() && !reset.has_value(),
                "batch_sizes says the lengths itself: lengths and reset need a padded input");
    // while torch.compile traces, every tensor is a meta tensor
    const bool readable = batch_sizes->device().is_cpu() || input.is_meta();
    TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong && readable,
                "batch_sizes should be a 1-D int64 tensor on the CPU");
    TORCH_CHECK(!hx.empty(), "batch_sizes needs hx");
    l.steps = batch_sizes->sym_size(0);
    l.batch = hx[0].sym_size(1);
  } else {
    l.steps = input.sym_size(batch_first ? 1 : 0);
    l.batch = input.sym_size(batch_first ? 0 : 1);
  }
  TORCH_SYM_CHECK(l.steps.sym_gt(0), "Expected sequence length to be larger than 0 in RNN");
  for (size_t s = 0; s < hx.size(); ++s) {
    check_like_input(hx[s], input, "hidden");
    const SymInt shape[] = {l.directions, l.batch, s == 0 ? l.outputs : l.units};
    check_shape(hx[s], s == 0 ? "h0" : "c0", shape);
  }
  check_rows(l, input, lengths, reset, batch_first);
  return l;
}

Layout check_backward(CellKind kind, const OptionalTensors& grad_outputs, const Tensor& input, TensorList hx,
                      TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset,
                      const OptionalTensor& batch_sizes, const Tensor& output, const Tensor& reserve,
                      bool bidirectional, bool batch_first, const Mask& mask, const SymInt& groups) {
  const Layout l = check_layer(kind, input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first);
  const CellTraits& cell = traits(kind);
  const auto least = static_cast<size_t>(1 + cell.states), most = least + static_cast<size_t>(cell.states - 1);
  TORCH_CHECK(grad_outputs.size() == least || grad_outputs.size() == most, "Expected ", least, " or ", most,
              " gradients of outputs, got ", grad_outputs.size());
  TORCH_CHECK(mask.size() == 1 + hx.size() + weights.size(), "Expected a mask for ", 1 + hx.size() + weights.size(),
              " inputs, got ", mask.size());
  check_shape(output, "output", l.by_rows(input, {l.outputs * l.directions}));
  check_like_input(output, input, "output");
  std::vector<SymInt> shape = l.by_rows(input, {l.units * l.reserve_columns_in_units(kind)});
  shape.insert(shape.begin(), l.directions);
  check_shape(reserve, "reserve", shape);
  TORCH_CHECK(reserve.device() == input.device() && reserve.scalar_type() == accumulate_type(input),
              "Expected a reserve of ", accumulate_type(input), " on ", input.device(), ", got ", reserve.scalar_type(),
              " on ", reserve.device());
  TORCH_SYM_CHECK(groups.sym_ge(0), "Expected groups to be at least 0, got ", groups);
  const bool grouped = groups.maybe_as_int() != std::optional<int64_t>(0);
  TORCH_CHECK(!grouped || !l.packed, "groups needs a padded input");
  if (grouped) TORCH_SYM_CHECK((l.batch % groups).sym_eq(0), "Expected the batch to be ", groups, " equal groups");
  return l;
}

void check_grad_outputs(CellKind kind, const Layout& l, const OptionalTensors& grad_outputs, const Tensor& input,
                        const Tensor& output) {
  const CellTraits& cell = traits(kind);
  const auto check_grad = [&](size_t i, c10::ArrayRef<SymInt> expected) {
    const OptionalTensor grad = grad_outputs.get(i);
    if (!grad.has_value() || !grad->defined()) return;
    TORCH_CHECK(grad->device() == input.device(), "Expected grad_outputs on ", input.device(), ", got ",
                grad->device());
    check_shape(*grad, "grad_outputs", expected);
  };
  check_grad(0, output.sym_sizes());
  for (int s = 0; s < cell.states; ++s) {
    const SymInt state[] = {l.directions, l.batch, s == 0 ? l.outputs : l.units};
    check_grad(1 + s, state);
  }
  for (size_t i = 1 + cell.states; i < grad_outputs.size(); ++i)
    check_grad(i, l.by_rows(input, {l.units * l.directions}));
}

}  // namespace fastrnn
