#include "ops/layer_op.h"

#include <ATen/ops/as_strided.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zero_cpu_dispatch.h>

#include <algorithm>
#include <cstring>

namespace fastrnn {
namespace {

Tensor allocate(at::DimVector rows, int64_t last, const at::TensorOptions& options) {
  rows.push_back(last);
  return empty(rows, options);
}

// A view of a tensor, its first element `offset` behind that of t. Autograd does not see it: for kernels, below it.
Tensor view_of(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  const int64_t first = t.storage_offset() + offset;
  return t.is_cpu() ? at::cpu::as_strided(t, sizes, strides, first) : at::as_strided(t, sizes, strides, first);
}

// Columns of all of them.
int64_t width_of(const std::vector<Tensor>& parts) {
  int64_t width = 0;
  for (const Tensor& part : parts) width += part.size(1);
  return width;
}

// f(slice, part) for the rows of a sum that the columns of each part make.
template <class F>
void for_slices(const Tensor& sum, const std::vector<Tensor>& parts, const F& f) {
  int64_t first = 0;
  for (const Tensor& part : parts) {
    Tensor slice = rows_of(sum, first, part.size(1));
    f(slice, part);
    first += part.size(1);
  }
}

// The same of sums of every group, f(part) of each part: [groups, its columns, *].
template <class F>
Tensor of_groups(const std::vector<Tensor>& parts, const F& f) {
  Tensors all;
  for (const Tensor& part : parts) all.push_back(f(part));
  return all.size() == 1 ? all[0] : at::cat(all, 1);
}

Tensor copy_of(const Tensor& t) {
  if (!t.is_cpu() || !t.is_contiguous()) return t.clone();
  const Tensor copy = empty(t.sizes(), t.options());
  std::memcpy(copy.mutable_data_ptr(), t.const_data_ptr(), t.nbytes());
  return copy;
}

}  // namespace

Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return options.device().is_cpu() ? at::cpu::empty(sizes, options) : at::empty(sizes, options);
}

Tensors contiguous(TensorList tensors) {
  Tensors result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(t.contiguous());
  return result;
}

Tensor readable_gradient(const OptionalTensor& grad) {
  // the dispatcher makes plain tensors of its own of inputs and weights, but not of tensors in a list of optional ones
  return !grad || !grad->defined() || grad->_is_zerotensor() ? Tensor() : grad->resolve_neg();
}

Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  if (count == t.size(0)) return t;
  at::DimVector sizes(t.sizes());
  sizes[0] = count;
  return view_of(t, sizes, t.strides(), first * t.stride(0));
}

Tensor columns_of(const Tensor& t, int64_t first, int64_t count) {
  return count == t.size(1) ? t : view_of(t, {t.size(0), count}, t.strides(), first * t.stride(1));
}

Tensor transposed(const Tensor& t) { return view_of(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}, 0); }

void set_zero(Tensor& t) {
  if (t.is_cpu()) {
    at::cpu::zero_(t);
  } else {
    t.zero_();
  }
}

Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = empty(sizes, options);
  set_zero(t);
  return t;
}

void add_product(Tensor& sum, bool begun, const Tensor& a, const Tensor& b) {
  if (begun) {
    sum.addmm_(a, b);
  } else if (a.size(1) == 1) {
    at::mul_out(sum, a, b);  // written once; a product of one k would be prepared as one of many
  } else {
    at::mm_out(sum, a, b);
  }
}

