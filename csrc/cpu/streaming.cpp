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
  int64_t row = 0;  // bytes: a row of the batch has fewer in any buffer
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
    row += int64_t{1024 * sizeof(T)} * (padded(shape.inputs) + padded(shape.units) + padded(shape.outputs));
  }
  require(batch <= std::numeric_limits<int64_t>::max() / row, "batch is too large");
}

// The sum of f over the layers.
template <class T, class F>
int64_t sum_of(const std::vector<StreamingWeights<T>>& layers, const F& f) {
  int64_t sum = 0;
  for (const auto& layer : layers) sum += f(layer.shape);
  return sum;
}

// The largest of f over the layers.
template <class T, class F>
int64_t largest(const std::vector<StreamingWeights<T>>& layers, const F& f) {
  int64_t most = 0;
  for (const auto& layer : layers) most = std::max<int64_t>(most, f(layer.shape));
  return most;
}

// Elements that a layer keeps for a row of the batch: h twice, c, o tanh(c). Behind the size of each lie zeros, so that
// layers of other sizes share none of it.
int64_t state_row(const LayerShape& s) {
  return 2 * padded(s.outputs) + padded(s.units) + (s.projected ? padded(s.units) : 0);
}

// Steps whose inputs are multiplied at once: with more rows there is no more to gain, and their products should find
// room in L2 beside a block of weights.
template <class T>
int64_t window_of(const StreamingKernels<T>& kernels, const std::vector<StreamingWeights<T>>& layers, int64_t batch) {
  constexpr int64_t kRows = 48, kBytes = 512 << 10;
  const int64_t row = largest(layers, [&](const LayerShape& s) { return kernels.product_bytes(s, 1); });
  return std::max<int64_t>(1, std::min(kRows, kBytes / row) / batch);
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
      window_(window_of(kernels_, checked(kind, layers, batch, type), batch)),
      int8_dot_(has_int8_dot()),
      weights_(sum_of(layers, [&](const LayerShape& s) { return kernels_.packed_bytes(s); })),
      states_(batch * kSize * sum_of(layers, state_row)),
      input_(window_ * batch * kSize * padded(layers.front().shape.inputs)),
      quantised_(largest(layers,
                         [&](const LayerShape& s) {
                           return type == WeightType::kInt8 ? quantised_bytes(s, batch, window_ * batch) : 0;
                         })),
      products_(largest(layers, [&](const LayerShape& s) { return kernels_.product_bytes(s, rows_ahead()); })),
      sequences_(rows_ahead() * kSize * sum_of(layers, [](const LayerShape& s) { return padded(s.outputs); })) {
  char* packed = weights_.as<char>();
  T *state = states_.as<T>(), *sequence = sequences_.as<T>();
  for (const auto& weights : layers) {
    const LayerShape& shape = weights.shape;
    const int64_t h = batch * padded(shape.outputs), c = batch * padded(shape.units);
    layers_.push_back({shape,
                       packed,
                       {state, state + h},
                       traits(kind).states > 1 ? state + 2 * h : nullptr,
                       shape.projected ? state + 2 * h + c : nullptr,
                       sequence});
    packed += kernels_.packed_bytes(shape);
    state += batch * state_row(shape);
    sequence += rows_ahead() * padded(shape.outputs);
  }
  output_ = layers_.back().h[phase_];
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
StreamingStep<T> StreamingSession<T>::first_layer(const T* from) noexcept {
  StreamingStep<T> step;
  step.batch = batch_;
  step.int8_dot = int8_dot_;
  step.quantised = quantised_.bytes() > 0 ? quantised_.as<char>() : nullptr;
  step.input = from;
  return step;
}

template <class T>
void StreamingSession<T>::enter(const Layer& layer, StreamingStep<T>& step) noexcept {
  step.shape = layer.shape;
  step.packed = layer.packed;
  step.c = layer.c;
  step.activation = layer.activation;
}

template <class T>
void StreamingSession<T>::advance(int64_t steps, const T* from, T* to) noexcept {
  const FlushDenormals guard;
  if (steps == 1) {
    advance_one(from, to);
  } else {
    advance_several(steps, from, to);
  }
}

template <class T>
void StreamingSession<T>::advance_one(const T* from, T* to) noexcept {
  StreamingStep<T> step = first_layer(from);
  step.backwards = phase_ == 1;
  if (to != nullptr) layers_.back().h[1 - phase_] = to;
  for (const Layer& layer : layers_) {
    enter(layer, step);
    step.h = layer.h[phase_];
    step.next_h = layer.h[1 - phase_];
    kernels_.step(step);
    step.input = step.next_h;
  }
  phase_ = 1 - phase_;
  output_ = step.next_h;
}

// Layer after layer.
template <class T>
void StreamingSession<T>::advance_several(int64_t steps, const T* from, T* to) noexcept {
  StreamingStep<T> step = first_layer(from);
  step.ahead = steps * batch_;
  step.products = products_.as<T>();
  for (Layer& layer : layers_) {
    enter(layer, step);
    kernels_.multiply_inputs(step);
    const bool placed = to != nullptr && &layer == &layers_.back();
    T* const sequence = placed ? to : layer.sequence;
    const int64_t values = batch_ * padded(layer.shape.outputs);
    step.h = layer.h[phase_];
    for (int64_t t = 0; t < steps; ++t) {
      step.backwards = t % 2 == 1;
      step.first = t * batch_;
      step.next_h = sequence + t * values;
      kernels_.step(step);
      step.h = step.next_h;
    }
    if (placed) {
      layer.h[phase_] = step.next_h;
    } else {
      std::copy_n(step.h, values, layer.h[phase_]);
    }
    step.input = output_ = sequence;
  }
}

template <class T>
void StreamingSession<T>::step(const T* from, T* to) noexcept {
  chunk(from, to, 1);
}

template <class T>
void StreamingSession<T>::chunk(const T* from, T* to, int64_t steps) noexcept {
  const int64_t in = inputs(), out = outputs();
  const auto read = [&](int64_t t, int64_t count) {
    const T* row = from + t * batch_ * in;
    if (in == padded(in)) return row;
    for (int64_t n = 0; n < count * batch_; ++n, row += in) std::copy_n(row, in, input() + n * padded(in));
    return static_cast<const T*>(input());
  };
  const auto write = [&](int64_t t, int64_t count) {
    T* row = to + t * batch_ * out;
    for (int64_t n = 0; n < count * batch_; ++n, row += out) std::copy_n(output() + n * padded(out), out, row);
  };
  const bool in_place = out == padded(out) && from != to && steps > 1;
  chunk(steps, read, write, in_place ? to : nullptr);
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
