// The SIMD value type of the cells: ATen's Vectorized, compiled for the ISA that CPU_CAPABILITY names, and its Math.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "core/activation.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

template <class T>
using Vec = at::vec::Vectorized<T>;

// Registers that a tile may fill with accumulators, weights and one broadcast.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif

template <class T>
FASTRNN_INLINE Vec<T> load(const T* p, int64_t count) {
  return count >= Vec<T>::size() ? Vec<T>::loadu(p) : Vec<T>::loadu(p, count);
}

template <class T>
FASTRNN_INLINE void store(T* p, Vec<T> v, int64_t count) {
  if (count >= Vec<T>::size()) {
    v.store(p);
  } else {
    v.store(p, static_cast<int>(count));
  }
}

// What vectors of both types share.
template <class T>
struct VecMath {
  using V = Vec<T>;
  static FASTRNN_INLINE V relu(V x) { return at::vec::maximum(x, V(0)); }  // NaN stays NaN
  static FASTRNN_INLINE V positive(V y) { return V::blendv(V(1), V(0), y <= V(0)); }
};

}  // namespace CPU_CAPABILITY

template <>
struct Math<Vec<double>> : VecMath<double> {
  static FASTRNN_INLINE V sigmoid(V x) { return V(1) / (V(1) + x.neg().exp()); }
  static FASTRNN_INLINE V tanh(V x) { return x.tanh(); }
};

// Sleef's float functions are right to 1 ulp, and make the cell four to seven times dearer than these, which are right
// to 3: exp and expm1 by Cody and Waite's reduction, e^x = 2^n e^r with |r| <= ln(2)/2.
template <>
struct Math<Vec<float>> : VecMath<float> {
  // e^r - 1 = r + r^2 p(r), and n, for x within +-88
  static FASTRNN_INLINE V reduce(V x, V& n) {
    n = (x * V(1.44269504088896341f)).round();
    V r = at::vec::fmadd(n, V(-0.693359375f), x);     // the high part of ln(2): exact products
    r = at::vec::fmadd(n, V(2.12194440054690581e-4f), r);  // the low part
    V p(1.9875691500e-4f);
    p = at::vec::fmadd(p, r, V(1.3981999507e-3f));
    p = at::vec::fmadd(p, r, V(8.3334519073e-3f));
    p = at::vec::fmadd(p, r, V(4.1665795894e-2f));
    p = at::vec::fmadd(p, r, V(1.6666665459e-1f));
    p = at::vec::fmadd(p, r, V(5.0000001201e-1f));
    return at::vec::fmadd(p * r, r, r);
  }

  static FASTRNN_INLINE V power_of_two(V n) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_scalef_ps(V(1), n);
#else
    const auto exponent = at::vec::convert_to_int_of_same_size(n) + at::vec::Vectorized<int32_t>(127);
    return at::vec::cast<float>(exponent << at::vec::Vectorized<int32_t>(23));
#endif
  }

  // A division of full-width vectors takes as long as eight multiplications; the estimate of the reciprocal with two
  // Newton steps, the second as exact as an FMA makes it, takes five and errs by half a unit and a little.
  // x lies within [1, 2^127).
  static FASTRNN_INLINE V reciprocal(V x) {
#if defined(CPU_CAPABILITY_AVX512)
    V r = _mm512_rcp14_ps(x);
    r = at::vec::fmadd(V(_mm512_fnmadd_ps(x, r, V(1))), r, r);
    return at::vec::fmadd(V(_mm512_fnmadd_ps(x, r, V(1))), r, r);
#else
    return V(1) / x;
#endif
  }

  static FASTRNN_INLINE V sigmoid(V x) {
    V n;
    const V m = reduce(at::vec::clamp(x.neg(), V(-87.0f), V(87.5f)), n);  // clamp passes NaN on
    const V scale = power_of_two(n);
    const V y = reciprocal(V(1) + at::vec::fmadd(scale, m, scale));
    return V::blendv(y, V(0), x < V(-87.33654f));  // denormals, and exactly zero at minus infinity
  }

  // 1 - 2 / (e^2|x| + 1) errs by half a unit near one, where the derivative 1 - y^2 shows every unit of y. It cancels
  // near zero; there an odd polynomial stands in (coefficients: Cephes, Moshier 1989).
  static FASTRNN_INLINE V tanh(V x) {
    V n;
    const V magnitude = at::vec::clamp(x.abs(), V(0), V(9.1f));  // beyond it tanh is 1 in float
    const V m = reduce(magnitude + magnitude, n);
    const V scale = power_of_two(n);
    const V r = reciprocal(at::vec::fmadd(scale, m, scale) + V(1));
    const V large = V(1) - (r + r);
    const V square = x * x;
    V p(-5.70498872745e-3f);
    p = at::vec::fmadd(p, square, V(2.06390887954e-2f));
    p = at::vec::fmadd(p, square, V(-5.37397155531e-2f));
    p = at::vec::fmadd(p, square, V(1.33314422036e-1f));
    p = at::vec::fmadd(p, square, V(-3.33332819422e-1f));
    const V small = at::vec::fmadd(p * square, x, x);
    return V::blendv(large | (x & V(-0.0f)), small, magnitude < V(0.625f));
  }
};

}  // namespace fastrnn
