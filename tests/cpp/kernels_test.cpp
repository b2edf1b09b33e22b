// The cells and the scans of one ISA (compiled once for each): cells as scalars against SIMD and against differences of
// their own forward; scans of cells with linear activations, where nothing saturates, against a plain loop and against
// differences of their own forward; products of large matrices against plain loops.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "check.h"
#include "core/cells/gru.h"
#include "core/cells/lstm.h"
#include "core/cells/rnn.h"
#include "cpu/bf16.h"
#include "cpu/gemm.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fastrnn::test {
inline namespace CPU_CAPABILITY {

template <class Cell>
constexpr int kInputs = Cell::kGates + Cell::kSeparate;

// a h + b c of one element, and the gradients of it by the cell's backward
template <class Cell, class V>
struct Element {
  V gate[kInputs<Cell>];
  V state;

  V loss(V a, V b) const {
    V saved[Cell::kSaved], s = state;
    const V h = Cell::forward(gate, s, saved);
    return Cell::kState == ElementState::kCell ? a * h + b * s : a * h;
  }
  void gradients(V a, V b, V (&grad_gate)[kInputs<Cell>], V& grad_state) const {
    V saved[Cell::kSaved], s = state;
    Cell::forward(gate, s, saved);
    V carry = Cell::kState == ElementState::kCell ? b : V(0);
    Cell::backward(saved, state, a, carry, grad_gate);
    grad_state = Cell::kState == ElementState::kNone ? V(0) : carry;
  }
};

template <class Cell>
void test_cell_by_differences() {
  Random random(1);
  for (int i = 0; i < 200; ++i) {
    Element<Cell, double> e;
    for (double& g : e.gate) g = 3 * random() + 1e-3;  // off relu's corner
    e.state = random();
    const double a = random(), b = random(), step = 1e-5;
    double grad[kInputs<Cell>], grad_state;
    e.gradients(a, b, grad, grad_state);
    const auto difference = [&](double& x) {
      const double at = x;
      x = at + step;
      const double above = e.loss(a, b);
      x = at - step;
      const double below = e.loss(a, b);
      x = at;
      return (above - below) / (2 * step);
    };
    for (int g = 0; g < kInputs<Cell>; ++g) CHECK_CLOSE(grad[g], difference(e.gate[g]), 1e-8);
    if (Cell::kState != ElementState::kNone) CHECK_CLOSE(grad_state, difference(e.state), 1e-8);
  }
}

template <class Cell, class T>
void test_cell_as_vector() {
  using V = Vec<T>;
  constexpr int kLanes = V::size();
  Random random(2);
  const double tolerance = 16 * std::numeric_limits<T>::epsilon();
  for (int i = 0; i < 50; ++i) {
    T gate[kInputs<Cell>][kLanes], state[kLanes], a[kLanes], b[kLanes];
    for (auto& lanes : gate) {
      for (T& x : lanes) x = static_cast<T>(6 * random());
    }
    for (int l = 0; l < kLanes; ++l) state[l] = random(), a[l] = random(), b[l] = random();
    Element<Cell, V> vector;
    for (int g = 0; g < kInputs<Cell>; ++g) vector.gate[g] = V::loadu(gate[g]);
    vector.state = V::loadu(state);
    V grad[kInputs<Cell>], grad_state;
    vector.gradients(V::loadu(a), V::loadu(b), grad, grad_state);
    T loss[kLanes], out[kInputs<Cell>][kLanes], out_state[kLanes];
    vector.loss(V::loadu(a), V::loadu(b)).store(loss);
    for (int g = 0; g < kInputs<Cell>; ++g) grad[g].store(out[g]);
    grad_state.store(out_state);
    for (int l = 0; l < kLanes; ++l) {
      Element<Cell, double> scalar;
      for (int g = 0; g < kInputs<Cell>; ++g) scalar.gate[g] = gate[g][l];
      scalar.state = state[l];
      double expected[kInputs<Cell>], expected_state;
      scalar.gradients(a[l], b[l], expected, expected_state);
      CHECK_CLOSE(loss[l], scalar.loss(a[l], b[l]), tolerance);
      for (int g = 0; g < kInputs<Cell>; ++g) CHECK_CLOSE(out[g][l], expected[g], 6 * tolerance);
      CHECK_CLOSE(out_state[l], expected_state, tolerance);
    }
  }
}

template <class T>
T first_lane(Vec<T> v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  return lanes[0];
}

template <class T>
void test_activations() {
  using V = Vec<T>;
  const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const double epsilon = std::numeric_limits<T>::epsilon();
  const auto sigmoid = [](T x) { return first_lane<T>(Math<V>::sigmoid(V(x))); };
  const auto tanh = [](T x) { return first_lane<T>(Math<V>::tanh(V(x))); };
  CHECK(std::isnan(sigmoid(nan)) && std::isnan(tanh(nan)));
  CHECK(std::isnan(first_lane<T>(Math<V>::relu(V(nan)))));
  CHECK(sigmoid(infinity) == 1 && tanh(infinity) == 1 && tanh(-infinity) == -1);
  CHECK_CLOSE(sigmoid(-infinity), 0, 2e-38);
  CHECK(tanh(0) == 0 && sigmoid(0) == T(0.5));
  for (double x = -100; x <= 100; x += 0.0137) {
    const T v = static_cast<T>(x);
    const double s = 1 / (1 + std::exp(-static_cast<double>(v))), t = std::tanh(static_cast<double>(v));
    CHECK_CLOSE(sigmoid(v), s, 4 * epsilon * s + 2e-38);
    CHECK_CLOSE(tanh(v), t, 4 * epsilon * std::abs(t));
  }
  for (T x = T(1e-30); x < 1; x *= 3) CHECK_CLOSE(tanh(x), std::tanh(static_cast<double>(x)), 4 * epsilon * x);
}

// v in parts: each is a number of bfloat16, the sum is v, and nothing hides that v is no number.
void test_parts() {
  using V = Vec<float>;
  constexpr int kLanes = V::size();
  const float infinity = std::numeric_limits<float>::infinity();
  const auto parts_of = [](float x, float (&parts)[kMostParts]) {
    at::BFloat16 stored[kMostParts * kLanes];
    store_parts(kMostParts, stored, kLanes, V(x), kLanes);
    for (int p = 0; p < kMostParts; ++p) parts[p] = stored[p * kLanes];
    return static_cast<double>(parts[0]) + parts[1] + parts[2];
  };
  float parts[kMostParts];
  Random random(3);
  for (int i = 0; i < 2000; ++i) {
    const auto x = static_cast<float>(random() * std::ldexp(1.0, i % 200 - 80));
    CHECK(parts_of(x, parts) == x);
    CHECK(std::abs(parts[1]) <= std::abs(x) / 256 && std::abs(parts[2]) <= std::abs(x) / 65536);
  }
  CHECK(parts_of(0, parts) == 0 && parts_of(-1, parts) == -1);
  float all_ones;
  std::memset(&all_ones, 0xff, sizeof(all_ones));
  for (const float x : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), all_ones, 3.4e38f}) {
    CHECK(std::isnan(parts_of(x, parts)));
  }
}

