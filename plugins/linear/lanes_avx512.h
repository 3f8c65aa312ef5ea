// What the Linear kernels need of AVX-512 with VNNI: 16 weight rows a vector.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace slipstream {
namespace SLIPSTREAM_ISA {

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;
constexpr int kMaxTokens = 16;  // accumulators of the largest token block, beside 8 vectors of codes

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats splat(float v) { return _mm512_set1_ps(v); }
inline Ints splat(int32_t v) { return _mm512_set1_epi32(v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats clamp(Floats v, float low, float high) {
  return _mm512_min_ps(_mm512_max_ps(v, splat(low)), splat(high));
}
inline Floats round(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^v of whole numbers.
inline Floats exp2_whole(Floats v) { return _mm512_scalef_ps(splat(1.0f), v); }

inline Floats load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Ints load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// a is 0..255 and b fits 16 bits, so one multiply of 16-bit halves is enough.
inline Ints multiply_small(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }

// 32 codes of 16 rows: vector q holds k = 4q..4q+3 of every row.
template <int bits>
struct Codes {
  __m512i quad[8];

  explicit Codes(const uint8_t* p) {
    if constexpr (bits == 8) {
      for (int q = 0; q < 8; ++q) quad[q] = _mm512_loadu_si512(p + 64 * q);
    } else {
      const __m512i low = _mm512_set1_epi8(15);
      for (int q = 0; q < 8; q += 2) {
        const __m512i pair = _mm512_loadu_si512(p + 32 * q);
        quad[q] = _mm512_and_si512(pair, low);
        quad[q + 1] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
      }
    }
  }

  Ints dot(const int8_t* x, Ints start) const {
    for (int q = 0; q < 8; ++q) {
      int32_t four;
      __builtin_memcpy(&four, x + 4 * q, 4);
      start = _mm512_dpbusd_epi32(start, quad[q], _mm512_set1_epi32(four));
    }
    return start;
  }
};

// The largest magnitude of 32 values; NaN when one is NaN, because magnitudes are compared as integers.
inline float largest_magnitude(const float* x) {
  const __m512i mask = splat(0x7fffffff);
  const __m512i a = _mm512_and_si512(_mm512_loadu_si512(x), mask);
  const __m512i b = _mm512_and_si512(_mm512_loadu_si512(x + 16), mask);
  const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  return largest;
}

// Rounds 32 values x * inverse, all within -127..127, to int8; returns their sum.
inline int32_t quantize_block(const float* x, float inverse, int8_t* codes) {
  const __m512i a = _mm512_cvtps_epi32(multiply(load(x), splat(inverse)));
  const __m512i b = _mm512_cvtps_epi32(multiply(load(x + 16), splat(inverse)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtepi32_epi8(b));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}

// In double, so that the result does not depend on the order; n is a multiple of 32.
inline double sum_of_squares(const float* x, int64_t n) {
  __m512d even = _mm512_setzero_pd(), odd = even;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512d a = _mm512_cvtps_pd(_mm256_loadu_ps(x + i)), b = _mm512_cvtps_pd(_mm256_loadu_ps(x + i + 8));
    even = _mm512_fmadd_pd(a, a, even);
    odd = _mm512_fmadd_pd(b, b, odd);
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(even, odd));
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
