// What a scan gets: raw pointers and strides (in elements), no tensor. All buffers belong to the caller.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/activation.h"

namespace c10 {
struct BFloat16;
}

namespace fastrnn {

// One row of the batch in time. Whatever a scan asks about lengths and resets is answered here, once for all devices.
struct Sequence {
  int64_t length = 0;           // valid steps
  const bool* reset = nullptr;  // [T] or null: a new sequence starts here
  int64_t reset_stride = 0;     //

  FASTRNN_INLINE bool resets(int64_t t) const { return reset != nullptr && reset[t * reset_stride]; }
  // Does a state flow into step t from the step before it in the scan's direction?
  FASTRNN_INLINE bool flows(int64_t t, bool reverse) const {
    return reverse ? t + 1 < length && !resets(t + 1) : t > 0 && !resets(t);
  }
  // Does the initial state enter at step t?
  FASTRNN_INLINE bool enters(int64_t t, bool reverse) const { return reverse ? t == length - 1 : t == 0 && !resets(0); }
  // Is t the step whose state is the final state?
  FASTRNN_INLINE bool last(int64_t t, bool reverse) const { return t == (reverse ? 0 : length - 1); }
};

// Which rows a scan visits, and where they lie. T steps, N rows of the batch.
struct Rows {
  int64_t steps = 0;                   // T
  int64_t batch = 0;                   // N
  const int64_t* offset = nullptr;     // [T] the row of (t, n) is offset[t] + n * batch_stride
  int64_t batch_stride = 0;            //
  const int64_t* active = nullptr;     // [T] step t visits order[0 .. active[t]); not increasing
  const int64_t* order = nullptr;      // [N] rows of the batch, longest first
  const int64_t* length = nullptr;     // [N] valid steps
  const bool* reset = nullptr;         // [T, N] or null: a new sequence starts here
  int64_t reset_step_stride = 0;       //
  int64_t reset_batch_stride = 0;      //

  FASTRNN_INLINE int64_t row(int64_t t, int64_t n) const { return offset[t] + n * batch_stride; }
  FASTRNN_INLINE Sequence sequence(int64_t n) const {
    return {length[n], reset == nullptr ? nullptr : reset + n * reset_batch_stride, reset_step_stride};
  }
};

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// Of an element.
constexpr FASTRNN_INLINE int bytes_of(Storage storage) {
  return storage == Storage::kDouble ? 8 : storage == Storage::kFloat ? 4 : 2;
}

// A matrix as its owner keeps it, in T or, for T = float, in 16 bits: what reads or writes it converts it on the way.
template <class T, class Element = const T>
struct Stored {
  using Data = std::conditional_t<std::is_const_v<Element>, const void, void>;
  using Byte = std::conditional_t<std::is_const_v<Element>, const char, char>;
  Data* data = nullptr;
  Storage storage = sizeof(T) == sizeof(float) ? Storage::kFloat : Storage::kDouble;

  Stored() = default;
  Stored(Element* p) : data(p) {}  // NOLINT(google-explicit-constructor): a pointer is such a matrix
  Stored(Data* p, Storage type) : data(p), storage(type) {}

  // From element i on.
  FASTRNN_INLINE Stored from(int64_t i) const { return {static_cast<Byte*>(data) + i * bytes_of(storage), storage}; }
};
template <class T>
using Written = Stored<T, T>;

// How the recurrent projection of a step is computed.
enum class Recurrent {
  kPacked,   // register tiles over weights that the scan packs first
  kNatural,  // dot products over the weights as they lie (few rows)
  kProduct,  // by the caller, ahead of the scan (one step, many rows)
};

// Dimensions of one layer. `outputs` is P if projected, else H.
struct LayerShape {
  int64_t inputs = 0;   // I
  int64_t units = 0;    // H
  int64_t outputs = 0;  // P or H
  bool projected = false;
};

// One direction, forward.
template <class T>
struct ForwardParams {
  bool reverse = false;
  Stored<T> w_hh;                // [G*H, outputs]
  Stored<T> w_hr;                // [P, H] or null
  const T* bias = nullptr;       // [(G+S)*H] b_ih + b_hh; for separate gates b_ih, and b_hh behind the gates
  Stored<T> w_ih;                // [G*H, I]      only where the scan multiplies the input: CpuPlan::multiplies_input
  Stored<T> input;               // [rows, I]     the same; of 16 bits for products of bfloat16, and steps ahead
  const T* product = nullptr;    // [N, G*H]      kProduct only: W_hh h_0
  const T* h0 = nullptr;         // [N, outputs] or null: zeros
  const T* c0 = nullptr;         // [N, H] or null: zeros
  T* gates = nullptr;            // [rows, gates_stride] in: the input projection, unless the scan makes it;
                                 // out, with save: the reserve
  int64_t gates_stride = 0;      //
  bool save = false;             //
  Written<T> output;             // [rows, output_stride]
  int64_t output_stride = 0;     //
  T* cells = nullptr;            // [rows, cells_stride] or null: c of every step
  int64_t cells_stride = 0;      //
  T* h_n = nullptr;              // [N, outputs]
  T* c_n = nullptr;              // [N, H] or null
};

// One direction, backward.
template <class T>
struct BackwardParams {
  bool reverse = false;
  Stored<T> w_hh;                       // [G*H, outputs]
  Stored<T> w_hr;                       // [P, H] or null
  const T* reserve = nullptr;           // [rows, reserve_stride]
  int64_t reserve_stride = 0;           //
  Stored<T> output;                     // [rows, output_stride] if part of a gradient flows to h_{t-1} directly
  int64_t output_stride = 0;            //
  const T* h0 = nullptr;                // [N, outputs] or null: zeros
  const T* c0 = nullptr;                // [N, H] or null: zeros
  Stored<T> grad_output;                // [rows, grad_output_stride] or null
  int64_t grad_output_stride = 0;       //
  const T* grad_cells = nullptr;        // [rows, grad_cells_stride] or null
  int64_t grad_cells_stride = 0;        //
  const T* grad_h_n = nullptr;          // [N, outputs] or null
  const T* grad_c_n = nullptr;          // [N, H] or null
  const int64_t* grad_offset = nullptr;  // [T] or null: results of row i of step t's order are in grad_offset[t] + i
  T* grad_gates = nullptr;              // [rows, (G+S)*H] out, valid rows only
  c10::BFloat16* rounded_gates = nullptr;  // of products of bfloat16 only: the same in its place, if not null
  T* grad_projected = nullptr;          // [rows, P] out (projected only)
  T* carry = nullptr;                   // [N, H] out: dc_0, or what flows to h_0 element by element
  T* grad_first = nullptr;  // [N, G*H] out: recurrent gate gradients of each row's first step, zeros if none
};

// [(G+S)*H] what is added to the projections (ForwardParams::bias), from torch's two biases [G*H]. Null: zeros.
template <class T>
void sum_biases(int gates, int separate, int64_t units, const T* b_ih, const T* b_hh, T* bias) {
  const int64_t count = gates * units, together = (gates - separate) * units;
  for (int64_t j = 0; j < count; ++j) {
    const T input = b_ih == nullptr ? T(0) : b_ih[j], recurrent = b_hh == nullptr ? T(0) : b_hh[j];
    bias[j] = j < together ? input + recurrent : input;
    if (j >= together) bias[j + separate * units] = recurrent;
  }
}

}  // namespace fastrnn
