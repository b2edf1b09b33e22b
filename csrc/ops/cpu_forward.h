// A layer's forward scan on the CPU: tensors to params, and the GEMMs before it.
#pragma once

#include "ops/cpu_gemm.h"
#include "ops/cpu_layer.h"
#include "ops/cpu_memory.h"

namespace fastrnn {

// One call. Computes in T. Weights and output stay in the type of the layer: the scan converts them as it packs,
// multiplies or writes them. What a scan is given is made first, and all that is called between is the scan.
template <class T>
class LayerForward {
 public:
  // `result`: what it fills. Layout and table have to outlive it.
  LayerForward(const CpuProblem& problem, int threads, CellKind kind, const Layout& layout, const RowTable& table,
               const Tensor& input, TensorList hx, TensorList weights, LayerResult result, bool need_reserve)
      : layout_(layout),
        table_(table),
        sizes_(layout),
        kernels_(cpu_kernels().get<T>(kind)),
        scan_(make_scan(kind, problem, table, threads)),
        result_(std::move(result)),
        need_reserve_(need_reserve),
        weights_(contiguous(weights)) {
    for (const Tensor& state : hx) hx_.push_back(as<T>(state));
    allocate_gates(traits(kind));
    const bool as_stored = scan_.plan.parts > 0 || scan_.plan.ahead > 0;  // the scan converts it
    input_ = as_stored && scan_.plan.multiplies_input() ? input.contiguous() : as<T>(input);
    for (int d = 0; d < layout.directions; ++d) {
      set_params(traits(kind), d);
      if (scan_.plan.multiplies_input()) {
        params_[d].w_ih = stored<T>(weights_[layout.w_ih(d)]);
        params_[d].input = stored<T>(input_);
      } else if (table.total() > 0) {
        project(traits(kind), threads, d);
      }
    }
  }

  // Beside other layers of its stack: see Scan.
  void place_between(const Progress* below, Progress* own) {
    TORCH_INTERNAL_ASSERT(below == nullptr || scan_.plan.multiplies_input(), "a GEMM would read what is not there yet");
    scan_.below = below;
    scan_.progress = own;
  }
  int64_t scratch_bytes() const { return kernels_.forward_scratch(scan_); }
  void run(void* scratch) const { kernels_.forward(scan_, params_, scratch); }

  // What it has left, in T but for the output; nothing if all has to be done again with Parts::kNone.
  std::optional<Tensors> finish() {
    clear_padding(table_, result_.output);
    if (scan_.plan.parts > 1 && has_nan(result_.output)) return std::nullopt;
    clear_padding(table_, result_.cells);
    if (need_reserve_) clear_padding(table_, gates_);
    return result_.with_reserve(need_reserve_ ? gates_ : empty({0}, states_options()));
  }

 private:
  at::TensorOptions states_options() const { return result_.output.options().dtype(scalar_type<T>); }

  // The input projection's buffer is the reserve: its first G columns, in units of H, turn into the activated gates.
  // Where the scan multiplies the input itself, and nothing is saved, there is no buffer.
  void allocate_gates(const CellTraits& cell) {
    columns_ = sizes_.units * (need_reserve_ ? layout_.reserve_columns_in_units(scan_.kind) : cell.gates);
    if (scan_.plan.multiplies_input() && !need_reserve_) return;
    gates_ = with_huge_pages(result_.allocate_gates(sizes_, columns_, states_options()));
  }

  void set_params(const CellTraits& cell, int d) {
    const Layout& l = layout_;
    const Sizes& z = sizes_;
    ForwardParams<T>& p = params_[d];
    p.reverse = d == 1;
    p.w_hh = stored<T>(weights_[l.w_hh(d)]);
    if (l.projected) p.w_hr = stored<T>(weights_[l.w_hr(d)]);
    const int64_t bias_width = (cell.gates + cell.separate) * z.units;
    if (d == 0) bias_ = temporary(l.directions * bias_width * static_cast<int64_t>(sizeof(T)));
    T* const bias = static_cast<T*>(bias_.get()) + d * bias_width;
    const Tensor b_ih = l.biases ? as<T>(weights_[l.b_ih(d)]) : Tensor();
    const Tensor b_hh = l.biases ? as<T>(weights_[l.b_hh(d)]) : Tensor();
    sum_biases(cell.gates, cell.separate, z.units, data<T>(b_ih), data<T>(b_hh), bias);
    p.bias = bias;
    if (!hx_.empty()) p.h0 = direction(data<T>(hx_[0]), d, z.batch * z.outputs);
    if (hx_.size() > 1) p.c0 = direction(data<T>(hx_[1]), d, z.batch * z.units);
    if (gates_.defined()) p.gates = gates_.mutable_data_ptr<T>() + d * table_.total() * columns_;
    p.gates_stride = columns_;
    p.save = need_reserve_;
    p.output = Written<T>(result_.output.mutable_data_ptr(), storage_of(result_.output)).from(d * z.outputs);
    p.output_stride = z.directions * z.outputs;
    p.h_n = result_.h_n.mutable_data_ptr<T>() + d * z.batch * z.outputs;
    if (result_.c_n.defined()) p.c_n = result_.c_n.mutable_data_ptr<T>() + d * z.batch * z.units;
    if (result_.cells.defined()) {
      p.cells = result_.cells.mutable_data_ptr<T>() + d * z.units;
      p.cells_stride = z.directions * z.units;
    }
  }

  // What the scan does not multiply itself: the input, and of a single step the initial state.
  void project(const CellTraits& cell, int threads, int d) {
    const Sizes& z = sizes_;
    const int64_t rows = table_.total();
    Tensor projection = columns_of(gates_.select(0, d).view({rows, columns_}), 0, cell.gates * z.units);
    multiply<T>(scan_.plan.parts, threads, projection, false, input_.view({rows, z.inputs}),
                as<T>(weights_[layout_.w_ih(d)]).t());
    if (scan_.plan.recurrent != Recurrent::kProduct || params_[d].h0 == nullptr) return;
    initial_[d] = at::empty({z.batch, cell.gates * z.units}, states_options());
    multiply<T>(scan_.plan.parts, threads, initial_[d], false, hx_[0].select(0, d),
                as<T>(weights_[layout_.w_hh(d)]).t());
    params_[d].product = data<T>(initial_[d]);
  }

  const Layout& layout_;
  const RowTable& table_;
  const Sizes sizes_;
  const ScanKernels<T>& kernels_;
  Scan scan_;
  LayerResult result_;
  const bool need_reserve_;
  int64_t columns_ = 0;  // of gates_
  const Tensors weights_;  // contiguous
  Tensors hx_;
  Tensor input_, gates_;
  Tensor initial_[2];  // [N, G*H] products of the initial states
  at::DataPtr bias_;   // [D][(G+S)*H]
  ForwardParams<T> params_[2];
};

}  // namespace fastrnn
