// The forward ops on the CPU.
#include "ops/cpu_forward.h"

#include <torch/library.h>

namespace fastrnn {
namespace {

template <CellKind kind>
Tensors layer(const Tensor& input, TensorList hx, TensorList weights, const OptionalTensor& lengths,
              const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool bidirectional, bool batch_first,
              bool need_steps, bool need_reserve) {
  const Layout l = check_layer(kind, input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first);
  const RowTable table(l, input, lengths, reset, batch_sizes, batch_first);
  return with_type(input, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](Parts parts) {
      const CpuProblem problem = cpu_problem(kind, l, table.ragged(), storage_of(input), parts);
      LayerForward<T> call(problem, cpu_threads(), kind, l, table, input, hx, weights,
                           LayerResult(kind, Sizes(l), input.sizes(), input.options(), scalar_type<T>, need_steps),
                           need_reserve);
      call.run(Scratch(call.scratch_bytes()).get());
      return call.finish();
    };
    std::optional<Tensors> results = run(Parts::kAllowed);
    if (!results) results = run(Parts::kNone);
    for (size_t i = 0; i + 1 < results->size(); ++i) results->at(i) = to_type(results->at(i), input.scalar_type());
    return *std::move(results);
  });
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  for_each_cell([&]<CellKind kind>() { m.impl((std::string(name_of(kind)) + "_layer").c_str(), layer<kind>); });
}

}  // namespace
}  // namespace fastrnn
