// The backward ops on the CPU: tensors to params, and the GEMMs after the scan.
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/capability.h"
#include "ops/cpu_gemm.h"
#include "ops/cpu_layer.h"
#include "ops/cpu_memory.h"
#include "ops/windows.h"

namespace fastrnn {
namespace {

// index_copy_ takes twice as long, element by element.
void copy_to_places(Tensor& to, const Tensor& places, const Tensor& from) {
  const int64_t row_bytes = from.size(1) * from.element_size();
  const int64_t* const place = places.const_data_ptr<int64_t>();
  const auto* const begin = static_cast<const char*>(from.const_data_ptr());
  auto* const data = static_cast<char*>(to.mutable_data_ptr());
  for_steps(from.size(0), row_bytes, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memcpy(data + place[i] * row_bytes, begin + i * row_bytes, row_bytes);
  });
}

// The h that entered each of some steps, as a copy: [range.rows, outputs], zeros where none did. Row i of a step's
// order goes to row offset[t] + i, or without offsets to where its output is, less range.first.
Tensor copy_previous(const Rows& rows, const StepRange& range, const int64_t* offset, const Tensor& output, int d,
                     const Tensor& h0, int64_t width) {
  Tensor previous = zeros({range.rows, width}, output.options());
  const bool reverse = d == 1;
  const int64_t row_bytes = width * output.element_size(), stride = output.size(-1) * output.element_size();
  auto* to = static_cast<char*>(previous.mutable_data_ptr());
  const auto* from = static_cast<const char*>(output.const_data_ptr()) + d * row_bytes;
  const auto* initial = h0.defined() ? static_cast<const char*>(h0.const_data_ptr()) : nullptr;
  for_steps(range.end - range.begin, rows.batch * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t t = range.begin + begin; t < range.begin + end; ++t) {
      for (int64_t i = 0; i < rows.active[t]; ++i) {
        const int64_t n = rows.order[i];
        const Sequence sequence = rows.sequence(n);
        const char* source = sequence.flows(t, reverse) ? from + rows.row(reverse ? t + 1 : t - 1, n) * stride
                             : sequence.enters(t, reverse) && initial != nullptr ? initial + n * row_bytes
                                                                                 : nullptr;
        const int64_t row = (offset == nullptr ? rows.row(t, n) : offset[t] + i) - range.first;
        if (source != nullptr) std::memcpy(to + row * row_bytes, source, row_bytes);
      }
    }
  });
  return previous;
}

// One call. Computes in T; weights, states and inputs are multiplied in bfloat16 where the layer has that and the machine
// can.
template <class T>
class LayerBackward {
 public:
  // hx, weights and output: contiguous. All but `parts` has to outlive it.
  LayerBackward(CellKind kind, const Layout& layout, const RowTable& table, const OptionalTensors& grad_outputs,
                const Tensor& input, const Tensors& hx, const Tensors& weights, const Tensor& output,
                const Tensor& reserve, bool batch_first, const Mask& mask, int64_t groups, Parts parts)
      : cell_(traits(kind)),
        layout_(layout),
        sizes_(layout),
        table_(table),
        input_(input),
        output_(output),
        weights_(weights),
        arguments_{kind, layout_, sizes_, {}, hx, factors_, batch_first, mask, groups},
        product_(product_type(input, table)),
        scan_(make_scan(kind, problem(parts), table, cpu_threads())),
        valid_(table.valid_rows()),
        dense_(valid_ && groups == 0),
        x_(input.reshape({table.total(), sizes_.inputs})),
        reserve_(as<T>(reserve)),
        h0_(cell_.carries_h && !hx.empty() ? as<T>(hx[0]) : Tensor()),
        c0_(hx.size() > 1 ? as<T>(hx[1]) : Tensor()) {
    read_arguments(grad_outputs);
    allocate();
    for (int d = 0; d < layout.directions; ++d) set_params(d);
  }
  LayerBackward(const LayerBackward&) = delete;  // arguments_ points into it
  LayerBackward& operator=(const LayerBackward&) = delete;

