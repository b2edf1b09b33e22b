// The SIMD value type of the cells: ATen's Vectorized, compiled for the ISA that CPU_CAPABILITY names, and its Math.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/activation.h"
#include "core/params.h"

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
inline constexpr int kAccumulators = kVectorRegisters == 32 ? 27 : kVectorRegisters * 3 / 4;

// v, to be used so many times, in a register. g++ would have each of several instructions load it from memory again, and
// again while it is on its way. A single one may: the fewer instructions, the more loads a processor sees ahead.
template <int kUses, class T>
FASTRNN_INLINE Vec<T> in_register(Vec<T> v) {
  if constexpr (kUses == 1) return v;
#if defined(CPU_CAPABILITY_AVX512)
  const auto keep = [](auto x) {
    asm("" : "+v"(x));
    return Vec<T>(x);
  };
  if constexpr (std::is_same_v<T, float>) {
    return keep(static_cast<__m512>(v));
  } else {
    return keep(static_cast<__m512d>(v));
  }
#else
  return v;
#endif
}

template <class T>
FASTRNN_INLINE Vec<T> load(const T* p, int64_t count) {
  return count >= Vec<T>::size() ? Vec<T>::loadu(p) : Vec<T>::loadu(p, count);
}

// The same of 16-bit numbers.
template <class T>
FASTRNN_INLINE Vec<float> load_wide(const T* p, int64_t count) {
  Vec<float> v;
  if (count >= Vec<float>::size()) {
    at::vec::load_to_float(p, v);
  } else {
    T part[Vec<float>::size()] = {};
    std::memcpy(part, p, count * sizeof(T));
    at::vec::load_to_float(part, v);
  }
  return v;
}
FASTRNN_INLINE Vec<float> load(const at::BFloat16* p, int64_t count) { return load_wide(p, count); }
FASTRNN_INLINE Vec<float> load(const at::Half* p, int64_t count) { return load_wide(p, count); }

// f(the matrix in its own type)
template <class T, class Element, class F>
FASTRNN_INLINE auto with_stored(const Stored<T, Element>& matrix, const F& f) {
  const auto as = [&]<class U>(U) {
    return static_cast<std::conditional_t<std::is_const_v<Element>, const U, U>*>(matrix.data);
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (matrix.storage != Storage::kFloat) {
      return matrix.storage == Storage::kHalf ? f(as(at::Half())) : f(as(at::BFloat16()));
    }
  }
  return f(as(T()));
}

template <class T>
FASTRNN_INLINE void store(T* p, Vec<T> v, int64_t count) {
  if (count >= Vec<T>::size()) {
    v.store(p);
  } else {
    v.store(p, static_cast<int>(count));
  }
}

#if defined(CPU_CAPABILITY_AVX512)
template <class U>
FASTRNN_INLINE void store_16_bits(U* p, __m256i v, int64_t count) {
  if (count >= Vec<float>::size()) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), v);
  }
}
#endif

// Rounded to nearest.
template <class U>
FASTRNN_INLINE void store_narrow(U* p, Vec<float> v, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)  // convert_from_float makes 32 numbers
  if constexpr (std::is_same_v<U, at::BFloat16>) {
    store_16_bits(p, at::vec::cvtfp32_bf16(v), count);
  } else {
    store_16_bits(p, at::vec::cvtfp32_fp16(v), count);
  }
#else
  at::vec::convert_from_float<U>(v, v).store(p, static_cast<int>(std::min<int64_t>(count, v.size())));
#endif
}
FASTRNN_INLINE void store(at::BFloat16* p, Vec<float> v, int64_t count) { store_narrow(p, v, count); }
FASTRNN_INLINE void store(at::Half* p, Vec<float> v, int64_t count) { store_narrow(p, v, count); }

// Elements from j on.
template <class T>
FASTRNN_INLINE Vec<T> load(const T* row, int64_t j, int64_t count) {
  return load(row + j, count);
}
template <class T>
FASTRNN_INLINE Vec<T> load(const Stored<T>& row, int64_t j, int64_t count) {
  return with_stored(row, [&](const auto* p) { return load(p + j, count); });
}
template <class T>
FASTRNN_INLINE void store(const Written<T>& row, int64_t j, Vec<T> v, int64_t count) {
  with_stored(row, [&](auto* p) { store(p + j, v, count); });
}

// K vectors that take turns, operation by operation. A cell is a chain of operations that each wait for the one before,
// longer than a processor looks ahead: the cells of other rows fill its gaps only if their chains run beside it.
template <class T, int K>
struct Several {
  Vec<T> v[K];

  Several() = default;
  explicit FASTRNN_INLINE Several(T x) {
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) v[i] = Vec<T>(x);
  }
};