// multiply(sizes, a, b, c, ldc, add) of all layouts. c and the factors have no byte to spare, but that c's rows are a part of
// longer ones, which stay as they were. Errors: of a product of numbers below one, or of sums, which add up as a walk does.
template <class T, class Multiply>
void test_gemm(const Multiply& multiply, double of_product, const GemmSizes& sizes, bool add) {
  Random random(4);
  const auto filled = [&](int64_t n) {
    std::vector<T> v(n);
    for (T& x : v) x = static_cast<T>(random());
    return v;
  };
  const int64_t ldc = sizes.n + 3;
  const std::vector<T> a = filled(sizes.m * sizes.k), b = filled(sizes.k * sizes.n);
  const std::vector<T> before = filled((sizes.m - 1) * ldc + sizes.n);
  // as it is, transposed, of equal rows or columns, and a row of equal elements
  const auto layouts = [](const std::vector<T>& v, int64_t rows, int64_t columns) {
    std::vector<Factor<T>> all{{v.data(), columns, 1}, {v.data(), 1, rows}, {v.data(), 0, 1}, {v.data(), 1, 0}};
    if (rows == 1) all.push_back({v.data(), 0, 0});
    return all;
  };
  for (const Factor<T>& of_a : layouts(a, sizes.m, sizes.k)) {
    for (const Factor<T>& of_b : layouts(b, sizes.k, sizes.n)) {
      if (of_a.column == 0 && of_b.row == 0) continue;  // the same product k times, no walk
      std::vector<T> c = before;
      multiply(sizes, of_a, of_b, c.data(), ldc, add);
      double worst = 0;
      for (int64_t i = 0; i < sizes.m; ++i) {
        for (int64_t j = 0; j < sizes.n; ++j) {
          long double sum = add ? before[i * ldc + j] : 0;
          for (int64_t k = 0; k < sizes.k; ++k) {
            sum += static_cast<long double>(*of_a.from(i, k).data) * *of_b.from(k, j).data;
          }
          worst = std::max(worst, static_cast<double>(std::abs(sum - c[i * ldc + j])));
        }
        for (int64_t j = sizes.n; i + 1 < sizes.m && j < ldc; ++j) CHECK(c[i * ldc + j] == before[i * ldc + j]);
      }
      // a number that all products have may be one, where numbers are 1 / sqrt(3) in the mean of squares
      const double larger = of_a.column == 0 || of_b.row == 0 ? std::sqrt(3.0) : 1;
      CHECK_CLOSE(worst, 0, larger * of_product * std::sqrt(static_cast<double>(sizes.k)));
    }
  }
}

