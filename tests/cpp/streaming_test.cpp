// Streaming sessions as C++ uses them, without Python and without an operator: against the plain loop over steps, with
// no allocation on the way, and the floating point mode as it was.
#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/streaming.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {
long allocations = 0;
}

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace fastrnn::test {
namespace {

// One layer with random weights, and its step as the equations have it.
template <class T>
struct LoopLayer {
  LayerShape shape;
  std::vector<T> w_ih, w_hh, w_hr, b_ih, b_hh;
  std::vector<double> h, c;  // [N, outputs], [N, H]

  template <class Cell>
  static LoopLayer make(Random& random, int64_t inputs, int64_t units, bool projected, int64_t batch) {
    LoopLayer layer;
    const int64_t outputs = projected ? (units + 1) / 2 : units, rows = Cell::kGates * units;
    layer.shape = {inputs, units, outputs, projected};
    const auto fill = [&](std::vector<T>& v, int64_t size) {
      for (int64_t i = 0; i < size; ++i) v.push_back(static_cast<T>(random() / std::sqrt(static_cast<double>(units))));
    };
    fill(layer.w_ih, rows * inputs), fill(layer.w_hh, rows * outputs), fill(layer.b_ih, rows), fill(layer.b_hh, rows);
    fill(layer.w_hr, projected ? outputs * units : 0);
    layer.h.assign(batch * outputs, 0), layer.c.assign(batch * units, 0);
    return layer;
  }

  StreamingWeights<T> weights() const {
    return {shape, w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data(), shape.projected ? w_hr.data() : nullptr};
  }

  template <class Cell>
  void step(const std::vector<double>& x, int64_t batch) {
    constexpr int kAdding = Cell::kGates - Cell::kSeparate;
    for (int64_t n = 0; n < batch; ++n) {
      std::vector<double> activation(shape.units), previous(&h[n * shape.outputs], &h[(n + 1) * shape.outputs]);
      for (int64_t j = 0; j < shape.units; ++j) {
        double gate[Cell::kGates + Cell::kSeparate], saved[Cell::kSaved];
        for (int g = 0; g < Cell::kGates; ++g) {
          const int64_t row = g * shape.units + j;
          double from_x = b_ih[row], from_h = b_hh[row];
          for (int64_t k = 0; k < shape.inputs; ++k) from_x += w_ih[row * shape.inputs + k] * x[n * shape.inputs + k];
          for (int64_t k = 0; k < shape.outputs; ++k) from_h += w_hh[row * shape.outputs + k] * previous[k];
          gate[g] = g < kAdding ? from_x + from_h : from_x;
          if (g >= kAdding) gate[g + Cell::kSeparate] = from_h;
        }
        double state = Cell::kState == ElementState::kCell     ? c[n * shape.units + j]
                       : Cell::kState == ElementState::kHidden ? previous[j]
                                                               : 0;
        activation[j] = Cell::forward(gate, state, saved);
        if (Cell::kState == ElementState::kCell) c[n * shape.units + j] = state;
      }
      for (int64_t i = 0; i < shape.outputs; ++i) {
        double sum = shape.projected ? 0 : activation[i];
        for (int64_t j = 0; shape.projected && j < shape.units; ++j) sum += w_hr[i * shape.units + j] * activation[j];
        h[n * shape.outputs + i] = sum;
      }
    }
  }
};

template <class Cell, class T>
void test_session(CellKind kind, int64_t batch, int64_t inputs, int64_t units, bool projected, WeightType type,
                  double tolerance) {
  Random random(static_cast<unsigned>(units + batch));
  const int64_t steps = 4;
  std::vector<LoopLayer<T>> layers;
  layers.push_back(LoopLayer<T>::template make<Cell>(random, inputs, units, projected, batch));
  layers.push_back(LoopLayer<T>::template make<Cell>(random, layers[0].shape.outputs, units, projected, batch));
  const std::vector<StreamingWeights<T>> weights{layers[0].weights(), layers[1].weights()};
  StreamingSession<T> session(kind, weights, batch, type), whole(kind, weights, batch, type);
  const int64_t outputs = session.outputs();
  std::vector<T> x(steps * batch * inputs), y(steps * batch * outputs), chunk(y.size());
  for (T& value : x) value = static_cast<T>(random());

  const long before = allocations;
  for (int64_t t = 0; t < steps; ++t) session.step(&x[t * batch * inputs], &y[t * batch * outputs]);
  whole.chunk(x.data(), chunk.data(), steps);
  CHECK(allocations == before);
  CHECK(y == chunk);

  for (int64_t t = 0; t < steps; ++t) {
    layers[0].template step<Cell>(std::vector<double>(&x[t * batch * inputs], &x[(t + 1) * batch * inputs]), batch);
    layers[1].template step<Cell>(layers[0].h, batch);
    for (int64_t i = 0; i < batch * outputs; ++i) CHECK_CLOSE(y[t * batch * outputs + i], layers[1].h[i], tolerance);
  }
  session.reset_row(0);
  CHECK(session.h(1)[0] == 0);
  session.reset();
  std::vector<T> again(y.size());
  session.chunk(x.data(), again.data(), steps);
  CHECK(again == y);
  if (inputs == outputs) {
    session.reset();
    session.chunk(x.data(), x.data(), steps);
    CHECK(x == y);
  }
}

// Layers of other widths one upon the other, by chunks: what one has left in memory must be none of the next one's.
void test_layers_of_other_widths() {
  constexpr int64_t kBatch = 2, kSteps = 31;
  for (const auto& [type, tolerance] : {std::pair{WeightType::kFull, 2e-6}, std::pair{WeightType::kBfloat16, 0.02},
                                        std::pair{WeightType::kInt8, 0.05}}) {
    Random random(5);
    std::vector<LoopLayer<float>> layers;
    int64_t inputs = 37;
    for (const int64_t units : {19, 3, 33}) {
      layers.push_back(LoopLayer<float>::make<LstmCell<>>(random, inputs, units, true, kBatch));
      inputs = layers.back().shape.outputs;
    }
    std::vector<StreamingWeights<float>> weights;
    for (const auto& layer : layers) weights.push_back(layer.weights());
    StreamingSession<float> session(CellKind::kLstm, weights, kBatch, type),
        whole(CellKind::kLstm, weights, kBatch, type);
    const int64_t of_x = kBatch * session.inputs(), of_y = kBatch * session.outputs();  // a step
    std::vector<float> x(kSteps * of_x), y(kSteps * of_y), chunk(y.size());
    for (float& value : x) value = static_cast<float>(random());
    for (int64_t t = 0; t < kSteps; ++t) {
      session.step(&x[t * of_x], &y[t * of_y]);
      layers[0].step<LstmCell<>>(std::vector<double>(&x[t * of_x], &x[(t + 1) * of_x]), kBatch);
      for (size_t l = 1; l < layers.size(); ++l) layers[l].step<LstmCell<>>(layers[l - 1].h, kBatch);
      for (int64_t i = 0; i < of_y; ++i) CHECK_CLOSE(y[t * of_y + i], layers.back().h[i], tolerance);
    }
    whole.chunk(x.data(), chunk.data(), kSteps);
    CHECK(y == chunk);
    for (int64_t l = 0; l < session.depth(); ++l) {
      const int64_t count = kBatch * padded(layers[l].shape.outputs);
      CHECK(std::equal(session.h(l), session.h(l) + count, whole.h(l)));
    }
  }
}

template <class F>
bool refuses(const F& f) {
  try {
    f();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void test_refusals() {
  Random random(3);
  const auto a = LoopLayer<float>::make<LstmCell<>>(random, 5, 8, false, 1);
  const auto b = LoopLayer<float>::make<LstmCell<>>(random, 9, 8, false, 1);
  using Session = StreamingSession<float>;
  CHECK(refuses([&] { Session(CellKind::kLstm, {}, 1); }));
  CHECK(refuses([&] { Session(CellKind::kLstm, {a.weights()}, 0); }));
  CHECK(refuses([&] { Session(CellKind::kLstm, {a.weights(), b.weights()}, 1); }));
  StreamingWeights<float> half = a.weights();
  half.b_hh = nullptr;
  CHECK(refuses([&] { Session(CellKind::kLstm, {half}, 1); }));
  Session session(CellKind::kLstm, {a.weights()}, 1);
  CHECK(refuses([&] { session.refresh({b.weights()}); }));
  const auto exact = LoopLayer<double>::make<LstmCell<>>(random, 5, 8, false, 1);
  CHECK(refuses([&] { StreamingSession<double>(CellKind::kLstm, {exact.weights()}, 1, WeightType::kInt8); }));
}

void test_floating_point_mode() {
#if defined(__SSE__)
  Random random(4);
  const auto layer = LoopLayer<float>::make<GruCell<>>(random, 5, 8, false, 1);
  StreamingSession<float> session(CellKind::kGru, {layer.weights()}, 1);
  float x[5] = {1e-39f, 0, 0, 0, 0}, y[8];
  for (const unsigned mode : {0u, 0x8040u}) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr((before & ~0x8040u) | mode);
    session.step(x, y);
    CHECK((_mm_getcsr() & 0x8040u) == mode);
    _mm_setcsr(before);
  }
#endif
}

}  // namespace

void test_streaming() {
  // of 32 inputs and units a chunk reads and writes the caller's memory, of 33 rows a step at a time
  using Sizes = std::pair<int64_t, int64_t>;
  for (const int64_t batch : {1, 2, 3, 17, 33}) {
    for (const auto& [inputs, units] : {Sizes{5, 1}, Sizes{5, 3}, Sizes{5, 17}, Sizes{5, 65}, Sizes{32, 32}}) {
      test_session<RnnCell<Tanh>, float>(CellKind::kRnnTanh, batch, inputs, units, false, WeightType::kFull, 2e-6);
      test_session<RnnCell<Relu>, double>(CellKind::kRnnRelu, batch, inputs, units, false, WeightType::kFull, 1e-13);
      test_session<GruCell<>, float>(CellKind::kGru, batch, inputs, units, false, WeightType::kFull, 2e-6);
      test_session<LstmCell<>, double>(CellKind::kLstm, batch, inputs, units, true, WeightType::kFull, 1e-13);
      test_session<LstmCell<>, float>(CellKind::kLstm, batch, inputs, units, true, WeightType::kBfloat16, 0.02);
      test_session<LstmCell<>, float>(CellKind::kLstm, batch, inputs, units, false, WeightType::kInt8, 0.05);
    }
  }
  // more than what lies section after section
  test_session<LstmCell<>, float>(CellKind::kLstm, 2, 5, 301, true, WeightType::kFull, 2e-6);
  test_session<GruCell<>, float>(CellKind::kGru, 3, 40, 350, false, WeightType::kBfloat16, 0.02);
  test_layers_of_other_widths();
  test_refusals();
  test_floating_point_mode();
}

}  // namespace fastrnn::test