inline constexpr int kCellsInTurn = kVectorRegisters == 32 ? 3 : 1;  // cells that take turns, as registers allow

// f(x, more...) of a vector, or of each of several.
template <class F, class T, class... More>
FASTRNN_INLINE Vec<T> each(const F& f, Vec<T> x, const More&... more) {
  return f(x, more...);
}
template <class F, class T, int K, class... More>
FASTRNN_INLINE Several<T, K> each(const F& f, const Several<T, K>& x, const More&... more) {
  Several<T, K> y;
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) y.v[i] = f(x.v[i], more.v[i]...);
  return y;
}

template <class T, int K>
FASTRNN_INLINE Several<T, K> operator+(const Several<T, K>& a, const Several<T, K>& b) {
  return each([](Vec<T> x, Vec<T> y) { return x + y; }, a, b);
}
template <class T, int K>
FASTRNN_INLINE Several<T, K> operator-(const Several<T, K>& a, const Several<T, K>& b) {
  return each([](Vec<T> x, Vec<T> y) { return x - y; }, a, b);
}
template <class T, int K>
FASTRNN_INLINE Several<T, K> operator*(const Several<T, K>& a, const Several<T, K>& b) {
  return each([](Vec<T> x, Vec<T> y) { return x * y; }, a, b);
}

template <class V>
FASTRNN_INLINE V multiply_add(const V& a, const V& b, const V& c) {
  return each([](auto x, auto y, auto z) { return at::vec::fmadd(x, y, z); }, a, b, c);
}

// 2^n, of a float whose lowest bits are those of n + 127, as the exponent of a float is stored.
template <class V>
FASTRNN_INLINE V power_of_two(const V& x) {
  return each(
      [](Vec<float> y) -> Vec<float> {
#if defined(CPU_CAPABILITY_AVX512)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(y), 23));
#else
        return at::vec::cast<float>(at::vec::cast<int32_t>(y) << at::vec::Vectorized<int32_t>(23));
#endif
      },
      x);
}

// A division of full-width vectors takes as long as eight multiplications on many processors; the estimate of the
// reciprocal, right to 14 bits, with one Newton step takes three and errs by half a unit and a sixteenth. x lies within
// [1, 2^127).
#if defined(CPU_CAPABILITY_AVX512)
template <class V>
struct Estimate {
  V r, rest;  // the reciprocal is r + rest r
};

template <class V>
FASTRNN_INLINE Estimate<V> estimate(const V& x) {
  const V r = each([](Vec<float> y) -> Vec<float> { return _mm512_rcp14_ps(y); }, x);
  const V rest = each([](Vec<float> y, Vec<float> s) -> Vec<float> { return _mm512_fnmadd_ps(y, s, Vec<float>(1)); }, x,
                      r);
  return {r, rest};
}
#endif

// 1 / x
template <class V>
FASTRNN_INLINE V reciprocal(const V& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto [r, rest] = estimate(x);
  return multiply_add(rest, r, r);
#else
  return each([](Vec<float> y) { return Vec<float>(1) / y; }, x);
#endif
}

// of < bound ? 0 : 1 / x; the latter for NaN
template <class V>
FASTRNN_INLINE V reciprocal_or_zero(const V& x, const V& of, float bound) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto [r, rest] = estimate(x);
  return each(
      [=](Vec<float> y, Vec<float> z, Vec<float> w) -> Vec<float> {
        return _mm512_maskz_fmadd_ps(_mm512_cmp_ps_mask(w, Vec<float>(bound), _CMP_NLT_UQ), y, z, z);
      },
      rest, r, of);
#else
  return each([=](Vec<float> y, Vec<float> w) { return Vec<float>::blendv(y, Vec<float>(0), w < Vec<float>(bound)); },
              reciprocal(x), of);
#endif
}

// x < bound ? a * b : c; the latter for NaN
template <class V>
FASTRNN_INLINE V product_if_less(const V& x, float bound, const V& a, const V& b, const V& c) {
  return each(
      [=](Vec<float> y, Vec<float> s, Vec<float> t, Vec<float> other) -> Vec<float> {
#if defined(CPU_CAPABILITY_AVX512)
        return _mm512_mask_mul_ps(other, _mm512_cmp_ps_mask(y, Vec<float>(bound), _CMP_LT_OQ), s, t);
#else
        return Vec<float>::blendv(other, s * t, y < Vec<float>(bound));
#endif
      },
      x, a, b, c);
}

// Of a vector V of T, or of several.
template <class V, class T>
struct VecMath {
  static FASTRNN_INLINE V relu(const V& x) {  // NaN stays NaN
    return each([](Vec<T> y) { return at::vec::maximum(y, Vec<T>(0)); }, x);
  }
  static FASTRNN_INLINE V positive(const V& x) {
    return each([](Vec<T> y) { return Vec<T>::blendv(Vec<T>(1), Vec<T>(0), y <= Vec<T>(0)); }, x);
  }
};