  // In the order of input, hx, weights; none if all has to be done again with Parts::kNone.
  Tensors run() {
    LayerGradients gradients(arguments_, table_.total(), products());
    const auto& kernels = cpu_kernels().get<T>(arguments_.kind);
    if (windows_) {
      Scan one = scan_;
      one.directions = 1;
      const Scratch scratch(kernels.backward_scratch(one));
      for (int d = 0; d < layout_.directions; ++d) {
        windows_->each(one, d == 1, gates_[d], [&](const Scan& window, const StepRange& range, const Tensor& gates) {
          kernels.backward(window, &params_[d], scratch.get());
          add(gradients, d, range, gates);
        });
      }
    } else {
      kernels.backward(scan_, params_, Scratch(kernels.backward_scratch(scan_)).get());
      const StepRange all{0, sizes_.steps, 0, count()};
      for (int d = 0; d < layout_.directions; ++d) {
        add(gradients, d, all, gates_[d]);
        if (layout_.projected) gradients.add_projection(d, projected_[d].to(product_), select(activations(d), all));
      }
    }
    return finish(gradients);
  }

 private:
  static at::ScalarType product_type(const Tensor& input, const RowTable& table) {
    constexpr int64_t kFewRows = 4;
    const bool in_bf16 = input.scalar_type() == at::kBFloat16 && (cpu_machine(1).bf16 || table.total() <= kFewRows);
    return in_bf16 ? at::kBFloat16 : scalar_type<T>;
  }
  bool in_bf16() const { return product_ != scalar_type<T>; }
  // All that is made of the gate gradients are products of bfloat16.
  bool rounded() const { return in_bf16() && scan_.plan.parts == 1; }

  CpuProblem problem(Parts parts) const {
    const Rows& rows = table_.rows();
    CpuProblem problem = cpu_problem(arguments_.kind, layout_, table_.ragged(), storage_of(input_), parts);
    problem.backward = true;
    // a window's rows must follow one another, and what they add to a sum must not be rounded to bfloat16
    const bool in_order = rows.batch_stride == 1 || rows.batch == 1 || table_.padded();
    problem.in_windows = in_order && arguments_.groups == 0 && !in_bf16();
    return problem;
  }

  void read_arguments(const OptionalTensors& grad_outputs) {
    const Layout& l = layout_;
    factors_.resize(weights_.size());
    for (int d = 0; d < l.directions; ++d) {
      if (arguments_.wants_input()) factors_[l.w_ih(d)] = to_type(weights_[l.w_ih(d)], product_);
      if (arguments_.wants_state(0)) factors_[l.w_hh(d)] = to_type(weights_[l.w_hh(d)], product_);
    }
    for (size_t i = 0; i < grad_outputs.size(); ++i) {
      const Tensor grad = readable_gradient(grad_outputs.get(i));
      const bool as_stored = i == 0 && grad.defined();  // the output's, which the scan converts
      arguments_.grads.push_back(as_stored ? to_type(grad, input_.scalar_type()).contiguous() : as<T>(grad));
    }
  }

  // Rows beyond a length are left out of every product, so that nothing of them, NaN included, enters one: gradients lie
  // row after row as the scan visits them. Groups need all rows where they were, and zeros in those.
  int64_t count() const { return dense_ ? valid_->numel() : table_.total(); }
  Tensor places(const StepRange& range) const { return valid_->narrow(0, range.first, range.rows); }
  // [total, columns] -> [range.rows, columns]
  Tensor select(const Tensor& data, const StepRange& range) const {
    if (!valid_) return to_type(rows_of(data, range.first, range.rows), product_);
    if (dense_) return data.index_select(0, places(range)).to(product_);
    const Tensor kept = data.index_select(0, *valid_).to(product_);
    return zeros(data.sizes(), kept.options()).index_copy_(0, *valid_, kept);
  }
  const int64_t* offset() const { return dense_ ? visited_.data() : nullptr; }  // [T] a step's first gradient

  at::TensorOptions options() const { return input_.options().dtype(scalar_type<T>); }
  int64_t gate_columns() const { return (cell_.gates + cell_.separate) * sizes_.units; }

  Tensor allocate_rows(int64_t height, int64_t columns, at::ScalarType type) const {
    const auto of = options().dtype(type);
    return with_huge_pages(valid_ && !dense_ ? zeros({height, columns}, of) : empty({height, columns}, of));
  }
  void allocate() {
    const Sizes& z = sizes_;
    const int64_t window = scan_.plan.window;
    if (dense_ || window > 0) visited_ = table_.visited_before();
    if (window > 0) windows_.emplace(table_.rows(), visited_, window);
    const auto gate_type = rounded() ? product_ : scalar_type<T>;
    for (int d = 0; d < z.directions; ++d) {
      const bool shared = windows_ && d > 0;  // directions in windows come one after the other
      gates_[d] = shared ? gates_[0] : allocate_rows(windows_ ? windows_->rows() : count(), gate_columns(), gate_type);
      if (layout_.projected) projected_[d] = allocate_rows(count(), z.outputs, scalar_type<T>);
    }
    carry_ = zeros({z.directions, z.batch, z.units}, options());
    if (arguments_.wants_states()) grad_first_ = empty({z.directions, z.batch, cell_.gates * z.units}, options());
  }

