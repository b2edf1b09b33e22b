// What a step does element by element: one kernel forward and one backward, for any cell; between their phases, where a
// projection splits a step, stands a GEMM of the host loop (ops/stepwise.cpp). A thread has one unit of one row of the
// batch at a time; no thread needs another.
#pragma once

#include <type_traits>

#include "gpu.h"
#include "kernels.h"

namespace fastrnn {

template <class T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Element `index` of an array of T, as a sum type; zero where there is no array.
template <class T>
GPU_FN Accumulation<T> load(const void* p, int64_t index) {
  using A = Accumulation<T>;
  return p == nullptr ? A(0) : static_cast<A>(static_cast<const T*>(p)[index]);
}
template <class T>
GPU_FN void store(void* p, int64_t index, Accumulation<T> value) {
  static_cast<T*>(p)[index] = static_cast<T>(value);
}

// Calls f(direction, row of the batch, column) for all columns of all rows that a step visits. Blocks: x columns, y rows,
// z directions.
template <class F>
GPU_FN void for_elements(const StepTable& table, int64_t columns, const F& f) {
  const int d = static_cast<int>(blockIdx.z);
  for (int64_t n = blockIdx.y * int64_t{blockDim.y} + threadIdx.y; n < table.step[d].visited;
       n += int64_t{gridDim.y} * blockDim.y) {
    for (int64_t j = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; j < columns;
         j += int64_t{gridDim.x} * blockDim.x) {
      f(d, n, j);
    }
  }
}

// One row of the batch in one step of one direction.
struct StepRow {
  const StepTable& table;
  int d;
  int64_t n, t, row;
  bool reverse;
  Sequence sequence;

  GPU_FN StepRow(const StepTable& steps, int direction, int64_t batch_row)
      : table(steps),
        d(direction),
        n(batch_row),
        t(steps.step[direction].t),
        row(steps.row(direction, batch_row)),
        reverse(direction == 1),
        sequence(steps.sequence(direction, batch_row)) {}

  GPU_FN bool valid() const { return t < sequence.length; }
  // Is this step's state the final one?
  GPU_FN bool last() const { return sequence.last(t, reverse); }
  // Does it flow into another step? There is no reset to look at beyond the row's end.
  GPU_FN bool flows_on() const { return valid() && !last() && sequence.flows(reverse ? t - 1 : t + 1, reverse); }
  // Of a tensor [D, N, width].
  GPU_FN int64_t of_batch(int64_t width, int64_t j) const { return (d * table.batch + n) * width + j; }
  // Of a tensor [rows, D*width], at row r of this direction.
  GPU_FN int64_t of_rows(int64_t r, int64_t width, int64_t j) const {
    return ((r - d * table.total) * table.directions + d) * width + j;
  }
};

template <class T>
struct ForwardElement : StepRow {
  using A = Accumulation<T>;
  const StepForward& p;

  GPU_FN ForwardElement(const StepForward& params, int direction, int64_t batch_row)
      : StepRow(params.table, direction, batch_row), p(params) {}

  // h_t of a valid step: to the output, to the final state, into the next step.
  GPU_FN void emit(int64_t j, A h) const {
    store<T>(p.output, of_rows(row, p.outputs, j), h);
    if (last()) {
      store<T>(p.h_n, of_batch(p.outputs, j), h);
    } else {
      store<T>(p.hidden, of_batch(p.outputs, j), flows_on() ? h : A(0));
    }
  }

  // A step beyond the row's end leaves the states alone, so that an initial state waits there for the step it enters.
  GPU_FN void emit_padding(int64_t j) const {
    store<T>(p.output, of_rows(row, p.outputs, j), A(0));
    if (t == 0) store<T>(p.h_n, of_batch(p.outputs, j), load<T>(p.h0, of_batch(p.outputs, j)));
  }