// At sizes beyond a block, and on neither side whole tiles.
void test_part_products(int parts, const GemmSizes& sizes, bool add, int threads) {
  const auto multiply = [&](const auto&... all) { multiply_in_parts(emulated_products(), parts, all..., threads); };
  test_gemm<float>(multiply, parts == 2 ? 0x1p-15 : 0x1p-21, sizes, add);
}

template <class T>
void test_tile_products() {
  const auto test = [](const GemmSizes& sizes, bool add, int threads) {
    const auto multiply = [&](const auto&... all) { multiply_matrices<T>(all..., threads); };
    test_gemm<T>(multiply, 8 * std::numeric_limits<T>::epsilon(), sizes, add);
  };
  test({1, 1, 1}, false, 1);
  test({3, 17, 0}, false, 1);  // zeros
  test({3, 17, 0}, true, 1);  // nothing
  test({129, 3, 17}, true, 3);
  test({17, 129, 3}, false, 2);
  test({50, 67, 385}, true, 1);
  test({97, 349, 801}, false, 3);
  test({64, 64, 64}, false, 2);
  // a row, a column
  test({1, 129, 17}, false, 1);
  test({1, 17, 0}, false, 1);
  test({1, 17, 0}, true, 1);
  test({1, 3, 193}, false, 1);
  test({1, 1100, 389}, true, 1);
  test({1, 2100, 389}, true, 3);
  test({129, 67, 1}, false, 1);
  test({129, 67, 1}, true, 1);
  test({1030, 1030, 1}, true, 3);
  // few rows
  test({3, 17, 36}, true, 1);  // as few k as may be
  test({16, 257, 193}, false, 3);
  test({7, 385, 385}, true, 2);
}

