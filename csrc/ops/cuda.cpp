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
  const auto [place, unknown] = known.try_emplace(index);
  if (!unknown) return place->second;
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index));
    return value;
  };
  CudaDevice& device = place->second;
  device.capability = 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  device.multiprocessors = get(cudaDevAttrMultiProcessorCount);
  device.shared_bytes = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.register_words = get(cudaDevAttrMaxRegistersPerMultiprocessor);
  // 8 wherever there are clusters; 16 where a kernel allows it and the device does, which is asked before a launch
  device.max_cluster = get(cudaDevAttrClusterLaunch) == 0 ? 1 : device.capability < 120 ? 16 : 8;
  device.clock_ghz = get(cudaDevAttrClockRate) * 1e-6;
  device.memory_gbps = 2e-6 * get(cudaDevAttrMemoryClockRate) * get(cudaDevAttrGlobalMemoryBusWidth) / 8;
  return device;
}

// The input's device, current while this lives, and its current stream.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& input)
      : guard_(input.device()), stream_(c10::cuda::getCurrentCUDAStream(input.device().index())) {}
  Gpu gpu() const { return {stream_.stream(), properties(stream_.device_index())}; }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  for_each_stepwise_op<CudaDevice>([&](const std::string& name, auto function) { m.impl(name.c_str(), function); });
}

}  // namespace

fastrnn::CudaDevice current_cuda_device() { return properties(c10::cuda::current_device()); }

}  // namespace fastrnn
