#include "ops/layer_op.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace fastrnn {
namespace {

// Products of sums that were cut into short ones. A sum of some terms [A, B] by one product of all, if that is not much
// memory: several products one after another would cost a small layer more in launches.
constexpr int64_t kMostAtOnce = int64_t{1} << 22;  // elements
// sum (+)= the sum over i of a[i] b[i], a [parts, A, K] and b [parts, K, B].
void add_products(const ScanGradients& scan, Tensor& sum, bool begun, const Tensor& a, const Tensor& b) {
  if (a.size(0) * sum.numel() <= kMostAtOnce) {
    const Tensor products = at::bmm(a, b);
    if (begun) {
      sum.add_(products.sum(0));
    } else {
      at::sum_out(sum, products, {0});
    }
    return;
  }
  for (int64_t i = 0; i < a.size(0); ++i) scan.add_product(sum, begun || i > 0, a.select(0, i), b.select(0, i));
}

// sum (+)= grad w, with grad [rows, G H] and w [G H, I]; an undefined sum is zero. Short sums, where they are wanted at all
// and the columns are many, are those of a gate.
void add_by_gates(const ScanGradients& scan, Tensor& sum, const Tensor& grad, const Tensor& w, int gates) {
  constexpr int64_t kMany = 2048;
  const bool begun = sum.defined();
  const int64_t rows = grad.size(0), columns = w.size(0), inputs = w.size(1), units = columns / gates;
  if (!begun) sum = at::empty({rows, inputs}, grad.options());
  if (scan.short_sums && gates > 1 && columns >= kMany) {
    add_products(scan, sum, begun, grad.view({rows, gates, units}).transpose(0, 1), w.view({gates, units, inputs}));
  } else {
    scan.add_product(sum, begun, grad, w);
  }
}

// Weight gradients: a product over all rows, or over the rows of each of `groups` blocks of the batch.
class Reduction {
 public:
  Reduction(const Sizes& z, bool batch_first, int64_t groups, const ScanGradients& scan)
      : z_(z), batch_first_(batch_first), groups_(groups), scan_(scan) {}

  // Rows of x [rows, B], and the row of a gradient that its first belongs to.
  struct Term {
    int64_t first;
    Tensor x;
  };
  // The sum over the terms of grad^T x: parts of [rows, A] in all and [rows, B] -> [A, B] or [groups, A, B], the latter
  // of one term of all rows.
  Tensor outer(const std::vector<Tensor>& parts, const std::vector<Term>& terms) const {
    if (groups_ > 0) {
      Tensors products;
      for (const Tensor& part : parts) products.push_back(outer(part, terms.at(0).x));
      return products.size() == 1 ? products[0] : at::cat(products, 1);
    }
    // in place: for one step a copy or a sum of such matrices costs as much as the product
    int64_t width = 0, at = 0;
    for (const Tensor& part : parts) width += part.size(1);
    Tensor whole = at::empty({width, terms.at(0).x.size(1)}, parts.at(0).options());
    for (const Tensor& part : parts) {
      Tensor slice = whole.narrow(0, at, part.size(1));
      bool begun = false;
      for (const Term& term : terms) {
        if (term.x.size(0) == 0) continue;
        add(slice, begun, part, term);
        begun = true;
      }
      if (!begun) slice.zero_();
      at += part.size(1);
    }
    return whole;
  }
  Tensor outer(const Tensor& grad, const Tensor& x) const {
    if (groups_ == 0) return outer(std::vector<Tensor>{grad}, {{0, x}});
    return at::bmm(grouped(grad).transpose(1, 2), grouped(x));
  }
  // [rows, A] -> [A] or [groups, A]
  Tensor sum(const Tensor& grad) const { return groups_ == 0 ? grad.sum(0) : grouped(grad).sum(1); }
  Tensor sum(const std::vector<Tensor>& parts) const {
    Tensors sums;
    for (const Tensor& part : parts) sums.push_back(sum(part));
    return sums.size() == 1 ? sums[0] : at::cat(sums, -1);
  }

 private:
  Tensor grouped(const Tensor& t) const {
    const int64_t rows = z_.batch / groups_;
    if (batch_first_) return t.reshape({groups_, rows * z_.steps, t.size(1)});
    return t.reshape({z_.steps, groups_, rows, t.size(1)})
        .transpose(0, 1)
        .reshape({groups_, z_.steps * rows, t.size(1)});
  }
  // slice (+)= grad^T x of a term with rows.
  void add(Tensor& slice, bool begun, const Tensor& grad, const Term& term) const {
    const int64_t rows = term.x.size(0), width = grad.size(1);
    const int64_t sums = scan_.short_sums ? std::min(rows / kFewRows, kMostSums) : 1;
    if (sums > 1) {
      const int64_t each = rows / sums, all = sums * each;
      const Tensor factors = grad.narrow(0, term.first, all).view({sums, each, width}).transpose(1, 2);
      add_products(scan_, slice, begun, factors, term.x.narrow(0, 0, all).view({sums, each, term.x.size(1)}));
      if (all < rows) {
        const Tensor factor = grad.narrow(0, term.first + all, rows - all).t();
        scan_.add_product(slice, true, factor, term.x.narrow(0, all, rows - all));
      }
      return;
    }
    const Tensor factor = grad.narrow(0, term.first, rows).t();
    if (!begun && rows == 1) {
      at::mul_out(slice, factor, term.x);  // written once; a product of one k would be prepared as one of many
    } else {
      scan_.add_product(slice, begun, factor, term.x);
    }
  }