template <class V>
struct DoubleMath : VecMath<V, double> {
  static FASTRNN_INLINE V sigmoid(const V& x) {
    return each([](Vec<double> y) { return Vec<double>(1) / (Vec<double>(1) + y.neg().exp()); }, x);
  }
  static FASTRNN_INLINE V tanh(const V& x) {
    return each([](Vec<double> y) { return y.tanh(); }, x);
  }
};

// Sleef's float functions are right to 1 ulp, and make the cell five to nine times dearer than these, which are right to
// 3: e^x = 2^n e^r with |r| <= ln(2)/2 (Cody and Waite's reduction), and a polynomial for e^r.
template <class V>
struct FloatMath : VecMath<V, float> {
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // products with the high part are exact
  // (e^r - 1 - r) / r^2: minimax for the relative error of e^r, which is 4e-9
  static constexpr float kExp[] = {0.49999994f, 0.16666521f, 0.04166839f, 0.008368745f, 0.001381454f};

  // kExp at scale * r, each coefficient times `factor`; `scale` is a power of two, so that nothing is rounded.
  static FASTRNN_INLINE V exp_tail(const V& r, float scale, float factor) {
    constexpr int kLast = 4;
    float power = factor * scale * scale * scale * scale;
    V p(kExp[kLast] * power);
#pragma GCC unroll 4
    for (int i = kLast - 1; i >= 0; --i) {
      power /= scale;
      p = multiply_add(p, r, V(kExp[i] * power));
    }
    return p;
  }

  struct Exponent {
    V n, power;  // whole, and 2^n
  };

  // x * factor, rounded to a whole number of -126 to 127: a sum with this number leaves no room for the fraction, and has
  // n + 127 in its lowest bits.
  static FASTRNN_INLINE Exponent exponent(const V& x, float factor) {
    constexpr float kNoFraction = 12582912.0f + 127;  // 3 * 2^22
    const V sum = multiply_add(x, V(factor), V(kNoFraction));
    return {sum - V(kNoFraction), power_of_two(sum)};
  }

  // x + n * factor * ln(2); `factor` is a power of two.
  static FASTRNN_INLINE V plus_ln2(const V& x, const V& n, float factor) {
    return multiply_add(n, V(factor * kLn2Low), multiply_add(n, V(factor * kLn2High), x));
  }

  static FASTRNN_INLINE V sigmoid(const V& x) {
    // passes NaN on
    const V within = each([](Vec<float> y) { return at::vec::clamp(y, Vec<float>(-87.5f), Vec<float>(87.0f)); }, x);
    const auto [n, power] = exponent(within, -kLog2E);
    const V r = plus_ln2(within, n, 1.0f);  // of the opposite sign: e^-x = 2^n e^-r
    const V e = multiply_add(multiply_add(exp_tail(r, -1.0f, 1.0f), r, V(-1)), r, V(1));
    // zero for denormals, and exactly at minus infinity
    return reciprocal_or_zero(multiply_add(e, power, V(1)), x, -87.33654f);
  }

  // With f = (e^2|x| - 1) / 2 it is f / (f + 1), which keeps its digits near zero, and 1 - 1 / (f + 1), which errs by
  // half a unit near one, where the derivative 1 - y^2 shows every unit of y.
  static FASTRNN_INLINE V tanh(const V& x) {
    // beyond 9.1 tanh is 1 in float; passes NaN on
    const V magnitude = each([](Vec<float> y) { return at::vec::clamp_max(y.abs(), Vec<float>(9.1f)); }, x);
    const auto [n, power] = exponent(magnitude, 2 * kLog2E);
    const V h = plus_ln2(magnitude, n, -0.5f);  // half of r
    const V m = multiply_add(exp_tail(h, 2.0f, 2.0f) * h, h, h);  // (e^r - 1) / 2
    const V f = multiply_add(power, m, multiply_add(power, V(0.5f), V(-0.5f)));
    const V r = reciprocal(f + V(1));
    const V y = product_if_less(magnitude, 0.55f, f, r, V(1) - r);
    return each([](Vec<float> z, Vec<float> of) { return z | (of & Vec<float>(-0.0f)); }, y, x);
  }
};

}  // namespace CPU_CAPABILITY

template <>
struct Math<Vec<float>> : FloatMath<Vec<float>> {};
template <>
struct Math<Vec<double>> : DoubleMath<Vec<double>> {};
template <int K>
struct Math<Several<float, K>> : FloatMath<Several<float, K>> {};
template <int K>
struct Math<Several<double, K>> : DoubleMath<Several<double, K>> {};

}  // namespace fastrnn
