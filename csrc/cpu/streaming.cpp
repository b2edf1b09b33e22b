#include "cpu/streaming.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "cpu/capability.h"
#include "cpu/denormals.h"
#include "cpu/huge_pages.h"

namespace fastrnn {

// FASTRNN_STREAMING_BASELINE: built without the kernels of the wider ISAs.
extern const StreamingTable streaming_default;
#if defined(FASTRNN_X86) && !defined(FASTRNN_STREAMING_BASELINE)
#define FASTRNN_STREAMING_WIDE
extern const StreamingTable streaming_avx2;
extern const StreamingTable streaming_avx512;
#endif

const StreamingTable& streaming_table() {
  switch (cpu_capability()) {
#ifdef FASTRNN_STREAMING_WIDE
    case CpuCapability::kAvx512:
      return streaming_avx512;
    case CpuCapability::kAvx2:
      return streaming_avx2;
#endif
    default:
      return streaming_default;
  }
}

namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

bool same(const LayerShape& a, const LayerShape& b) {
  return a.inputs == b.inputs && a.units == b.units && a.outputs == b.outputs && a.projected == b.projected;
}

template <class T>
void check_layers(CellKind kind, const std::vector<StreamingWeights<T>>& layers, int64_t batch, WeightType type) {
  require(!layers.empty(), "a session needs a layer");
  require(batch >= 1, "batch should be at least 1");
  require(type == WeightType::kFull || sizeof(T) == sizeof(float), "float64 has no bfloat16 or int8 weights");
  for (size_t l = 0; l < layers.size(); ++l) {
    const StreamingWeights<T>& w = layers[l];
    const LayerShape& shape = w.shape;
    require(shape.inputs >= 1 && shape.units >= 1 && shape.outputs >= 1, "sizes should be at least 1");
    require(w.w_ih != nullptr && w.w_hh != nullptr, "a layer needs w_ih and w_hh");
    require((w.b_ih == nullptr) == (w.b_hh == nullptr), "a layer has both biases or neither");
    require((w.w_hr == nullptr) != shape.projected, "a projected layer, and no other, has w_hr");
    require(!shape.projected || traits(kind).projects, "only the LSTM has a projection");
    require(shape.projected || shape.outputs == shape.units, "outputs and units differ only in a projected layer");
    require(l == 0 || shape.inputs == layers[l - 1].shape.outputs, "a layer's input is the output of the one below");
    // sums of 65,536 products of 8 bits fit 32
    require(type != WeightType::kInt8 || std::max({shape.inputs, shape.units, shape.outputs}) <= 65536,
            "int8 weights need sizes of at most 65536");
  }
}

template <class T>
int64_t state_bytes(const std::vector<StreamingWeights<T>>& layers, int64_t batch) {
  int64_t values = 0;
  for (const auto& layer : layers) values += batch * (2 * padded(layer.shape.outputs) + padded(layer.shape.units));
  return values * sizeof(T);
}

// The largest of f over the layers.
template <class T, class F>
int64_t largest(const std::vector<StreamingWeights<T>>& layers, const F& f) {
  int64_t most = 0;
  for (const auto& layer : layers) most = std::max<int64_t>(most, f(layer.shape));
  return most;
}

template <class T>
int64_t bytes_of_all(const StreamingKernels<T>& kernels, const std::vector<StreamingWeights<T>>& layers) {
  int64_t bytes = 0;
  for (const auto& layer : layers) bytes += kernels.packed_bytes(layer.shape);
  return bytes;
}

// Checked before anything is allocated for it.
template <class T>
const std::vector<StreamingWeights<T>>& checked(CellKind kind, const std::vector<StreamingWeights<T>>& layers,
                                                int64_t batch, WeightType type) {
  check_layers(kind, layers, batch, type);
  return layers;
}

}  // namespace

AlignedMemory::AlignedMemory(int64_t bytes) : bytes_(bytes) {
  const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const int64_t size = std::max<int64_t>(1, (bytes + alignment - 1) / alignment) * alignment;
  memory_.reset(static_cast<char*>(std::aligned_alloc(alignment, size)));
  if (memory_ == nullptr) throw std::bad_alloc();
  advise_huge_pages(memory_.get(), size);
  std::memset(memory_.get(), 0, size);
}

