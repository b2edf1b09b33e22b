// What takes no tensor, and streaming sessions. Importing this module also registers the ops.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "core/plan_cuda.h"
#include "cpu/kernels.h"
#include "ops/ops.h"
#include "ops/streaming.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = FASTRNN_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef FASTRNN_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  py::list capabilities;
#ifdef FASTRNN_X86
  capabilities.append("avx512");
  capabilities.append("avx2");
#endif
  capabilities.append("default");
  info["cpu_capabilities"] = capabilities;
  return info;
}

py::dict plan(const std::string& cell, int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size,
              int64_t proj_size, int directions, int element_size, bool training, int threads, bool ragged) {
  const bool projected = proj_size > 0;
  const CpuProblem problem{
      .gates = traits(kind_of(cell)).gates,
      .steps = steps,
      .batch = batch,
      .shape = {input_size, hidden_size, projected ? proj_size : hidden_size, projected},
      .directions = directions,
      .element_size = element_size,
      .ragged = ragged,
      .backward = false,
  };
  const CpuMachine machine{threads, l2_cache_bytes()};
  const CpuPlan forward = plan_cpu(problem, machine);
  py::dict result;
  result["recurrent"] = forward.recurrent == Recurrent::kPacked    ? "packed"
                        : forward.recurrent == Recurrent::kNatural ? "natural"
                                                                   : "product";
  result["fused_input"] = forward.fused_input;
  result["threads"] = forward.threads;
  result["shard"] = forward.threads <= directions ? "none" : forward.shard_units ? "units" : "batch";
  if (training) {
    CpuProblem backward = problem;
    backward.backward = true;
    const CpuPlan p = plan_cpu(backward, machine);
    result["backward_threads"] = p.threads;
    result["backward_shard"] = p.threads <= directions ? "none" : p.shard_units ? "units" : "batch";
  }
  return result;
}

py::list cuda_plans(const std::string& cell, int64_t steps, int64_t batch, int64_t hidden_size, int directions,
                    int element_size, bool training, bool backward, const std::string& device_name) {
  const CellTraits& t = traits(kind_of(cell));
  const CudaProblem problem{
      .gates = t.gates,
      .separate = t.separate,
      .saved = t.saved,
      .steps = steps,
      .batch = batch,
      .units = hidden_size,
      .directions = directions,
      .element_size = element_size,
      .training = training,
      .backward = backward,
  };
  const CudaDevice device = cuda_device(device_name);
  const auto add = [](py::list& to, const CudaPlan& p, double microseconds) {
    static constexpr const char* kTiers[] = {"stepwise", "block", "cluster"};
    static constexpr const char* kExchanges[] = {"block", "async", "cluster barrier"};
    py::dict plan;
    plan["tier"] = kTiers[static_cast<int>(p.tier)];
    plan["exchange"] = kExchanges[static_cast<int>(p.exchange)];
    plan["cluster"] = p.cluster;
    plan["threads"] = p.threads;
    plan["rows"] = kMatrixColumns * p.batch_groups;
    plan["units"] = p.units;
    plan["row_tiles"] = p.row_tiles;
    plan["register_steps"] = p.register_steps;
    plan["shared_steps"] = p.shared_steps;
    plan["shared_bytes"] = p.shared_bytes;
    plan["clusters"] = p.clusters;
    plan["at_once"] = p.at_once;
    plan["microseconds"] = microseconds;
    to.append(std::move(plan));
  };
  py::list all;
  for (const CudaPlan& plan : persistent_plans(problem, device)) add(all, plan, plan.step_microseconds);
  add(all, CudaPlan{}, stepwise_microseconds(problem, device));
  return all;
}

}  // namespace
}  // namespace fastrnn

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastrnn;
  m.doc() = "The native core of fastrnn.";
  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return cpu_kernels().name; });
  m.def("plan", &plan, py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("directions") = 1, py::arg("element_size") = 4,
        py::arg("training") = false, py::arg("threads") = 1, py::arg("ragged") = false);
  bind_streaming(m);
  m.def("cuda_plans", &cuda_plans,
        "The plans of a layer's scan on a named device, the fastest persistent one first (the K of "
        "FASTRNN_CUDA_PLAN=persistent:K), the step-by-step loop last; with predicted microseconds a step.",
        py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("hidden_size"), py::arg("directions") = 1,
        py::arg("element_size") = 2, py::arg("training") = false, py::arg("backward") = false,
        py::arg("device") = "h200");
}