// One layer, one direction, on random data.
template <class Cell>
struct Problem {
  using T = double;
  int64_t steps, batch, inputs, units, outputs;
  bool reverse, projected;
  std::vector<T> w_ih, w_hh, w_hr, bias, input, h0, c0, gates;
  std::vector<int64_t> offset, active, order, length;
  std::vector<char> reset;
  Rows rows;

  std::vector<T> output, h_n, c_n, cells, reserve;

  static std::vector<T> random(Random& r, int64_t n, double scale) {
    std::vector<T> v(n);
    for (T& x : v) x = scale * r();
    return v;
  }

  // of a layer beside others: what it reads, where it is not `input`, and who waits for whom
  const T* input_from = nullptr;
  const Progress* below = nullptr;
  Progress* progress = nullptr;

  Problem(unsigned seed, int64_t t, int64_t n, int64_t h, bool back, bool with_projection, bool ragged, int64_t i = 3)
      : steps(t),
        batch(n),
        inputs(i),
        units(h),
        outputs(with_projection ? (h + 1) / 2 : h),
        reverse(back),
        projected(with_projection) {
    Random r(seed);
    const int64_t gate_rows = Cell::kGates * units;
    const double scale = 0.7 / std::sqrt(static_cast<double>(units));
    w_ih = random(r, gate_rows * inputs, scale);
    w_hh = random(r, gate_rows * outputs, scale);
    w_hr = random(r, projected ? outputs * units : 0, scale);
    bias = random(r, kInputs<Cell> * units, 0.3);
    input = random(r, steps * batch * inputs, 1);
    h0 = random(r, batch * outputs, 1);
    c0 = random(r, batch * units, 1);
    for (int64_t i = 0; i < batch; ++i) order.push_back(i), length.push_back(ragged ? r.below(steps + 1) : steps);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    for (int64_t s = 0; s < steps; ++s) {
      offset.push_back(s * batch);
      active.push_back(std::count_if(length.begin(), length.end(), [&](int64_t l) { return l > s; }));
    }
    for (int64_t i = 0; i < steps * batch; ++i) reset.push_back(ragged && r.below(4) == 0);
    rows = {steps,         batch,
            offset.data(), 1,
            active.data(), order.data(),
            length.data(), reinterpret_cast<const bool*>(reset.data()),
            batch,         1};
    project();
  }

  void project() {
    gates.assign(steps * batch * Cell::kGates * units, 0);
    for (int64_t row = 0; row < steps * batch; ++row) {
      for (int64_t g = 0; g < Cell::kGates * units; ++g) {
        for (int64_t k = 0; k < inputs; ++k) {
          gates[row * Cell::kGates * units + g] += w_ih[g * inputs + k] * input[row * inputs + k];
        }
      }
    }
  }

  int64_t columns() const { return (Cell::kSaved + (projected ? 1 : 0)) * units; }
  Scan scan(const CpuPlan& plan) const { return {CellKind::kLstm, {inputs, units, outputs, projected}, rows, plan, 1}; }

  void forward(const CpuPlan& plan) {
    output.assign(steps * batch * outputs, 0);
    cells.assign(steps * batch * units, 0);
    h_n.assign(batch * outputs, 0);
    c_n.assign(batch * units, 0);
    reserve.assign(steps * batch * columns(), 0);
    for (int64_t row = 0; row < steps * batch; ++row) {
      std::copy_n(&gates[row * Cell::kGates * units], Cell::kGates * units, &reserve[row * columns()]);
    }
    ForwardParams<T> p;
    p.reverse = reverse;
    p.w_hh = w_hh.data(), p.w_hr = w_hr.data(), p.bias = bias.data();
    p.w_ih = w_ih.data(), p.input = input_from == nullptr ? input.data() : input_from;
    p.h0 = h0.data(), p.c0 = c0.data();
    p.gates = reserve.data(), p.gates_stride = columns(), p.save = plan.ahead == 0;
    p.output = output.data(), p.output_stride = outputs;
    if (Cell::kState == ElementState::kCell) p.cells = cells.data(), p.cells_stride = units;
    p.h_n = h_n.data(), p.c_n = c_n.data();
    Scan s = scan(plan);
    s.below = below, s.progress = progress;
    std::vector<char> scratch(ForwardScan<Cell, T>::scratch_bytes(s) + 64);
    ForwardScan<Cell, T>::run(s, &p, aligned(scratch));
  }

