#include "ops/cpu_stack.h"

#include <ATen/record_function.h>

#include "cpu/threads.h"
#include "ops/autograd.h"
#include "ops/cpu_forward.h"

namespace fastrnn {
namespace {

// Would the dispatcher come to the kernels of the CPU with nothing left to do before them?
bool straight_to_cpu(TensorList tensors) {
  constexpr c10::DispatchKeySet kNothingElse({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                              c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  c10::DispatchKeySet keys = local.included_;
  for (const Tensor& t : tensors) keys = keys | t.key_set();
  keys = keys - local.excluded_ - kNothingElse;
  const bool cpu = std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.is_cpu(); });
  return cpu && keys.highestFunctionalityKey() == c10::DispatchKey::Undefined && !any_requires_grad(tensors) &&
         !any_has_tangent(tensors);
}

// For what each layer has of it: [1, N, *] -> [L, N, *].
Tensor of_layers(const Tensor& state, int64_t layers) {
  return empty({layers, state.size(1), state.size(2)}, state.options());
}

// Which tensors of the stack are a layer's.
struct Stack {
  int64_t layers;
  TensorList hx;       // each [L, N, *]
  TensorList weights;  // layer by layer

  Tensors hx_of(int64_t layer) const {
    Tensors states;
    for (const Tensor& state : hx) states.push_back(rows_of(state, layer, 1));
    return states;
  }
  TensorList weights_of(int64_t layer) const {
    const size_t count = weights.size() / layers;
    return weights.slice(layer * count, count);
  }
};

// Has each layer as many units and outputs as the first, and the same kinds of weights? Sizes of all but W_ih.
bool alike(const Stack& stack) {
  for (int64_t layer = 1; layer < stack.layers; ++layer) {
    for (size_t i = 1; i < stack.weights_of(0).size(); ++i) {
      if (stack.weights_of(layer)[i].sizes() != stack.weights_of(0)[i].sizes()) return false;
    }
  }
  return true;
}

// Nothing if all has to be done again with Parts::kNone. check(input, layer): its arguments.
template <class T, class Check>
std::optional<Tensors> run(CellKind kind, const Stack& stack, const Tensor& input, const RowTable& table, Parts parts,
                           const Check& check) {
  const int64_t layers = stack.layers;
  std::vector<Layout> layouts;
  std::vector<LayerForward<T>> calls;
  layouts.reserve(layers);
  calls.reserve(layers);
  std::vector<Progress> progress(layers);
  std::vector<int64_t> scratch_at{0};
  Tensors results;
  Tensor x = input;
  for (int64_t i = 0; i < layers; ++i) {
    const Layout& layout = layouts.emplace_back(check(x, i));
    LayerResult result(kind, Sizes(layout), x.sizes(), x.options(), scalar_type<T>, false);
    if (i == 0) {
      results = {Tensor(), of_layers(result.h_n, layers)};
      if (result.c_n.defined()) results.push_back(of_layers(result.c_n, layers));
    }
    result.h_n = rows_of(results[1], i, 1);
    if (result.c_n.defined()) result.c_n = rows_of(results[2], i, 1);
    results[0] = result.output;
    CpuProblem problem = cpu_problem(kind, layout, table.ragged(), storage_of(input), parts);
    problem.beside = true;
    calls.emplace_back(problem, 1, kind, layout, table, x, stack.hx_of(i), stack.weights_of(i), std::move(result),
                       false);
    calls.back().place_between(i > 0 ? &progress[i - 1] : nullptr, i + 1 < layers ? &progress[i] : nullptr);
    scratch_at.push_back(scratch_at.back() + calls.back().scratch_bytes());
    x = results[0];
  }

  const Scratch scratch(scratch_at.back());
  // In the order of the layers, a thread waits for none that it would come to later: any number of threads gets through.
  run_team(static_cast<int>(std::min<int64_t>(cpu_threads(), layers)), [&](int member, int members) {
    for (int64_t i = member; i < layers; i += members) calls[i].run(static_cast<char*>(scratch.get()) + scratch_at[i]);
  });
  for (LayerForward<T>& call : calls) {
    if (!call.finish()) return std::nullopt;
  }
  return results;
}

}  // namespace

bool may_run_side_by_side(int64_t layers, const Tensor& input, bool batch_first) {
  if (layers < 2 || cpu_threads() < 2 || !straight_to_cpu(input)) return false;  // of others sizes may not be asked
  return input.dim() != 3 || input.size(batch_first ? 1 : 0) >= kStepsBeside;  // of packed rows the steps don't show
}

std::optional<Tensors> layers_side_by_side(CellKind kind, int64_t layers, const Tensor& input, TensorList hx,
                                           TensorList weights, const OptionalTensor& lengths,
                                           const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                                           bool batch_first) {
  // what is wrong with the number of tensors, or their sizes, is said where layers are called each
  if (weights.empty() || weights.size() % layers != 0) return std::nullopt;
  for (const Tensor& state : hx) {
    if (state.dim() != 3 || state.size(0) != layers) return std::nullopt;
  }
  const bool straight = straight_to_cpu(hx) && straight_to_cpu(weights) && (!lengths || straight_to_cpu(*lengths)) &&
                        (!reset || straight_to_cpu(*reset)) && (!batch_sizes || straight_to_cpu(*batch_sizes));
  const Stack stack{layers, hx, weights};
  if (!straight || !alike(stack)) return std::nullopt;

  const auto check = [&](const Tensor& x, int64_t layer) {
    return check_layer(kind, x, stack.hx_of(layer), stack.weights_of(layer), lengths, reset, batch_sizes, false,
                       batch_first);
  };
  const Layout first = check(input, 0);
  Layout above = first;
  above.inputs = first.outputs;
  std::optional<RowTable> table;
  const auto read_rows = [&] { table.emplace(first, input, lengths, reset, batch_sizes, batch_first); };
  if (lengths || batch_sizes) read_rows();
  const auto problem = [&](const Layout& layout) {
    return cpu_problem(kind, layout, table && table->ragged(), storage_of(input), Parts::kAllowed);
  };
  if (!side_by_side(problem(first), problem(above), layers, cpu_machine(cpu_threads()))) return std::nullopt;
  if (!table) read_rows();
  RECORD_FUNCTION(std::string("fastrnn::") + name_of(kind) + "_layers", std::vector<c10::IValue>{input});
  return with_type(input, [&](auto zero) {
    using T = decltype(zero);
    std::optional<Tensors> results = run<T>(kind, stack, input, *table, Parts::kAllowed, check);
    if (!results) results = run<T>(kind, stack, input, *table, Parts::kNone, check);
    for (Tensor& t : *results) t = to_type(t, input.scalar_type());
    return results;
  });
}

}  // namespace fastrnn
