// Numbers of bfloat16 that a float32 is multiplied as: one that it is rounded to, or two or three whose sum it is (amx.h).
// Compiled once per ISA.
#pragma once

#include <tuple>

#include "cpu/amx.h"
#include "cpu/vec.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

// v rounded to the 8 bits of a bfloat16, to nearest. What it is off by is exact, and takes 8 bits less than v. NaN in v, or
// a number that is rounded to infinity, makes that NaN.
FASTRNN_INLINE Vec<float> leading(Vec<float> v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 numbers = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);  // NaN would be rounded to zero
  const __m512i rounded = _mm512_mask_add_epi32(bits, numbers, bits, _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(~0xffff)));
#else
  return std::get<0>(at::vec::convert_to_float<at::BFloat16>(at::vec::convert_from_float<at::BFloat16>(v, v)));
#endif
}

// Numbers that leading() has given.
FASTRNN_INLINE void store_leading(at::BFloat16* p, Vec<float> v, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  store_16_bits(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)), count);
#else
  store(p, v, count);
#endif
}

// A number to `to` in one part, rounded to nearest, or in several, each `apart` behind the one before.
FASTRNN_INLINE void store_parts(int parts, at::BFloat16* to, int64_t apart, Vec<float> v, int64_t count) {
  if (parts == 1) return store(to, v, count);
  for (; parts > 0; --parts, to += apart) {
    const Vec<float> high = leading(v);
    store_leading(to, high, count);
    v = v - high;
  }
}

template <class W>
void copy_parts(int parts, at::BFloat16* to, int64_t apart, const W* from, int64_t count) {
  if constexpr (std::is_same_v<W, at::BFloat16>) {  // is one part
    std::copy_n(from, count, to);
  } else {
    constexpr int kLanes = Vec<float>::size();
    for (int64_t k = 0; k < count; k += kLanes) {
      store_parts(parts, to + k, apart, load(from + k, count - k), count - k);
    }
  }
}

// Pairs (a[i], b[i]) in the same way, to [lanes][2].
FASTRNN_INLINE void store_pairs(int parts, at::BFloat16* to, int64_t apart, Vec<float> a, Vec<float> b) {
  constexpr int kLanes = Vec<float>::size();
  const auto [low, high] = at::vec::interleave2(a, b);
  store_parts(parts, to, apart, low, kLanes);
  store_parts(parts, to + kLanes, apart, high, kLanes);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