  static void* aligned(std::vector<char>& memory) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }

  // The plain loop, row by row and element by element.
  void check_against_loop() const {
    for (int64_t n = 0; n < batch; ++n) {
      std::vector<T> h(h0.begin() + n * outputs, h0.begin() + (n + 1) * outputs),
          c(c0.begin() + n * units, c0.begin() + (n + 1) * units);
      for (int64_t s = 0; s < length[n]; ++s) {
        const int64_t t = reverse ? length[n] - 1 - s : s, row = t * batch + n;
        const bool cut = reverse ? t + 1 < length[n] && reset[row + batch] : reset[row] != 0;
        if (cut) std::fill(h.begin(), h.end(), 0), std::fill(c.begin(), c.end(), 0);
        std::vector<T> activation(units), next(outputs, 0);
        for (int64_t j = 0; j < units; ++j) {
          T gate[kInputs<Cell>], saved[Cell::kSaved];
          for (int g = 0; g < Cell::kGates; ++g) {
            T x = gates[row * Cell::kGates * units + g * units + j] + bias[g * units + j], recurrent = 0;
            for (int64_t k = 0; k < outputs; ++k) recurrent += w_hh[(g * units + j) * outputs + k] * h[k];
            if (g < Cell::kGates - Cell::kSeparate) {
              gate[g] = x + recurrent;
            } else {
              gate[g] = x;
              gate[g + Cell::kSeparate] = recurrent + bias[(g + Cell::kSeparate) * units + j];
            }
          }
          T state = Cell::kState == ElementState::kCell ? c[j] : Cell::kState == ElementState::kHidden ? h[j] : 0;
          activation[j] = Cell::forward(gate, state, saved);
          if (Cell::kState == ElementState::kCell) c[j] = state;
        }
        for (int64_t i = 0; i < outputs; ++i) {
          next[i] = projected ? 0 : activation[i];
          for (int64_t j = 0; projected && j < units; ++j) next[i] += w_hr[i * units + j] * activation[j];
        }
        h = next;
        for (int64_t i = 0; i < outputs; ++i) CHECK_CLOSE(output[row * outputs + i], h[i], 1e-12);
        for (int64_t j = 0; Cell::kState == ElementState::kCell && j < units; ++j) {
          CHECK_CLOSE(cells[row * units + j], c[j], 1e-12);
        }
      }
      for (int64_t i = 0; i < outputs; ++i) CHECK_CLOSE(h_n[n * outputs + i], h[i], 1e-12);
      for (int64_t j = 0; Cell::kState == ElementState::kCell && j < units; ++j) {
        CHECK_CLOSE(c_n[n * units + j], c[j], 1e-12);
      }
    }
  }

  T loss(const std::vector<T>& a, const std::vector<T>& b) const {
    T sum = 0;
    for (size_t i = 0; i < output.size(); ++i) sum += a[i] * output[i];
    for (size_t i = 0; i < h_n.size(); ++i) sum += b[i] * h_n[i];
    return sum;
  }

  // Gradients of the gate pre-activations, and through them of everything, by the backward scan in runs of some steps.
  void check_backward(const CpuPlan& plan, int64_t steps_a_run) {
    Random r(7);
    const CpuPlan packed;
    forward(packed);
    const std::vector<T> a = random(r, output.size(), 1), b = random(r, h_n.size(), 1);
    std::vector<T> grad_gates(steps * batch * kInputs<Cell> * units, 0), grad_projected(steps * batch * outputs, 0);
    std::vector<T> carry(batch * units, 0), grad_first(batch * Cell::kGates * units, 0);
    const std::vector<T> saved = reserve, states = output;
    BackwardParams<T> p;
    p.reverse = reverse;
    p.w_hh = w_hh.data(), p.w_hr = w_hr.data();
    p.reserve = saved.data(), p.reserve_stride = columns();
    p.output = states.data(), p.output_stride = outputs, p.h0 = h0.data(), p.c0 = c0.data();
    p.grad_output = a.data(), p.grad_output_stride = outputs;
    p.grad_h_n = b.data();
    p.grad_gates = grad_gates.data(), p.grad_projected = grad_projected.data();
    p.carry = carry.data(), p.grad_first = grad_first.data();
    Scan s = scan(plan);
    std::vector<char> scratch(BackwardScan<Cell, T>::scratch_bytes(s) + 64);
    for (; s.first_visit < steps; s.first_visit += steps_a_run) {
      s.end_visit = s.first_visit + steps_a_run;
      BackwardScan<Cell, T>::run(s, &p, aligned(scratch));
    }

    const double step = 1e-5;
    const auto difference = [&](T& x) {
      const T at = x;
      x = at + step;
      forward(packed);
      const T above = loss(a, b);
      x = at - step;
      forward(packed);
      const T below = loss(a, b);
      x = at;
      return (above - below) / (2 * step);
    };
    for (int i = 0; i < 40; ++i) {
      const int64_t row = r.below(steps * batch), g = r.below(Cell::kGates * units);
      const double expected = difference(gates[row * Cell::kGates * units + g]);
      CHECK_CLOSE(grad_gates[row * kInputs<Cell> * units + g], expected, 1e-7);
    }
    for (int64_t n = 0; n < batch; ++n) {
      if (Cell::kState == ElementState::kCell) {
        const int64_t j = r.below(units);
        CHECK_CLOSE(carry[n * units + j], difference(c0[n * units + j]), 1e-7);
      }
      const int64_t k = r.below(outputs);
      T grad = Cell::kState == ElementState::kHidden ? carry[n * units + k] : length[n] == 0 ? b[n * outputs + k] : 0;
      if (Cell::kState == ElementState::kHidden && length[n] == 0) grad = b[n * outputs + k];
      for (int64_t g = 0; g < Cell::kGates * units; ++g) {
        grad += grad_first[n * Cell::kGates * units + g] * w_hh[g * outputs + k];
      }
      CHECK_CLOSE(grad, difference(h0[n * outputs + k]), 1e-7);
    }
  }
};

