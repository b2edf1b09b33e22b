// The SIMD value type of the cells: ATen's Vectorized, compiled for the ISA that CPU_CAPABILITY names, and its Math.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "core/activation.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

template <class T>
using Vec = at::vec::Vectorized<T>;

// Vectors that a tile may keep in registers: accumulators, weights and one broadcast. The portable vector is 32 bytes
// wide, two registers of the x86 baseline.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#elif defined(CPU_CAPABILITY_AVX2)
inline constexpr int kVectorRegisters = 16;
#else
inline constexpr int kVectorRegisters = 8;
#endif
inline constexpr int kAccumulators = kVectorRegisters * 3 / 4;

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
// to 3: e^x = 2^n e^r with |r| <= ln(2)/2 (Cody and Waite's reduction), and a polynomial for e^r.
template <>
struct Math<Vec<float>> : VecMath<float> {
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // products with the high part are exact
  // (e^r - 1 - r) / r^2: minimax for the relative error of e^r, which is 4e-9
  static constexpr float kExp[] = {0.49999994f, 0.16666521f, 0.04166839f, 0.008368745f, 0.001381454f};

  // kExp at scale * r, each coefficient times `factor`; `scale` is a power of two, so that nothing is rounded.
  static FASTRNN_INLINE V exp_tail(V r, float scale, float factor) {
    constexpr int kLast = 4;
    float power = factor * scale * scale * scale * scale;
    V p(kExp[kLast] * power);
#pragma GCC unroll 4
    for (int i = kLast - 1; i >= 0; --i) {
      power /= scale;
      p = at::vec::fmadd(p, r, V(kExp[i] * power));
    }
    return p;
  }

  static FASTRNN_INLINE V times_power_of_two(V x, V n) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_scalef_ps(x, n);
#else
    const auto exponent = at::vec::convert_to_int_of_same_size(n) + at::vec::Vectorized<int32_t>(127);
    return x * at::vec::cast<float>(exponent << at::vec::Vectorized<int32_t>(23));
#endif
  }

  // A division of full-width vectors takes as long as eight multiplications; the estimate of the reciprocal, right to 14
  // bits, with one Newton step takes three and errs by half a unit and a sixteenth. x lies within [1, 2^127).
  static FASTRNN_INLINE V reciprocal(V x) {
#if defined(CPU_CAPABILITY_AVX512)
    const V r = _mm512_rcp14_ps(x);
    return at::vec::fmadd(V(_mm512_fnmadd_ps(x, r, V(1))), r, r);
#else
    return V(1) / x;
#endif
  }

  // x < bound ? a : b; the latter for NaN
  static FASTRNN_INLINE V if_less(V x, float bound, V a, V b) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, V(bound), _CMP_LT_OQ), b, a);
#else
    return V::blendv(b, a, x < V(bound));
#endif
  }

  static FASTRNN_INLINE V sigmoid(V x) {
    const V within = at::vec::clamp(x, V(-87.5f), V(87.0f));  // passes NaN on
    const V n = (within * V(-kLog2E)).round();
    V r = at::vec::fmadd(n, V(kLn2High), within);  // of the opposite sign: e^-x = 2^n e^-r
    r = at::vec::fmadd(n, V(kLn2Low), r);
    V e = at::vec::fmadd(exp_tail(r, -1.0f, 1.0f), r, V(-1));
    e = times_power_of_two(at::vec::fmadd(e, r, V(1)), n);
    return if_less(x, -87.33654f, V(0), reciprocal(V(1) + e));  // denormals, and exactly zero at minus infinity
  }

  // With f = (e^2|x| - 1) / 2 it is f / (f + 1), which keeps its digits near zero, and 1 - 1 / (f + 1), which errs by
  // half a unit near one, where the derivative 1 - y^2 shows every unit of y.
  static FASTRNN_INLINE V tanh(V x) {
    const V magnitude = at::vec::clamp_max(x.abs(), V(9.1f));  // beyond it tanh is 1 in float; passes NaN on
    const V n = (magnitude * V(2 * kLog2E)).round();
    V h = at::vec::fmadd(n, V(-kLn2High / 2), magnitude);  // half of r
    h = at::vec::fmadd(n, V(-kLn2Low / 2), h);
    const V m = at::vec::fmadd(exp_tail(h, 2.0f, 2.0f) * h, h, h);  // (e^r - 1) / 2
    const V scale = times_power_of_two(V(1), n);
    const V f = at::vec::fmadd(scale, m, at::vec::fmadd(scale, V(0.5f), V(-0.5f)));
    const V r = reciprocal(f + V(1));
    return if_less(magnitude, 0.55f, f * r, V(1) - r) | (x & V(-0.0f));
  }
};

}  // namespace fastrnn