  template <class Cell>
  GPU_FN void pad(int64_t u) const {
    if (p.save) {
      const int64_t columns = (Cell::kSaved + p.projected) * p.units;
      for (int64_t j = u; j < columns; j += p.units) store<A>(p.gates, row * p.gates_stride + j, A(0));
    }
    if (p.cells != nullptr) store<T>(p.cells, of_rows(row, p.units, u), A(0));
    if (p.c_n != nullptr && t == 0) store<T>(p.c_n, of_batch(p.units, u), load<T>(p.c0, of_batch(p.units, u)));
    if (!p.projected) emit_padding(u);
  }

  template <class Cell>
  GPU_FN void step(int64_t u) const {
    constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kSaved = Cell::kSaved;
    A gate[kGates + kSeparate];
    for (int g = 0; g < kGates; ++g) {
      const int64_t j = g * p.units + u;
      const A input = load<A>(p.gates, row * p.gates_stride + j) + load<T>(p.b_ih[d], j);
      const A recurrent = load<A>(p.recurrent, of_batch(kGates * p.units, j)) + load<T>(p.b_hh[d], j);
      if (g < kGates - kSeparate) {
        gate[g] = input + recurrent;
      } else {
        gate[g] = input;
        gate[g + kSeparate] = recurrent;
      }
    }
    constexpr ElementState kState = Cell::kState;
    A state = kState == ElementState::kNone ? A(0) : load<A>(p.state, of_batch(p.units, u));
    A saved[kSaved];
    const A h = Cell::forward(gate, state, saved);
    if (kState == ElementState::kCell) {
      if (p.cells != nullptr) store<T>(p.cells, of_rows(row, p.units, u), state);
      if (last()) store<T>(p.c_n, of_batch(p.units, u), state);
    } else {
      state = h;
    }
    if (kState != ElementState::kNone) store<A>(p.state, of_batch(p.units, u), flows_on() ? state : A(0));
    if (p.save) {
      for (int k = 0; k < kSaved; ++k) store<A>(p.gates, row * p.gates_stride + k * p.units + u, saved[k]);
      if (p.projected) store<A>(p.gates, row * p.gates_stride + kSaved * p.units + u, h);
    }
    if (p.projected) {
      store<T>(p.activation, of_batch(p.units, u), h);
    } else {
      emit(u, h);
    }
  }
};

template <class Cell, class T>
__global__ void forward_step_kernel(const StepForward p) {
  for_elements(p.table, p.units, [&](int d, int64_t n, int64_t u) {
    const ForwardElement<T> element(p, d, n);
    if (element.valid()) {
      element.template step<Cell>(u);
    } else {
      element.template pad<Cell>(u);
    }
  });
}

// The second phase of a projected step.
template <class T>
__global__ void forward_projected_kernel(const StepForward p) {
  for_elements(p.table, p.outputs, [&](int d, int64_t n, int64_t j) {
    const ForwardElement<T> element(p, d, n);
    if (element.valid()) {
      element.emit(j, load<Accumulation<T>>(p.product, element.of_batch(p.outputs, j)));
    } else {
      element.emit_padding(j);
    }
  });
}

template <class T>
struct BackwardElement : StepRow {
  using A = Accumulation<T>;
  const StepBackward& p;

  GPU_FN BackwardElement(const StepBackward& params, int direction, int64_t batch_row)
      : StepRow(params.table, direction, batch_row), p(params) {}

  // The h that entered the step.
  GPU_FN A previous_h(int64_t j) const {
    if (sequence.flows(t, reverse)) return load<T>(p.output, of_rows(table.row_before(d, n), p.outputs, j));
    return sequence.enters(t, reverse) ? load<T>(p.h0, of_batch(p.outputs, j)) : A(0);
  }

  // Everything that reaches h_t but what a cell carries element by element.
  GPU_FN A incoming(int64_t j) const {
    A grad = load<T>(p.grad_output, of_rows(row, p.outputs, j));
    if (last()) grad += load<T>(p.grad_h_n, of_batch(p.outputs, j));
    if (flows_on()) grad += load<A>(p.product, of_batch(p.outputs, j));
    if (p.previous != nullptr) store<T>(p.previous, row * p.outputs + j, previous_h(j));
    return grad;
  }

