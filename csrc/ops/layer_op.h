// What the ops of every device share: sizes, results, and the GEMMs after a backward scan.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/ops/empty.h>

#include <functional>

#include "core/params.h"
#include "ops/checks.h"

namespace fastrnn {

// The integers of a layout; tensors with data have no symbolic sizes.
struct Sizes {
  int64_t directions, steps, batch, inputs, units, outputs;
  explicit Sizes(const Layout& l)
      : directions(l.directions),
        steps(l.steps.expect_int()),
        batch(l.batch.expect_int()),
        inputs(l.inputs.expect_int()),
        units(l.units.expect_int()),
        outputs(l.outputs.expect_int()) {}
};

// Of the four dtypes that the layers take; an error for any other.
Storage storage_of(const Tensor& t);

// at::empty, on the CPU without the dispatcher: a small layer takes less time than a few calls through it.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

Tensors contiguous(TensorList tensors);

// The data of a tensor, null where it is undefined or has none.
template <class T>
const T* data(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.const_data_ptr<T>() : nullptr;
}

template <class T>
Stored<T> stored(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? Stored<T>(t.const_data_ptr(), storage_of(t)) : Stored<T>();
}

// What a layer returns but for the reserve, in that order: output, h_n, c_n, c of every step.
struct LayerResult {
  at::DimVector rows;  // [T, N] or [N, T] or [rows]: the dimensions of the input but the last
  Tensor output;       // [rows, D*outputs]
  Tensor h_n;          // [D, N, outputs]
  Tensor c_n;          // [D, N, H], if the cell has it
  Tensor cells;        // [rows, D*H], if asked for

  // `input`: its sizes. `states`: the type of all but the output.
  LayerResult(CellKind kind, const Sizes& z, at::IntArrayRef input, const at::TensorOptions& options,
              at::ScalarType states, bool need_steps);
  // The projections of the input, which turn into the reserve: [D, rows, columns].
  Tensor allocate_gates(const Sizes& z, int64_t columns, at::TensorOptions options) const;
  Tensors with_reserve(const Tensor& reserve) const;
};

// Some rows of t; all of them are t itself, without a call of an op.
Tensor rows_of(const Tensor& t, int64_t first, int64_t count);
// The same of the columns of a matrix, and its transpose.
Tensor columns_of(const Tensor& t, int64_t first, int64_t count);
Tensor transposed(const Tensor& t);
// Zeros in the place of what it has, or in a new tensor.
void set_zero(Tensor& t);
Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

// sum (+)= a b; it has numbers if `begun`.
void add_product(Tensor& sum, bool begun, const Tensor& a, const Tensor& b);
// sum [A] (+)= the sum of rows [*, A].
void add_rows(Tensor& sum, bool begun, const Tensor& rows);

// A gradient as a kernel can read it, where its numbers lie: undefined if it is known to be zeros.
Tensor readable_gradient(const OptionalTensor& grad);

// While a backward op runs: autocast would round what ATen multiplies in it. The forward op's arguments have been cast, and
// backward runs under whatever autocast is on where it is called.
struct WithoutAutocast : c10::impl::ExcludeDispatchKeyGuard {
  WithoutAutocast() : ExcludeDispatchKeyGuard(c10::autocast_dispatch_keyset) {}
};

// How a device multiplies best.
struct Products {
  // GEMMs add term after term to one number of that type, and err by more the more there are: long sums are then made of
  // several.
  bool short_sums = false;
  // Of long sums, columns up to which a result is made faster if its longer side is the one that lies in a row.
  int64_t narrow = 0;
  std::function<void(Tensor& sum, bool begun, const Tensor& a, const Tensor& b)> add = add_product;
  std::function<void(Tensor& sum, bool begun, const Tensor& rows)> sum = add_rows;
  // to[places[i]] = from[i], rows as a whole; null where gate gradients have no places
  std::function<void(Tensor& to, const Tensor& places, const Tensor& from)> scatter = nullptr;
};

// The arguments of a backward op, as plain tensors on one device; weights are of the type of the products.
struct BackwardArguments {
  CellKind kind;
  const Layout& layout;
  const Sizes& sizes;
  Tensors grads;  // of output (in any type), h_n, c_n, c of every step; undefined or contiguous
  const Tensors& hx;
  const Tensors& weights;
  bool batch_first;
  const Mask& mask;
  int64_t groups;

  bool wants_input() const { return mask.get(0); }
  bool wants_state(size_t s) const { return s < hx.size() && mask.get(1 + s); }
  bool wants_states() const { return wants_state(0) || wants_state(1); }
  bool wants_weight(int index) const { return mask.get(1 + hx.size() + index); }
  bool wants_recurrent(int d) const;
};

// The gate gradients of some rows, as a scan leaves them.
struct GateGradients {
  int64_t first = 0;  // which of all rows is the first of these
  Tensor input;  // [rows, G*H] of the input projection
  std::vector<Tensor> recurrent;  // of the recurrent projection, in parts whose columns make up G*H; each [rows, *]
  Tensor x;  // [rows, I] the input of these rows
  Tensor places;  // int64 [rows] which rows of the input they are, or undefined: those from `first` on
};

// What gate gradients are multiplied with: x [some rows, *], and which of all rows goes with the first of these.
struct RowFactor {
  int64_t first = 0;
  Tensor x;
};

// Adds up every gradient that the mask wants from what a scan leaves: the GEMMs of a layer.
class LayerGradients {
 public:
  // `rows`: of the input.
  LayerGradients(const BackwardArguments& arguments, int64_t rows, Products products);

  // What some rows of a direction add, each row once, and the first direction's before the second's. Groups take all
  // rows at once. `states`: the h that entered the steps, zeros in rows that are in none of them.
  void add(int direction, const GateGradients& gates, const std::vector<RowFactor>& states);
  // A projected layer: grad_projected [rows, P], activation [rows, H].
  void add_projection(int direction, const Tensor& grad_projected, const Tensor& activation);
  // In the order of input, hx, weights; that of the input as [rows, I], with anything in rows that were never added.
  // grad_first: [D, N, G*H] recurrent gate gradients of each row's first step, undefined if no state wants them. carry:
  // [D, N, H] dc_0, or what flows to h_0 element by element. empty_rows: bool [N, 1], which rows have no step at all,
  // undefined if none; their initial state is their final one.
  Tensors finish(const Tensor& grad_first, const Tensor& carry, const Tensor& empty_rows);

 private:
  Tensor& weight(int index) { return result_[1 + a_.hx.size() + index]; }
  void add_input(int direction, const GateGradients& gates);
  void add_gates(Tensor& sum, bool begun, const Tensor& grad, const Tensor& w) const;
  void add_outer(Tensor& sum, int64_t first, const std::vector<Tensor>& parts,
                 const std::vector<RowFactor>& factors) const;
  void add_term(Tensor& slice, bool begun, const Tensor& factor, const Tensor& x) const;
  void add_sum(Tensor& sum, const std::vector<Tensor>& parts) const;
  void add_parts(Tensor& sum, bool begun, const Tensor& a, const Tensor& b) const;
  bool same_bias(int direction) const;
  Tensor allocate_sum(int64_t rows, int64_t columns, const at::TensorOptions& options) const;
  Tensor grouped(const Tensor& rows) const;

  const BackwardArguments& a_;
  const int64_t rows_;
  const Products products_;
  Tensors result_;
};

}  // namespace fastrnn