template <class Cell>
void test_scan(bool projected) {
  const CpuPlan one{Recurrent::kPacked, false, 1, false}, fused{Recurrent::kPacked, true, 1, false};
  const CpuPlan units{Recurrent::kPacked, false, 2, true}, rows{Recurrent::kPacked, true, 2, false};
  const CpuPlan natural{Recurrent::kNatural, false, 1, false}, natural_input{Recurrent::kNatural, true, 1, false};
  const CpuPlan natural_units{Recurrent::kNatural, false, 2, true}, natural_both{Recurrent::kNatural, true, 2, true};
  CpuPlan ahead = one, ahead_units = units, ahead_rows{Recurrent::kPacked, false, 2, false};
  ahead.ahead = 2, ahead_units.ahead = 3, ahead_rows.ahead = 7;
  for (const bool reverse : {false, true}) {
    for (const bool ragged : {false, true}) {
      unsigned seed = 10;
      for (const int64_t h : {1, 3, 17, 129}) {
        for (const int64_t n : {1, 2, 3, 17}) {
          Problem<Cell> problem(++seed, 5, n, h, reverse, projected, ragged);
          for (const CpuPlan& plan : {one, fused, units, rows, natural, natural_input, natural_units, natural_both,
                                      ahead, ahead_units, ahead_rows}) {
            problem.forward(plan);
            problem.check_against_loop();
          }
        }
      }
      Problem<Cell> small(++seed, 4, 3, 5, reverse, projected, ragged);
      for (const CpuPlan& plan : {one, units, rows}) small.check_backward(plan, 1 + plan.threads);
      Problem<Cell> wide(++seed, 3, 9, 67, reverse, projected, ragged);
      for (const CpuPlan& plan : {one, units, rows}) wide.check_backward(plan, 4 - plan.threads);
    }
  }
}