  static constexpr int64_t kFewRows = 128, kMostSums = 8;  // of a short sum at least; short sums of a term
  const Sizes& z_;
  bool batch_first_;
  int64_t groups_;
  const ScanGradients& scan_;
};

Tensor allocate(std::vector<int64_t> rows, int64_t last, const at::TensorOptions& options) {
  rows.push_back(last);
  return at::empty(rows, options);
}

}  // namespace

void add_product(Tensor& sum, bool begun, const Tensor& a, const Tensor& b) {
  if (begun) {
    sum.addmm_(a, b);
  } else {
    at::mm_out(sum, a, b);
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
  h_n = at::empty({z.directions, z.batch, z.outputs}, of_states);
  if (traits(kind).states == 1) return;
  c_n = at::empty({z.directions, z.batch, z.units}, of_states);
  if (need_steps) cells = allocate(rows, z.directions * z.units, of_states);
}

Tensor LayerResult::allocate_gates(const Sizes& z, int64_t columns, at::TensorOptions options) const {
  std::vector<int64_t> shape = rows;
  shape.insert(shape.begin(), z.directions);
  return allocate(shape, columns, options);
}

Tensors LayerResult::with_reserve(const Tensor& reserve) const {
  Tensors all{output, h_n};
  if (c_n.defined()) all.push_back(c_n);
  if (cells.defined()) all.push_back(cells);
  all.push_back(reserve);
  return all;
}

bool BackwardArguments::wants_recurrent(int d) const {
  return wants_weight(layout.w_hh(d)) || (layout.biases && wants_weight(layout.b_hh(d)));
}

Tensors layer_gradients(const BackwardArguments& a, const ScanGradients& scan, const Tensor& empty_rows) {
  const Layout& l = a.layout;
  const Sizes& z = a.sizes;
  const CellTraits& cell = traits(a.kind);
  Tensors result(1 + a.hx.size() + a.weights.size());
  const Reduction reduction(z, a.batch_first, a.groups, scan);
  for (int d = 0; d < l.directions; ++d) {
    const DirectionGradients& g = scan.each[d];
    const auto weight = [&](int index) -> Tensor& { return result[1 + a.hx.size() + index]; };
    if (a.wants_input()) add_by_gates(scan, result[0], g.input_gates, a.weights[l.w_ih(d)], cell.gates);
    if (a.wants_weight(l.w_ih(d))) weight(l.w_ih(d)) = reduction.outer(g.input_gates, a.input);
    if (a.wants_weight(l.w_hh(d))) {
      std::vector<Reduction::Term> states{{g.previous_first, g.previous}};
      if (g.initial.defined()) states.push_back({g.initial_first, g.initial});
      weight(l.w_hh(d)) = reduction.outer(g.recurrent, states);
    }
    if (l.biases && a.wants_weight(l.b_ih(d))) weight(l.b_ih(d)) = reduction.sum(g.input_gates);
    if (l.biases && a.wants_weight(l.b_hh(d))) {
      const bool same = cell.separate == 0 && a.wants_weight(l.b_ih(d));
      weight(l.b_hh(d)) = same ? weight(l.b_ih(d)).clone() : reduction.sum(g.recurrent);
    }
    if (l.projected && a.wants_weight(l.w_hr(d))) weight(l.w_hr(d)) = reduction.outer(g.grad_projected, g.activation);
  }
  if (a.wants_state(0)) {
    Tensor grad_h0 = at::empty({z.directions, z.batch, z.outputs}, scan.grad_first.options());
    for (int d = 0; d < l.directions; ++d) {
      Tensor slice = grad_h0.select(0, d);
      scan.add_product(slice, false, scan.grad_first.select(0, d), a.weights[l.w_hh(d)]);
    }
    if (cell.carries_h) grad_h0.add_(scan.carry);
    if (empty_rows.defined() && a.grads[1].defined()) grad_h0 = at::where(empty_rows, a.grads[1], grad_h0);
    result[1] = grad_h0;
  }
  if (a.wants_state(1)) result[2] = scan.carry;
  return result;
}

}  // namespace fastrnn
