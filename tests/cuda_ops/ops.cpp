// The ops for CUDA tensors on an emulated GPU, as ops of the CPU: the same kernels, the same host loop, the same checks.
#include <torch/library.h>

#include "core/tuned_cuda.h"
#include "cusim.h"
#include "ops/stepwise.h"

namespace fastrnn {
namespace {

struct EmulatedDevice {
  explicit EmulatedDevice(const Tensor&) {}
  Gpu gpu() const { return {nullptr, cuda_device("h200")}; }
};

TORCH_LIBRARY(fastrnn_sim, m) {
  for_each_stepwise_op<EmulatedDevice>([&](const std::string& name, auto function) {
    m.def(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, function));
  });
  m.def("launches() -> int", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd,
                                             [] { return static_cast<int64_t>(cusim::launches()); }));
  // this library has a table of its own, as it has the plan
  m.def("set_tuned_plans(str text) -> ()",
        torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd,
                        [](c10::string_view text) { set_tuned_plans(TunedPlans(std::string(text))); }));
}

}  // namespace
}  // namespace fastrnn