// Three layers beside one another on two threads, each with the output of the one below as its input.
template <class Cell>
void test_beside(bool projected) {
  CpuPlan fused{Recurrent::kPacked, true, 1, false}, ahead{Recurrent::kPacked, false, 1, false};
  ahead.ahead = 3;
  unsigned seed = 60;
  for (const bool ragged : {false, true}) {
    for (const int64_t h : {3, 17, 65}) {
      for (const int64_t n : {1, 3, 17}) {
        std::vector<Problem<Cell>> layers;
        layers.reserve(3);
        for (int i = 0; i < 3; ++i) {
          layers.emplace_back(++seed, 23, n, h + i, false, projected, ragged, i == 0 ? 3 : layers[i - 1].outputs);
          const Problem<Cell>& bottom = layers.front();
          Problem<Cell>& layer = layers.back();  // has the rows of the bottom one
          layer.length = bottom.length, layer.order = bottom.order, layer.active = bottom.active;
          layer.reset = bottom.reset, layer.rows = bottom.rows;
          layer.forward(fused);  // its output has its place now
        }
        for (const auto& plans : {std::array{ahead, ahead, ahead}, std::array{fused, ahead, fused}}) {
          Progress progress[2];
          for (int i = 0; i < 3; ++i) {
            if (i > 0) layers[i].input_from = layers[i - 1].output.data(), layers[i].below = &progress[i - 1];
            if (i < 2) layers[i].progress = &progress[i];
          }
          std::thread other([&] { layers[1].forward(plans[1]); });
          layers[0].forward(plans[0]);
          layers[2].forward(plans[2]);
          other.join();
          for (int i = 0; i < 3; ++i) {
            if (i > 0) layers[i].input = layers[i - 1].output;
            layers[i].project();
            layers[i].check_against_loop();
          }
        }
      }
    }
  }
}

template <class... Cells>
void test_derivatives() {
  (test_cell_by_differences<Cells>(), ...);
}

template <class... Cells>
void test_vectors() {
  (test_cell_as_vector<Cells, float>(), ...);
  (test_cell_as_vector<Cells, double>(), ...);
}

}  // namespace CPU_CAPABILITY

// FASTRNN_TEST: test_kernels_avx512, test_kernels_avx2 or test_kernels_default.
void FASTRNN_TEST() {
  test_activations<float>();
  test_activations<double>();
  test_parts();
  test_part_products(3, {33, 35, 37}, false, 1);
  test_part_products(2, {70, 545, 545}, true, 1);
  test_part_products(3, {129, 65, 33}, false, 2);
  test_part_products(2, {17, 97, 129}, true, 3);
  test_tile_products<float>();
  test_tile_products<double>();
  test_derivatives<RnnCell<Tanh>, RnnCell<Relu>, LstmCell<>, GruCell<>, LstmCell<Linear, Linear>,
                   GruCell<Linear, Linear>>();
  test_vectors<RnnCell<Tanh>, RnnCell<Relu>, LstmCell<>, GruCell<>>();
  test_scan<RnnCell<Linear>>(false);
  test_scan<LstmCell<Linear, Linear>>(false);
  test_scan<LstmCell<Linear, Linear>>(true);
  test_scan<GruCell<Linear, Linear>>(false);
  test_beside<RnnCell<Linear>>(false);
  test_beside<LstmCell<Linear, Linear>>(true);
  test_beside<GruCell<Linear, Linear>>(false);
}

}  // namespace fastrnn::test