void add_rows(Tensor& sum, bool begun, const Tensor& rows) {
  if (begun) {
    sum.add_(rows.sum(0));
  } else {
    at::sum_out(sum, rows, {0});
  }
}

Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Storage::kFloat;
    case at::kDouble:
      return Storage::kDouble;
    case at::kHalf:
      return Storage::kHalf;
    case at::kBFloat16:
      return Storage::kBFloat16;
    default:
      TORCH_CHECK(false, "Expected float64, float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

LayerResult::LayerResult(CellKind kind, const Sizes& z, at::IntArrayRef input, const at::TensorOptions& options,
                         at::ScalarType states, bool need_steps)
    : rows(input.begin(), input.end() - 1) {
  const at::TensorOptions of_states = options.dtype(states);
  output = allocate(rows, z.directions * z.outputs, options);
  h_n = empty({z.directions, z.batch, z.outputs}, of_states);
  if (traits(kind).states == 1) return;
  c_n = empty({z.directions, z.batch, z.units}, of_states);
  if (need_steps) cells = allocate(rows, z.directions * z.units, of_states);
}

Tensor LayerResult::allocate_gates(const Sizes& z, int64_t columns, at::TensorOptions options) const {
  at::DimVector shape = rows;
  shape.insert(shape.begin(), z.directions);
  return allocate(shape, columns, options);
}

Tensors LayerResult::with_reserve(const Tensor& reserve) const {
  Tensors all;
  all.reserve(5);
  all.push_back(output);
  all.push_back(h_n);
  if (c_n.defined()) all.push_back(c_n);
  if (cells.defined()) all.push_back(cells);
  all.push_back(reserve);
  return all;
}

bool BackwardArguments::wants_recurrent(int d) const {
  return wants_weight(layout.w_hh(d)) || (layout.biases && wants_weight(layout.b_hh(d)));
}

LayerGradients::LayerGradients(const BackwardArguments& arguments, int64_t rows, Products products)
    : a_(arguments), rows_(rows), products_(std::move(products)), result_(1 + a_.hx.size() + a_.weights.size()) {}

void LayerGradients::add(int d, const GateGradients& gates, const std::vector<RowFactor>& states) {
  const Layout& l = a_.layout;
  if (a_.wants_input()) add_input(d, gates);
  if (a_.wants_weight(l.w_ih(d))) add_outer(weight(l.w_ih(d)), gates.first, {gates.input}, {{gates.first, gates.x}});
  if (a_.wants_weight(l.w_hh(d))) add_outer(weight(l.w_hh(d)), gates.first, gates.recurrent, states);
  if (!l.biases) return;
  if (a_.wants_weight(l.b_ih(d))) add_sum(weight(l.b_ih(d)), {gates.input});
  if (a_.wants_weight(l.b_hh(d)) && !same_bias(d)) add_sum(weight(l.b_hh(d)), gates.recurrent);
}

void LayerGradients::add_projection(int d, const Tensor& grad_projected, const Tensor& activation) {
  const int index = a_.layout.w_hr(d);
  if (a_.wants_weight(index)) add_outer(weight(index), 0, {grad_projected}, {{0, activation}});
}

Tensors LayerGradients::finish(const Tensor& grad_first, const Tensor& carry, const Tensor& empty_rows) {
  const Layout& l = a_.layout;
  const Sizes& z = a_.sizes;
  for (int d = 0; d < l.directions; ++d) {
    if (l.biases && same_bias(d)) weight(l.b_hh(d)) = copy_of(weight(l.b_ih(d)));
  }
  for (Tensor& sum : result_) {
    if (sum.defined()) sum = sum.contiguous();
  }
  if (a_.wants_state(0)) {
    Tensor grad_h0 = empty({z.directions, z.batch, z.outputs}, grad_first.options());
    for (int d = 0; d < l.directions; ++d) {
      Tensor slice = grad_h0.select(0, d);
      add_gates(slice, false, grad_first.select(0, d), a_.weights[l.w_hh(d)]);
    }
    if (traits(a_.kind).carries_h) grad_h0.add_(carry);
    if (empty_rows.defined() && a_.grads[1].defined()) grad_h0 = at::where(empty_rows, a_.grads[1], grad_h0);
    result_[1] = grad_h0;
  }
  if (a_.wants_state(1)) result_[2] = carry;
  return std::move(result_);
}

// Both biases of a cell without separate gates have the same gradient.
bool LayerGradients::same_bias(int d) const {
  const Layout& l = a_.layout;
  return traits(a_.kind).separate == 0 && a_.wants_weight(l.b_ih(d)) && a_.wants_weight(l.b_hh(d));
}

void LayerGradients::add_input(int d, const GateGradients& gates) {
  const Tensor& grad = gates.input;
  const Tensor& w = a_.weights[a_.layout.w_ih(d)];
  const int64_t rows = grad.size(0), inputs = w.size(1);
  const bool begun = d > 0;  // each row once by each direction
  if (!result_[0].defined()) result_[0] = empty({rows_, inputs}, grad.options());
  const bool scattered = gates.places.defined();
  Tensor sum = !scattered ? rows_of(result_[0], gates.first, rows)
               : begun    ? result_[0].index_select(0, gates.places)
                          : empty({rows, inputs}, grad.options());
  add_gates(sum, begun, grad, w);
  if (scattered) products_.scatter(result_[0], gates.places, sum);
}

// sum (+)= grad w of all gates, with grad [rows, G*H] and w [G*H, columns]. Short sums, where they are wanted at all and
// there are many terms, are those of a gate.
void LayerGradients::add_gates(Tensor& sum, bool begun, const Tensor& grad, const Tensor& w) const {
  constexpr int64_t kMany = 2048;
  const int64_t terms = w.size(0), parts = traits(a_.kind).gates, units = terms / parts;
  if (products_.short_sums && parts > 1 && terms >= kMany) {
    add_parts(sum, begun, grad.view({grad.size(0), parts, units}).transpose(0, 1), w.view({parts, units, w.size(1)}));
  } else {
    products_.add(sum, begun, grad, w);
  }
}

// sum += the sum over the factors of grad^T x: parts of [rows, A] in all, of the gradient's rows from `first` on, and
// [rows, B] -> [A, B], or [groups, A, B] of one factor of all rows.
void LayerGradients::add_outer(Tensor& sum, int64_t first, const std::vector<Tensor>& parts,
                               const std::vector<RowFactor>& factors) const {
  if (a_.groups > 0) {
    const Tensor x = grouped(factors.at(0).x);
    sum = of_groups(parts, [&](const Tensor& part) { return at::bmm(grouped(part).transpose(1, 2), x); });
    return;
  }
  const bool add = sum.defined();
  if (!add) sum = allocate_sum(width_of(parts), factors.at(0).x.size(1), parts.at(0).options());
  // in place: for one step a copy or a sum of such matrices costs as much as the product
  for_slices(sum, parts, [&](Tensor& slice, const Tensor& part) {
    bool begun = add;
    for (const RowFactor& factor : factors) {
      const int64_t begin = std::max(first, factor.first);
      const int64_t rows = std::min(first + part.size(0), factor.first + factor.x.size(0)) - begin;
      if (rows <= 0) continue;
      add_term(slice, begun, rows_of(part, begin - first, rows), rows_of(factor.x, begin - factor.first, rows));
      begun = true;
    }
    if (!begun) set_zero(slice);
  });
}

Tensor LayerGradients::allocate_sum(int64_t rows, int64_t columns, const at::TensorOptions& options) const {
  // below, what is gained is less than what it costs to lay the result out as its weight
  constexpr int64_t kLong = 1000;
  const bool turned = rows_ >= kLong && columns <= products_.narrow && columns < rows;
  return turned ? transposed(empty({columns, rows}, options)) : empty({rows, columns}, options);
}

// slice (+)= grad^T x, both of the same rows.
void LayerGradients::add_term(Tensor& slice, bool begun, const Tensor& grad, const Tensor& x) const {
  constexpr int64_t kFewRows = 128, kMostSums = 8;  // of a short sum at least; short sums of a term
  const int64_t rows = x.size(0);
  const int64_t sums = products_.short_sums ? std::min(rows / kFewRows, kMostSums) : 1;
  if (sums > 1) {
    const int64_t each = rows / sums, all = sums * each;
    add_parts(slice, begun, grad.narrow(0, 0, all).view({sums, each, grad.size(1)}).transpose(1, 2),
              x.narrow(0, 0, all).view({sums, each, x.size(1)}));
    if (all < rows) products_.add(slice, true, transposed(rows_of(grad, all, rows - all)), rows_of(x, all, rows - all));
  } else {
    products_.add(slice, begun, transposed(grad), x);
  }
}

// Products of sums that were cut into short ones: sum (+)= the sum over i of a[i] b[i], a [parts, A, K] and b
// [parts, K, B]. A sum of some terms by one product of all, if that is not much memory: several products one after
// another would cost a small layer more in launches.
void LayerGradients::add_parts(Tensor& sum, bool begun, const Tensor& a, const Tensor& b) const {
  constexpr int64_t kMostAtOnce = int64_t{1} << 22;  // elements
  if (a.size(0) * sum.numel() <= kMostAtOnce) {
    const Tensor all = at::bmm(a, b);
    if (begun) {
      sum.add_(all.sum(0));
    } else {
      at::sum_out(sum, all, {0});
    }
    return;
  }
  for (int64_t i = 0; i < a.size(0); ++i) products_.add(sum, begun || i > 0, a.select(0, i), b.select(0, i));
}

// sum += [rows, A] -> [A], or [groups, A]
void LayerGradients::add_sum(Tensor& sum, const std::vector<Tensor>& parts) const {
  if (a_.groups > 0) {
    sum = of_groups(parts, [&](const Tensor& part) { return grouped(part).sum(1); });
    return;
  }
  const bool begun = sum.defined();
  if (!begun) sum = empty({width_of(parts)}, parts.at(0).options());
  for_slices(sum, parts, [&](Tensor& slice, const Tensor& part) { products_.sum(slice, begun, part); });
}

Tensor LayerGradients::grouped(const Tensor& all) const {
  const Sizes& z = a_.sizes;
  const int64_t groups = a_.groups, rows = z.batch / groups, width = all.size(1);
  if (a_.batch_first) return all.reshape({groups, rows * z.steps, width});
  return all.reshape({z.steps, groups, rows, width}).transpose(0, 1).reshape({groups, z.steps * rows, width});
}

}  // namespace fastrnn