  void set_params(int d) {
    const Layout& l = layout_;
    const Sizes& z = sizes_;
    const Tensors& grads = arguments_.grads;
    BackwardParams<T>& p = params_[d];
    p.reverse = d == 1;
    p.w_hh = stored<T>(weights_[l.w_hh(d)]);
    if (l.projected) p.w_hr = stored<T>(weights_[l.w_hr(d)]);
    p.reserve_stride = reserve_.size(-1);
    p.reserve = direction(data<T>(reserve_), d, table_.total() * p.reserve_stride);
    if (cell_.carries_h) p.output = direction(stored<T>(output_), d, z.outputs);  // h before each step
    p.output_stride = z.directions * z.outputs;
    p.h0 = direction(data<T>(h0_), d, z.batch * z.outputs);
    p.c0 = direction(data<T>(c0_), d, z.batch * z.units);
    p.grad_output = direction(stored<T>(grads[0]), d, z.outputs);
    p.grad_output_stride = z.directions * z.outputs;
    p.grad_h_n = direction(data<T>(grads[1]), d, z.batch * z.outputs);
    if (cell_.states > 1) p.grad_c_n = direction(data<T>(grads[2]), d, z.batch * z.units);
    if (grads.size() > static_cast<size_t>(1 + cell_.states)) {
      p.grad_cells = direction(data<T>(grads[3]), d, z.units);
      p.grad_cells_stride = z.directions * z.units;
    }
    p.grad_offset = windows_ ? windows_->offset() : offset();
    if (rounded()) {
      p.rounded_gates = gates_[d].mutable_data_ptr<at::BFloat16>();
    } else {
      p.grad_gates = gates_[d].mutable_data_ptr<T>();
    }
    if (l.projected) p.grad_projected = projected_[d].mutable_data_ptr<T>();
    p.carry = carry_.mutable_data_ptr<T>() + d * z.batch * z.units;
    if (grad_first_.defined()) p.grad_first = grad_first_.mutable_data_ptr<T>() + d * z.batch * cell_.gates * z.units;
  }

  Products products() const {
    Products products;
    products.scatter = copy_to_places;
    if (in_bf16()) return products;
    if (scan_.plan.parts <= 1) products.narrow = own_gemm() ? 64 : 256;
    products.add = [parts = scan_.plan.parts](Tensor& sum, bool begun, const Tensor& a, const Tensor& b) {
      multiply<T>(parts, cpu_threads(), sum, begun, a, b);
    };
    products.sum = [](Tensor& sum, bool begun, const Tensor& rows) { add_rows<T>(cpu_threads(), sum, begun, rows); };
    return products;
  }

  // The h that entered some steps.
  std::vector<RowFactor> states(int d, const StepRange& range) const {
    if (!arguments_.wants_weight(layout_.w_hh(d))) return {};
    const Sizes& z = sizes_;
    const Rows& rows = table_.rows();
    const Tensor initial = arguments_.hx.empty() ? Tensor() : arguments_.hx[0].select(0, d);
    if (table_.ragged() || rows.reset != nullptr || rows.batch_stride != 1 || arguments_.groups > 0) {
      const Tensor copy = copy_previous(rows, range, offset(), output_, d, initial, z.outputs);
      return {{range.first, copy.to(product_)}};
    }
    // the output itself, a step further on, but for a direction's first step: nothing is copied
    const int64_t total = table_.total(), later = total - z.batch;
    const int64_t before = d == 0 ? z.batch : 0, after = z.batch - before;
    const int64_t begin = std::clamp(range.first, before, before + later);
    const int64_t end = std::clamp(range.first + range.rows, begin, before + later);
    const Tensor own = columns_of(output_.view({total, z.directions * z.outputs}), d * z.outputs, z.outputs);
    std::vector<RowFactor> factors{{begin, to_type(rows_of(own, begin - before + after, end - begin), product_)}};
    if (initial.defined()) factors.push_back({d == 0 ? 0 : later, to_type(initial, product_)});
    return factors;
  }