void AlignedMemory::Free::operator()(char* memory) const { std::free(memory); }

template <class T>
StreamingSession<T>::StreamingSession(CellKind kind, const std::vector<StreamingWeights<T>>& layers, int64_t batch,
                                      WeightType type)
    : kernels_(streaming_table().get<T>(kind, type)),
      batch_(batch),
      int8_dot_(has_int8_dot()),
      weights_(bytes_of_all(kernels_, checked(kind, layers, batch, type))),
      states_(state_bytes(layers, batch)),
      input_(batch * padded(layers.front().shape.inputs) * static_cast<int64_t>(sizeof(T))),
      activation_(batch * static_cast<int64_t>(sizeof(T)) *
                  largest(layers, [](const LayerShape& s) { return s.projected ? padded(s.units) : 0; })),
      quantised_(type != WeightType::kInt8 ? 0 : largest(layers, [&](const LayerShape& s) {
        return quantised_bytes(s, batch);
      })) {
  char* packed = weights_.as<char>();
  T* state = states_.as<T>();
  for (const auto& weights : layers) {
    const LayerShape& shape = weights.shape;
    const int64_t h = batch * padded(shape.outputs), c = batch * padded(shape.units);
    layers_.push_back({shape, packed, {state, state + h}, traits(kind).states > 1 ? state + 2 * h : nullptr});
    packed += kernels_.packed_bytes(shape);
    state += 2 * h + c;
  }
  refresh(layers);
}

template <class T>
void StreamingSession<T>::refresh(const std::vector<StreamingWeights<T>>& layers) {
  require(layers.size() == layers_.size(), "the number of layers has changed");
  for (size_t l = 0; l < layers.size(); ++l) {
    require(same(layers[l].shape, layers_[l].shape), "the shape of a layer has changed");
  }
  for (size_t l = 0; l < layers.size(); ++l) kernels_.pack(layers[l], layers_[l].packed);
}

template <class T>
void StreamingSession<T>::advance() noexcept {
  const FlushDenormals guard;
  StreamingStep<T> step;
  step.batch = batch_;
  step.backwards = phase_ == 1;
  step.int8_dot = int8_dot_;
  step.activation = activation_.as<T>();
  step.quantised = quantised_.as<char>();
  step.input = input();
  for (const Layer& layer : layers_) {
    step.shape = layer.shape;
    step.packed = layer.packed;
    step.h = layer.h[phase_];
    step.next_h = layer.h[1 - phase_];
    step.c = layer.c;
    kernels_.step(step);
    step.input = step.next_h;
  }
  phase_ = 1 - phase_;
}

template <class T>
void StreamingSession<T>::step(const T* from, T* to) noexcept {
  for (int64_t n = 0; n < batch_; ++n) std::copy_n(from + n * inputs(), inputs(), input() + n * padded(inputs()));
  advance();
  for (int64_t n = 0; n < batch_; ++n) std::copy_n(output() + n * padded(outputs()), outputs(), to + n * outputs());
}

template <class T>
void StreamingSession<T>::chunk(const T* from, T* to, int64_t steps) noexcept {
  for (int64_t t = 0; t < steps; ++t) step(from + t * batch_ * inputs(), to + t * batch_ * outputs());
}

template <class T>
void StreamingSession<T>::reset() noexcept {
  std::memset(states_.as<char>(), 0, states_.bytes());
}

template <class T>
void StreamingSession<T>::reset_row(int64_t n) noexcept {
  for (int64_t l = 0; l < depth(); ++l) {
    const LayerShape& shape = layers_[l].shape;
    std::fill_n(h(l) + n * padded(shape.outputs), padded(shape.outputs), T(0));
    if (c(l) != nullptr) std::fill_n(c(l) + n * padded(shape.units), padded(shape.units), T(0));
  }
}

template class StreamingSession<float>;
template class StreamingSession<double>;

}  // namespace fastrnn
