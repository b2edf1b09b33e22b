// The ops on CUDA tensors.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <mutex>

#include "ops/stepwise.h"

namespace fastrnn {
namespace {

// Asked once: a call costs the host microseconds.
const CudaDevice& properties(c10::DeviceIndex index) {
  static std::mutex mutex;
  static std::map<int, CudaDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(index); found != known.end()) return found->second;
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index));
    return value;
  };
  CudaDevice device;
  device.capability = 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  TORCH_CHECK(device.capability >= 80,
              "fastrnn has kernels for GPUs of compute capability 8.0 and above, and this has ", device.capability / 10,
              ".", device.capability % 10, ": use torch.nn, or fastrnn.backend(\"python\")");
  device.multiprocessors = get(cudaDevAttrMultiProcessorCount);
  device.shared_bytes = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.register_words = get(cudaDevAttrMaxRegistersPerMultiprocessor);
  // 8 wherever there are clusters; 16 where a kernel allows it and the device does, which is asked before a launch
  device.max_cluster = get(cudaDevAttrClusterLaunch) == 0 ? 1 : device.capability < 120 ? 16 : 8;
  const double clock_ghz = get(cudaDevAttrClockRate) * 1e-6;
  const double memory_gbps = 2e-6 * get(cudaDevAttrMemoryClockRate) * get(cudaDevAttrGlobalMemoryBusWidth) / 8;
  if (clock_ghz > 0) device.clock_ghz = clock_ghz;  // some virtual GPUs don't tell
  if (memory_gbps > 0) device.memory_gbps = memory_gbps;
  return known.emplace(index, device).first->second;
}

// The input's device, current while this lives, and its current stream.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& input)
      : guard_(device_of(input)), stream_(c10::cuda::getCurrentCUDAStream(input.device().index())) {}
  Gpu gpu() const { return {stream_.stream(), properties(stream_.device_index())}; }

 private:
  // The dispatcher comes here for any tensor on a GPU; with the input elsewhere a guard's error would be no help.
  static c10::Device device_of(const Tensor& input) {
    TORCH_CHECK(input.is_cuda(), "Input and parameter tensors are not at the same device, found input tensor at ",
                input.device(), " and parameter tensor at cuda");
    return input.device();
  }

  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  for_each_stepwise_op<CudaDevice>([&](const std::string& name, auto function) { m.impl(name.c_str(), function); });
}

}  // namespace

fastrnn::CudaDevice current_cuda_device() { return properties(c10::cuda::current_device()); }

}  // namespace fastrnn
