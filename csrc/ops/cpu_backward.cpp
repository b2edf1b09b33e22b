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

template <class T>
Tensors backward(CellKind kind, const Layout& l, const OptionalTensors& grad_outputs, const Tensor& input,
                 const Tensors& hx, const Tensors& weights, const RowTable& table, const Tensor& output,
                 const Tensor& stored_reserve, bool batch_first, const Mask& mask, int64_t groups, Parts parts) {
  const CellTraits& cell = traits(kind);
  const Sizes z(l);
  const auto options = input.options().dtype(scalar_type<T>);
  const Rows& rows = table.rows();
  const int64_t total = table.total(), directions = l.directions;
  constexpr int64_t kFewRows = 4;
  const bool in_bf16 = input.scalar_type() == at::kBFloat16 && (cpu_machine(1).bf16 || total <= kFewRows);
  const auto product = in_bf16 ? at::kBFloat16 : scalar_type<T>;
  // a window's rows must follow one another, and what they add to a sum must not be rounded to bfloat16
  const bool in_order = rows.batch_stride == 1 || z.batch == 1 || table.padded();
  const bool in_windows = in_order && groups == 0 && !in_bf16;
  CpuProblem problem = cpu_problem(kind, l, table.ragged(), storage_of(input), parts);
  problem.backward = true;
  problem.in_windows = in_windows;
  const Scan scan = make_scan(kind, problem, table, cpu_threads());
  const bool rounded = in_bf16 && scan.plan.parts == 1;  // all that is made of the gate gradients are such products

  // Rows beyond a length are left out of every product, so that nothing of them, NaN included, enters one: gradients lie
  // row after row as the scan visits them. Groups need all rows where they were, and zeros in those.
  const std::optional<Tensor> valid = table.valid_rows();
  const bool dense = valid && groups == 0;
  const std::vector<int64_t> visited = dense || scan.plan.window > 0 ? table.visited_before() : std::vector<int64_t>();
  const int64_t* offset = dense ? visited.data() : nullptr;  // [T] the row of a step's first gradient
  const int64_t count = dense ? valid->numel() : total;
  const StepRange all{0, z.steps, 0, count};
  const auto places = [&](const StepRange& range) { return valid->narrow(0, range.first, range.rows); };
  const auto select = [&](const Tensor& data, const StepRange& range) {  // [total, columns] -> [range.rows, columns]
    if (!valid) return to_type(rows_of(data, range.first, range.rows), product);
    if (dense) return data.index_select(0, places(range)).to(product);
    const Tensor kept = data.index_select(0, *valid).to(product);
    return zeros(data.sizes(), kept.options()).index_copy_(0, *valid, kept);
  };

  Tensors factors(weights.size());
  const Tensor x = input.reshape({total, z.inputs});
  BackwardArguments a{kind, l, z, {}, hx, factors, batch_first, mask, groups};
  for (int d = 0; d < l.directions; ++d) {
    if (a.wants_input()) factors[l.w_ih(d)] = to_type(weights[l.w_ih(d)], product);
    if (a.wants_state(0)) factors[l.w_hh(d)] = to_type(weights[l.w_hh(d)], product);
  }
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    const Tensor grad = or_undefined(grad_outputs.get(i));
    const bool as_stored = i == 0 && grad.defined();  // the output's, which the scan converts
    a.grads.push_back(as_stored ? grad.contiguous() : as<T>(grad));
  }
  const Tensor reserve = as<T>(stored_reserve);
  const Tensor h0 = cell.carries_h && !hx.empty() ? as<T>(hx[0]) : Tensor();
  const Tensor c0 = hx.size() > 1 ? as<T>(hx[1]) : Tensor();
  const Tensors& grads = a.grads;
  const bool has_cell = cell.states > 1;
  const bool has_steps = grads.size() > static_cast<size_t>(1 + cell.states);

  const int64_t gate_columns = (cell.gates + cell.separate) * z.units;
  const int64_t together = (cell.gates - cell.separate) * z.units;
  const int64_t reserve_columns = reserve.size(-1);
  const auto allocate = [&](int64_t height, int64_t columns, at::ScalarType type) {
    const auto of = options.dtype(type);
    return with_huge_pages(valid && !dense ? zeros({height, columns}, of) : empty({height, columns}, of));
  };
  const auto gate_type = rounded ? product : scalar_type<T>;
  std::optional<Windows> windows;
  if (scan.plan.window > 0) windows.emplace(rows, visited, scan.plan.window);
  Tensor all_gates[2];  // [rows, (G+S)*H]
  if (windows) all_gates[0] = all_gates[1] = allocate(windows->rows(), gate_columns, gate_type);

  BackwardParams<T> params[2];
  Tensor grad_projected[2];
  const Tensor carry = zeros({directions, z.batch, z.units}, options);
  const Tensor grad_first = a.wants_states() ? empty({directions, z.batch, cell.gates * z.units}, options) : Tensor();
  for (int d = 0; d < l.directions; ++d) {
    if (!windows) all_gates[d] = allocate(count, gate_columns, gate_type);
    if (l.projected) grad_projected[d] = allocate(count, z.outputs, scalar_type<T>);
    BackwardParams<T>& p = params[d];
    p.reverse = d == 1;
    p.w_hh = stored<T>(weights[l.w_hh(d)]);
    if (l.projected) p.w_hr = stored<T>(weights[l.w_hr(d)]);
    p.reserve = direction(data<T>(reserve), d, total * reserve_columns);
    p.reserve_stride = reserve_columns;
    if (cell.carries_h) p.output = direction(stored<T>(output), d, z.outputs);  // h before each step
    p.output_stride = directions * z.outputs;
    p.h0 = direction(data<T>(h0), d, z.batch * z.outputs);
    p.c0 = direction(data<T>(c0), d, z.batch * z.units);
    p.grad_output = direction(stored<T>(grads[0]), d, z.outputs);
    p.grad_output_stride = directions * z.outputs;
    p.grad_h_n = direction(data<T>(grads[1]), d, z.batch * z.outputs);
    if (has_cell) p.grad_c_n = direction(data<T>(grads[2]), d, z.batch * z.units);
    if (has_steps) {
      p.grad_cells = direction(data<T>(grads[3]), d, z.units);
      p.grad_cells_stride = directions * z.units;
    }
    p.grad_offset = windows ? windows->offset() : offset;
    if (rounded) {
      p.rounded_gates = all_gates[d].mutable_data_ptr<at::BFloat16>();
    } else {
      p.grad_gates = all_gates[d].mutable_data_ptr<T>();
    }
    if (l.projected) p.grad_projected = grad_projected[d].mutable_data_ptr<T>();
    p.carry = carry.mutable_data_ptr<T>() + d * z.batch * z.units;
    if (grad_first.defined()) p.grad_first = grad_first.mutable_data_ptr<T>() + d * z.batch * cell.gates * z.units;
  }

  Products products;
  products.scatter = copy_to_places;
  if (product == scalar_type<T>) {
    if (scan.plan.parts <= 1) products.narrow = own_gemm() ? 64 : 256;
    products.add = [parts = scan.plan.parts](Tensor& sum, bool begun, const Tensor& a, const Tensor& b) {
      multiply<T>(parts, cpu_threads(), sum, begun, a, b);
    };
    products.sum = [](Tensor& sum, bool begun, const Tensor& rows) { add_rows<T>(cpu_threads(), sum, begun, rows); };
  }
  LayerGradients gradients(a, total, products);
  // the h that entered some steps
  const auto states = [&](int d, const StepRange& range) -> std::vector<RowFactor> {
    if (!a.wants_weight(l.w_hh(d))) return {};
    const Tensor initial = hx.empty() ? Tensor() : hx[0].select(0, d);
    if (table.ragged() || rows.reset != nullptr || rows.batch_stride != 1 || groups > 0) {
      return {{range.first, copy_previous(rows, range, offset, output, d, initial, z.outputs).to(product)}};
    }
    // the output itself, a step further on, but for a direction's first step: nothing is copied
    const int64_t later = total - z.batch, before = d == 0 ? z.batch : 0, after = z.batch - before;
    const int64_t begin = std::clamp(range.first, before, before + later);
    const int64_t end = std::clamp(range.first + range.rows, begin, before + later);
    const Tensor own = columns_of(output.view({total, directions * z.outputs}), d * z.outputs, z.outputs);
    std::vector<RowFactor> factors{{begin, to_type(rows_of(own, begin - before + after, end - begin), product)}};
    if (initial.defined()) factors.push_back({d == 0 ? 0 : later, to_type(initial, product)});
    return factors;
  };
  // data: [range.rows, (G+S)*H]
  const auto add = [&](int d, const StepRange& range, const Tensor& data) {
    const Tensor gates = to_type(data, product);
    GateGradients of{range.first, columns_of(gates, 0, cell.gates * z.units), {columns_of(gates, 0, together)}, {}, {}};
    // the separate gates have their recurrent parts behind those of all gates
    if (cell.separate > 0) of.recurrent.push_back(columns_of(gates, cell.gates * z.units, cell.separate * z.units));
    if (a.wants_weight(l.w_ih(d))) of.x = select(x, range);
    if (dense && a.wants_input()) of.places = places(range);
    gradients.add(d, of, states(d, range));
  };
  const auto& kernels = cpu_kernels().get<T>(kind);
  if (windows) {
    Scan one = scan;
    one.directions = 1;
    const Scratch scratch(kernels.backward_scratch(one));
    for (int d = 0; d < l.directions; ++d) {
      windows->each(one, d == 1, all_gates[d], [&](const Scan& window, const StepRange& range, const Tensor& gates) {
        kernels.backward(window, &params[d], scratch.get());
        add(d, range, gates);
      });
    }
  } else {
    kernels.backward(scan, params, Scratch(kernels.backward_scratch(scan)).get());
    for (int d = 0; d < l.directions; ++d) {
      add(d, all, all_gates[d]);
      if (l.projected) {
        const Tensor saved = reserve.select(0, d).view({total, reserve_columns});
        gradients.add_projection(d, grad_projected[d].to(product),
                                 select(columns_of(saved, cell.saved * z.units, z.units), all));
      }
    }
  }

  Tensor empty_rows;
  if (valid) {
    empty_rows = at::empty({z.batch, 1}, at::kBool);
    for (int64_t n = 0; n < z.batch; ++n) empty_rows.mutable_data_ptr<bool>()[n] = rows.length[n] == 0;
  }
  Tensors result = gradients.finish(grad_first.defined() ? to_type(grad_first, product) : grad_first, carry,
                                    empty_rows);
  if (dense) clear_padding(table, result[0]);
  if (scan.plan.parts > 1 && std::any_of(result.begin(), result.end(), has_nan)) return {};
  if (a.wants_input()) result[0] = result[0].view(input.sizes());
  return result;
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
    const Tensors states = contiguous(hx), w = contiguous(weights);
    const auto run = [&](Parts parts) {
      return backward<T>(kind, l, grad_outputs, input, states, w, table, output.contiguous(), reserve, batch_first,
                         mask, groups, parts);
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