  GPU_FN void pad_incoming(int64_t j) const {
    if (p.previous != nullptr) store<T>(p.previous, row * p.outputs + j, A(0));
  }

  template <class Cell>
  GPU_FN void pad(int64_t u) const {
    for (int64_t j = u; j < Cell::kGates * p.units; j += p.units) {
      store<T>(p.grad_gates, row * Cell::kGates * p.units + j, A(0));
      if (p.grad_recurrent != nullptr) store<T>(p.grad_recurrent, row * Cell::kGates * p.units + j, A(0));
    }
    // a row without steps hands its initial state through
    if (Cell::kState == ElementState::kCell && t == 0) {
      store<A>(p.carry, of_batch(p.units, u), load<T>(p.grad_c_n, of_batch(p.units, u)));
    }
    if (!p.projected) pad_incoming(u);
  }

  template <class Cell>
  GPU_FN void step(int64_t u, A grad_h) const {
    constexpr int kGates = Cell::kGates, kSeparate = Cell::kSeparate, kSaved = Cell::kSaved;
    constexpr ElementState kState = Cell::kState;
    A saved[kSaved];
    for (int k = 0; k < kSaved; ++k) saved[k] = load<A>(p.reserve, row * p.reserve_stride + k * p.units + u);
    const bool flows = sequence.flows(t, reverse), enters = sequence.enters(t, reverse);
    const A carried = flows_on() ? load<A>(p.carry, of_batch(p.units, u)) : A(0);
    A previous(0), carry(0);
    if constexpr (kState == ElementState::kCell) {
      if (flows) {
        const int64_t before = table.row_before(d, n);
        previous = load<A>(p.reserve, before * p.reserve_stride + (kSaved - 1) * p.units + u);
      } else if (enters) {
        previous = load<T>(p.c0, of_batch(p.units, u));
      }
      carry = carried + load<T>(p.grad_cells, of_rows(row, p.units, u));
      if (last()) carry += load<T>(p.grad_c_n, of_batch(p.units, u));
    } else if constexpr (kState == ElementState::kHidden) {
      previous = previous_h(u);
      grad_h += carried;
    }
    A grad_gate[kGates + kSeparate];
    Cell::backward(saved, previous, grad_h, carry, grad_gate);
    if (kState != ElementState::kNone) store<A>(p.carry, of_batch(p.units, u), flows || enters ? carry : A(0));
    for (int g = 0; g < kGates; ++g) {
      const int64_t width = kGates * p.units, j = g * p.units + u;
      const A recurrent = grad_gate[g < kGates - kSeparate ? g : g + kSeparate];
      store<T>(p.grad_gates, row * width + j, grad_gate[g]);
      store<T>(p.step_gates, of_batch(width, j), recurrent);
      if (p.grad_recurrent != nullptr) store<T>(p.grad_recurrent, row * width + j, recurrent);
      if (p.grad_first != nullptr && enters) store<T>(p.grad_first, of_batch(width, j), recurrent);
    }
  }
};

// The first phase of a projected step: the gradient of its output.
template <class T>
__global__ void backward_projected_kernel(const StepBackward p) {
  for_elements(p.table, p.outputs, [&](int d, int64_t n, int64_t j) {
    const BackwardElement<T> element(p, d, n);
    Accumulation<T> grad(0);
    if (element.valid()) {
      grad = element.incoming(j);
    } else {
      element.pad_incoming(j);
    }
    store<T>(p.grad_projected, element.row * p.outputs + j, grad);
    store<T>(p.step_projected, element.of_batch(p.outputs, j), grad);
  });
}

template <class Cell, class T>
__global__ void backward_step_kernel(const StepBackward p) {
  for_elements(p.table, p.units, [&](int d, int64_t n, int64_t u) {
    const BackwardElement<T> element(p, d, n);
    if (!element.valid()) {
      element.template pad<Cell>(u);
    } else if (p.projected) {
      element.template step<Cell>(u, load<Accumulation<T>>(p.grad_activation, element.of_batch(p.units, u)));
    } else {
      element.template step<Cell>(u, element.incoming(u));
    }
  });
}

}  // namespace fastrnn
