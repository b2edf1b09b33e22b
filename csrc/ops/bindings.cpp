// The module: what takes no tensor is here. Importing it also registers the ops.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <map>
#include <stdexcept>

#include "core/plan_cuda.h"
#include "core/tuned_cuda.h"
#include "cpu/capability.h"
#include "cpu/kernels.h"
#include "ops/call.h"
#include "ops/cpu_plan.h"
#include "ops/ops.h"
#include "ops/stepwise.h"
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

CpuProblem layer_problem(const std::string& cell, int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size,
                         int64_t proj_size, int directions, const std::string& dtype, bool ragged) {
  const bool projected = proj_size > 0;
  CpuProblem problem{
      .steps = steps,
      .batch = batch,
      .shape = {input_size, hidden_size, projected ? proj_size : hidden_size, projected},
      .directions = directions,
      .ragged = ragged,
  };
  const std::map<std::string, Storage> storages{{"float32", Storage::kFloat},
                                                {"float64", Storage::kDouble},
                                                {"float16", Storage::kHalf},
                                                {"bfloat16", Storage::kBFloat16}};
  const auto storage = storages.find(dtype);
  if (storage == storages.end()) throw std::invalid_argument("no such dtype: " + dtype);
  describe(kind_of(cell), storage->second, problem);
  return problem;
}

bool plans_side_by_side(const std::string& cell, int64_t layers, int64_t steps, int64_t batch, int64_t input_size,
                        int64_t hidden_size, int64_t proj_size, const std::string& dtype, int threads, bool ragged) {
  const auto problem = [&](int64_t inputs) {
    return layer_problem(cell, steps, batch, inputs, hidden_size, proj_size, 1, dtype, ragged);
  };
  return side_by_side(problem(input_size), problem(proj_size > 0 ? proj_size : hidden_size), layers,
                      cpu_machine(threads));
}

py::dict plan(const std::string& cell, int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size,
              int64_t proj_size, int directions, const std::string& dtype, bool training, int threads, bool ragged,
              bool beside) {
  CpuProblem problem = layer_problem(cell, steps, batch, input_size, hidden_size, proj_size, directions, dtype, ragged);
  problem.beside = beside;
  const CpuMachine machine = cpu_machine(threads);
  const CpuPlan forward = plan_cpu(problem, machine);
  py::dict result;
  result["recurrent"] = forward.recurrent == Recurrent::kPacked    ? "packed"
                        : forward.recurrent == Recurrent::kNatural ? "natural"
                                                                   : "product";
  result["fused_input"] = forward.fused_input;
  result["ahead"] = forward.ahead;
  result["parts"] = forward.parts;
  result["threads"] = forward.threads;
  result["shard"] = forward.threads <= directions ? "none" : forward.shard_units ? "units" : "batch";
  if (training) {
    CpuProblem backward = problem;
    backward.backward = true;
    backward.in_windows = dtype == "float32" || dtype == "float64";
    const CpuPlan p = plan_cpu(backward, machine);
    result["backward_threads"] = p.threads;
    result["backward_parts"] = p.parts;
    result["backward_window"] = p.window;
    result["backward_shard"] = p.threads <= directions ? "none" : p.shard_units ? "units" : "batch";
  }
  return result;
}

// By name, or "cuda": the current one.
CudaDevice device_of(const std::string& name) {
#ifdef FASTRNN_CUDA
  if (name == "cuda") return current_cuda_device();
#endif
  return cuda_device(name);
}

CudaProblem cuda_problem(const std::string& cell, int64_t steps, int64_t batch, int64_t hidden_size, int directions,
                         int element_size, bool training, bool backward) {
  const CellTraits& t = traits(kind_of(cell));
  return {.gates = t.gates,
          .separate = t.separate,
          .saved = t.saved,
          .steps = steps,
          .batch = batch,
          .units = hidden_size,
          .directions = directions,
          .element_size = element_size,
          .training = training,
          .backward = backward};
}