  // What a projection made h of: [total, H].
  Tensor activations(int d) const {
    const Tensor saved = reserve_.select(0, d).view({table_.total(), reserve_.size(-1)});
    return columns_of(saved, cell_.saved * sizes_.units, sizes_.units);
  }

  // data: [range.rows, (G+S)*H]
  void add(LayerGradients& gradients, int d, const StepRange& range, const Tensor& data) const {
    const int64_t all = cell_.gates * sizes_.units, separate = cell_.separate * sizes_.units;
    const Tensor gates = to_type(data, product_);
    GateGradients of{range.first, columns_of(gates, 0, all), {columns_of(gates, 0, all - separate)}, {}, {}};
    // the separate gates have their recurrent parts behind those of all gates
    if (separate > 0) of.recurrent.push_back(columns_of(gates, all, separate));
    if (arguments_.wants_weight(layout_.w_ih(d))) of.x = select(x_, range);
    if (dense_ && arguments_.wants_input()) of.places = places(range);
    gradients.add(d, of, states(d, range));
  }

  Tensors finish(LayerGradients& gradients) const {
    Tensor empty_rows;
    if (valid_) {
      empty_rows = at::empty({sizes_.batch, 1}, at::kBool);
      bool* const is_empty = empty_rows.mutable_data_ptr<bool>();
      for (int64_t n = 0; n < sizes_.batch; ++n) is_empty[n] = table_.rows().length[n] == 0;
    }
    Tensors result = gradients.finish(grad_first_.defined() ? to_type(grad_first_, product_) : grad_first_, carry_,
                                      empty_rows);
    if (valid_) clear_padding(table_, result[0]);
    if (scan_.plan.parts > 1 && std::any_of(result.begin(), result.end(), has_nan)) return {};
    if (arguments_.wants_input()) result[0] = result[0].view(input_.sizes());
    return result;
  }

  const CellTraits& cell_;
  const Layout& layout_;
  const Sizes sizes_;
  const RowTable& table_;
  const Tensor &input_, &output_;
  const Tensors& weights_;
  Tensors factors_;  // those weights that gate gradients are multiplied with
  BackwardArguments arguments_;
  const at::ScalarType product_;
  const Scan scan_;
  const std::optional<Tensor> valid_;  // the valid rows in the order of visits, if some are not
  const bool dense_;  // only those have gradients
  std::vector<int64_t> visited_;  // [T+1] valid rows before each step, and all
  const Tensor x_;  // [rows, I]
  const Tensor reserve_, h0_, c0_;
  std::optional<Windows> windows_;
  Tensor gates_[2];  // [rows, (G+S)*H]
  Tensor projected_[2];  // [rows, P]
  Tensor carry_;  // [D, N, H]
  Tensor grad_first_;  // [D, N, G*H]
  BackwardParams<T> params_[2];
};

template <CellKind kind>
Tensors layer_backward(const OptionalTensors& grad_outputs, const Tensor& input, TensorList hx, TensorList weights,
                       const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                       const Tensor& output, const Tensor& reserve, bool bidirectional, bool batch_first,
                       const Mask& mask, c10::SymInt symbolic_groups) {
  const WithoutAutocast guard;
  const Layout l = check_backward(kind, grad_outputs, input, hx, weights, lengths, reset, batch_sizes, output, reserve,
                                  bidirectional, batch_first, mask, symbolic_groups);
  const RowTable table(l, input, lengths, reset, batch_sizes, batch_first);
  check_grad_outputs(kind, l, grad_outputs, input, output);
  const int64_t groups = symbolic_groups.expect_int();
  Tensors result = with_type(input, [&](auto zero) {
    using T = decltype(zero);
    const Tensors states = contiguous(hx), w = contiguous(weights);
    const Tensor h = output.contiguous();
    const auto run = [&](Parts parts) {
      return LayerBackward<T>(kind, l, table, grad_outputs, input, states, w, h, reserve, batch_first, mask, groups,
                              parts)
          .run();
    };
    Tensors gradients = run(Parts::kAllowed);
    return gradients.empty() ? run(Parts::kNone) : gradients;
  });
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = result[i].defined() ? to_type(result[i], input.scalar_type()) : at::empty({0}, input.options());
  }
  return result;
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  for_each_cell(
      [&]<CellKind kind>() { m.impl((std::string(name_of(kind)) + "_layer_backward").c_str(), layer_backward<kind>); });
}

}  // namespace
}  // namespace fastrnn
