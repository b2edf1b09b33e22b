// The functions of the cells and their derivatives, for scalars. Vector types specialise Math in their own header, so
// that one cell serves both. (Not called math.h: that name would shadow the system's header.)
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FASTRNN_INLINE __host__ __device__ __forceinline__
#else
#define FASTRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fastrnn {

// Transcendental functions of a value type: scalars here, SIMD vectors in cpu/vec.h.
template <class V>
struct Math {
  static FASTRNN_INLINE V sigmoid(V x) { return V(1) / (V(1) + std::exp(-x)); }
  static FASTRNN_INLINE V tanh(V x) { return std::tanh(x); }
  static FASTRNN_INLINE V relu(V x) { return x < V(0) ? V(0) : x; }  // NaN stays NaN
  // 0 where y <= 0, else 1: like torch, a NaN lets the gradient through
  static FASTRNN_INLINE V positive(V y) { return y <= V(0) ? V(0) : V(1); }
};

// An activation is a function and its derivative, the latter from the function's output: all that backward has.
struct Sigmoid {
  template <class V>
  static FASTRNN_INLINE V value(V x) {
    return Math<V>::sigmoid(x);
  }
  template <class V>
  static FASTRNN_INLINE V derivative(V y) {
    return y * (V(1) - y);
  }
};

struct Tanh {
  template <class V>
  static FASTRNN_INLINE V value(V x) {
    return Math<V>::tanh(x);
  }
  template <class V>
  static FASTRNN_INLINE V derivative(V y) {
    return V(1) - y * y;
  }
};

struct Relu {
  template <class V>
  static FASTRNN_INLINE V value(V x) {
    return Math<V>::relu(x);
  }
  template <class V>
  static FASTRNN_INLINE V derivative(V y) {
    return Math<V>::positive(y);
  }
};

// For tests: nothing saturates, so no fault in the flow of the data can hide behind a flat sigmoid or tanh.
struct Linear {
  template <class V>
  static FASTRNN_INLINE V value(V x) {
    return x;
  }
  template <class V>
  static FASTRNN_INLINE V derivative(V) {
    return V(1);
  }
};

}  // namespace fastrnn
