// Two small layers, forward and backward, with nothing around the scans: a program whose instructions valgrind can count
// (tests/test_instructions.py). Built for AVX2, as valgrind knows no AVX-512. Each scan stands in a function of its own,
// by whose name the counting starts and stops.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/cells/gru.h"
#include "core/cells/lstm.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fastrnn {

template <class Cell>
class Layer {
 public:
  Layer(int64_t steps, int64_t batch, int64_t inputs, int64_t units)
      : scan_{CellKind::kLstm, {inputs, units, units, false}, {}, {Recurrent::kPacked, true, 1, false}, 1},
        offset_(steps),
        active_(steps, batch),
        order_(batch),
        length_(batch, steps),
        w_ih_(random(Cell::kGates * units * inputs)),
        w_hh_(random(Cell::kGates * units * units)),
        bias_(random((Cell::kGates + Cell::kSeparate) * units)),
        input_(random(steps * batch * inputs)),
        grad_output_(random(steps * batch * units)),
        reserve_(steps * batch * Cell::kSaved * units),
        output_(steps * batch * units),
        h_n_(batch * units),
        c_n_(batch * units),
        grad_gates_(steps * batch * (Cell::kGates + Cell::kSeparate) * units),
        carry_(batch * units) {
    for (int64_t t = 0; t < steps; ++t) offset_[t] = t * batch;
    for (int64_t n = 0; n < batch; ++n) order_[n] = n;
    scan_.rows = {steps, batch, offset_.data(), 1, active_.data(), order_.data(), length_.data(), nullptr, 0, 0};
    forward_.w_ih = w_ih_.data(), forward_.w_hh = w_hh_.data(), forward_.bias = bias_.data();
    forward_.input = input_.data();
    forward_.gates = reserve_.data(), forward_.gates_stride = Cell::kSaved * units, forward_.save = true;
    forward_.output = output_.data(), forward_.output_stride = units;
    forward_.h_n = h_n_.data(), forward_.c_n = c_n_.data();
    backward_.w_hh = w_hh_.data();
    backward_.reserve = reserve_.data(), backward_.reserve_stride = Cell::kSaved * units;
    backward_.output = output_.data(), backward_.output_stride = units;
    backward_.grad_output = grad_output_.data(), backward_.grad_output_stride = units;
    backward_.grad_gates = grad_gates_.data(), backward_.carry = carry_.data();
    const int64_t bytes = std::max(Forward::scratch_bytes(scan_), Backward::scratch_bytes(scan_));
    scratch_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  }
  ~Layer() { std::free(scratch_); }
  Layer(const Layer&) = delete;

  void forward() { Forward::run(scan_, &forward_, scratch_); }
  void backward() { Backward::run(scan_, &backward_, scratch_); }
  double sum() const {
    double sum = 0;
    for (const float x : grad_gates_) sum += x;
    return sum;
  }

 private:
  using Forward = ForwardScan<Cell, float>;
  using Backward = BackwardScan<Cell, float>;

  static std::vector<float> random(int64_t count) {
    std::vector<float> v(count);
    for (float& x : v) x = 0.2f * (static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f);
    return v;
  }

  Scan scan_;
  std::vector<int64_t> offset_, active_, order_, length_;
  std::vector<float> w_ih_, w_hh_, bias_, input_, grad_output_, reserve_, output_, h_n_, c_n_, grad_gates_, carry_;
  ForwardParams<float> forward_;
  BackwardParams<float> backward_;
  void* scratch_;
};

}  // namespace fastrnn

#define COUNTED extern "C" [[gnu::noinline]] void

COUNTED counted_lstm_forward(fastrnn::Layer<fastrnn::LstmCell<>>& layer) { layer.forward(); }
COUNTED counted_lstm_backward(fastrnn::Layer<fastrnn::LstmCell<>>& layer) { layer.backward(); }
COUNTED counted_gru_forward(fastrnn::Layer<fastrnn::GruCell<>>& layer) { layer.forward(); }
COUNTED counted_gru_backward(fastrnn::Layer<fastrnn::GruCell<>>& layer) { layer.backward(); }

int main() {
  fastrnn::Layer<fastrnn::LstmCell<>> lstm(16, 16, 64, 64);
  fastrnn::Layer<fastrnn::GruCell<>> gru(17, 3, 33, 67);
  counted_lstm_forward(lstm);
  counted_lstm_backward(lstm);
  counted_gru_forward(gru);
  counted_gru_backward(gru);
  std::printf("%.9g %.9g\n", lstm.sum(), gru.sum());
  return 0;
}
