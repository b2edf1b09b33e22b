// The kernels of one step, as the host loop calls them: plain C++, without a header of CUDA or torch. Pointers lead to
// device memory; T is the storage type of the tensors, A the type of sums and states (float, for double storage double).
#pragma once

#include <cstdint>

#include "core/cells/all.h"
#include "core/params.h"

namespace fastrnn {

// One step of one direction.
struct StepRows {
  int64_t t = 0;
  int64_t visited = 0;  // rows of the batch, from the first on: N, or those of the packed step
  int64_t longer = 0;  // of these, those that have a step t + 1 as far as the host knows: packed data
  int64_t first = 0;  // row of (t, 0)
  int64_t before = 0;  // row of (t', 0), t' the step before t in the scan's direction
};

// What the kernels know of the rows. Lengths and resets stay on the device; the host knows the layout only.
struct StepTable {
  int64_t steps = 0;  // T
  int64_t batch = 0;  // N
  int64_t total = 0;  // rows: T * N, or those of a packed batch
  int64_t batch_stride = 0;  // from (t, n) to (t, n + 1)
  const int64_t* lengths = nullptr;  // [N] or null
  const bool* reset = nullptr;  // [T, N] by strides, or null
  int64_t reset_step_stride = 0;  //
  int64_t reset_batch_stride = 0;  //
  int directions = 1;  // D; the second is the reverse one
  StepRows step[2];  // [D]

  FASTRNN_INLINE Sequence sequence(int d, int64_t n) const {
    const StepRows& s = step[d];
    // A packed row needs to know only whether it ends here. Lengths are checked by others, but never trusted.
    int64_t length = n < s.longer ? steps : s.t + 1;
    if (lengths != nullptr) length = lengths[n] < steps ? lengths[n] : steps;
    return {length, reset == nullptr ? nullptr : reset + n * reset_batch_stride, reset_step_stride};
  }
  FASTRNN_INLINE int64_t row(int d, int64_t n) const { return d * total + step[d].first + n * batch_stride; }
  FASTRNN_INLINE int64_t row_before(int d, int64_t n) const { return d * total + step[d].before + n * batch_stride; }
};

struct StepForward {
  StepTable table;
  int64_t units = 0;  // H
  int64_t outputs = 0;  // P or H
  bool projected = false;  //
  bool save = false;  //
  void* gates = nullptr;  // A [D, rows, gates_stride] in: the input projection; out, with save: the reserve
  int64_t gates_stride = 0;  //
  const void* recurrent = nullptr;  // A [D, N, G*H] W_hh h_{t-1}, null: zeros
  const void* b_ih[2] = {};  // T [G*H] of each direction, or null
  const void* b_hh[2] = {};  // T [G*H] of each direction, or null
  const void* h0 = nullptr;  // T [D, N, outputs] or null: zeros
  const void* c0 = nullptr;  // T [D, N, H] or null: zeros
  void* hidden = nullptr;  // T [D, N, outputs] out: the h that enters the next step, zeros where none does
  void* state = nullptr;  // A [D, N, H] the element state that enters a step; in, and out for the next
  void* activation = nullptr;  // T [D, N, H] projected only, out of the first phase: h before its projection
  const void* product = nullptr;  // A [D, N, P] projected only, into the second phase: W_hr h
  void* output = nullptr;  // T [rows, D*outputs]
  void* cells = nullptr;  // T [rows, D*H] or null: c of every step
  void* h_n = nullptr;  // T [D, N, outputs]
  void* c_n = nullptr;  // T [D, N, H] or null
};

struct StepBackward {
  StepTable table;
  int64_t units = 0;  // H
  int64_t outputs = 0;  // P or H
  bool projected = false;  //
  const void* reserve = nullptr;  // A [D, rows, reserve_stride]
  int64_t reserve_stride = 0;  //
  const void* output = nullptr;  // T [rows, D*outputs]
  const void* h0 = nullptr;  // T [D, N, outputs] or null: zeros
  const void* c0 = nullptr;  // T [D, N, H] or null: zeros
  const void* grad_output = nullptr;  // T [rows, D*outputs] or null
  const void* grad_cells = nullptr;  // T [rows, D*H] or null
  const void* grad_h_n = nullptr;  // T [D, N, outputs] or null
  const void* grad_c_n = nullptr;  // T [D, N, H] or null
  const void* product = nullptr;  // A [D, N, outputs] step_gates W_hh of the step that h_t flows into, or null
  const void* grad_activation = nullptr;  // A [D, N, H] projected only, into the second phase: grad_h_t W_hr
  void* carry = nullptr;  // A [D, N, H] of the step that the state flows into; out: of this one
  void* grad_gates = nullptr;  // T [D, rows, G*H] out: gradients of the input projection
  void* grad_recurrent = nullptr;  // T [D, rows, G*H] out: of the recurrent one, or null: not wanted, or the same
  void* step_gates = nullptr;  // T [D, N, G*H] out: of the recurrent one, this step's
  void* grad_first = nullptr;  // T [D, N, G*H] out: those of each row's first step, or null
  void* previous = nullptr;  // T [D, rows, outputs] out: the h that entered the step, or null
  void* grad_projected = nullptr;  // T [D, rows, P] out of the first phase, projected only
  void* step_projected = nullptr;  // T [D, N, P] the same, this step's
};

// A step has two phases if the layer is projected; a product by the caller stands between them. On `stream` (a
// cudaStream_t), without waiting for it. Throws std::runtime_error if a launch fails.
void forward_step(CellKind kind, Storage storage, const StepForward& params, void* stream);
void forward_projected(Storage storage, const StepForward& params, void* stream);
void backward_projected(Storage storage, const StepBackward& params, void* stream);
void backward_step(CellKind kind, Storage storage, const StepBackward& params, void* stream);

}  // namespace fastrnn
