// The ops on CUDA tensors.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops/stepwise.h"

namespace fastrnn {
namespace {

// The input's device, current while this lives, and its current stream.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& input)
      : guard_(input.device()), stream_(c10::cuda::getCurrentCUDAStream(input.device().index())) {}
  void* stream() const { return stream_.stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  for_each_stepwise_op<CudaDevice>([&](const std::string& name, auto function) { m.impl(name.c_str(), function); });
}

}  // namespace
}  // namespace fastrnn