py::dict in_words(const CudaPlan& p, const CudaProblem& problem, const CudaDevice& device) {
  py::dict plan;
  plan["tier"] = kTierNames[static_cast<int>(p.tier)];
  plan["exchange"] = kExchangeNames[static_cast<int>(p.exchange)];
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
  const bool stepwise = p.tier == Tier::kStepwise;
  plan["microseconds"] = stepwise ? stepwise_microseconds(problem, device) : p.step_microseconds;
  return plan;
}

py::list cuda_plans(const std::string& cell, int64_t steps, int64_t batch, int64_t hidden_size, int directions,
                    int element_size, bool training, bool backward, const std::string& device_name) {
  const CudaDevice device = device_of(device_name);
  const CudaProblem problem = cuda_problem(cell, steps, batch, hidden_size, directions, element_size, training,
                                           backward);
  py::list all;
  for (const CudaPlan& plan : persistent_plans(problem, device)) all.append(in_words(plan, problem, device));
  all.append(in_words(CudaPlan{}, problem, device));
  return all;
}

py::dict cuda_plan(const std::string& cell, int64_t steps, int64_t batch, int64_t hidden_size, int directions,
                   int element_size, bool training, bool backward, const std::string& device_name,
                   const std::string& wish) {
  const CudaDevice device = device_of(device_name);
  const CudaProblem problem = cuda_problem(cell, steps, batch, hidden_size, directions, element_size, training,
                                           backward);
  return in_words(plan_cuda(problem, device, wish, tuned_plans().get()), problem, device);
}

}  // namespace
}  // namespace fastrnn

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastrnn;
  m.doc() = "The native core of fastrnn.";
  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return cpu_kernels().name; });
  m.def("cpu_bf16", [] { return cpu_machine(1).bf16 ? bf16_products().name : "none"; });
  m.def("cpu_float32", [] { return exact_parts() == 0 ? "fma" : "bf16x3"; });
  m.def("cpu_gemm", [] { return own_gemm() ? "own" : "library"; });
  m.def("cpu_parts", [] { return cpu_machine(1).parts ? bf16_products().name : "none"; });
  m.def("plan", &plan, py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("directions") = 1, py::arg("dtype") = "float32",
        py::arg("training") = false, py::arg("threads") = 1, py::arg("ragged") = false, py::arg("beside") = false);
  m.def("side_by_side", &plans_side_by_side, "Whether the layers of a stack would run beside one another.",
        py::arg("cell"), py::arg("layers"), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("dtype") = "float32", py::arg("threads") = 1,
        py::arg("ragged") = false);
  bind_layers(m);
  bind_streaming(m);
  m.def("cuda_plans", &cuda_plans,
        "The plans of a layer's scan on a named device, the fastest persistent one first (the K of "
        "FASTRNN_CUDA_PLAN=persistent:K), the step-by-step loop last; with predicted microseconds a step.",
        py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("hidden_size"), py::arg("directions") = 1,
        py::arg("element_size") = 2, py::arg("training") = false, py::arg("backward") = false,
        py::arg("device") = "h200");
  m.def("cuda_plan", &cuda_plan,
        "The one of cuda_plans that FASTRNN_CUDA_PLAN=wish chooses, the table of tuned plans consulted.",
        py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("hidden_size"), py::arg("directions") = 1,
        py::arg("element_size") = 2, py::arg("training") = false, py::arg("backward") = false,
        py::arg("device") = "h200", py::arg("wish") = "auto");
  m.def(
      "cuda_device",
      [](const std::string& name) {
        const CudaDevice device = device_of(name);
        py::dict result;
        result["capability"] = device.capability;
        result["multiprocessors"] = device.multiprocessors;
        return result;
      },
      "What a row of tuned plans knows of a device: one of the names, or 'cuda' for the current one.", py::arg("name"));
  m.def(
      "set_tuned_plans", [](const std::string& text) { set_tuned_plans(TunedPlans(text)); },
      "Replace the table of tuned plans by the rows of a CSV text (docs/cuda.md); ValueError, and no change, if one of "
      "them is wrong.",
      py::arg("text"));
  m.attr("TUNED_HEADER") = TunedPlans::kHeader;
}
