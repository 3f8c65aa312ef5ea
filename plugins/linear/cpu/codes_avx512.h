// Codes and their sums on AVX-512 with VNNI: 16 weight rows a vector. Included by codes.h.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {

constexpr int kMaxTokens = 16;  // accumulators of the largest token block, beside 8 vectors of codes

// 32 codes of 16 rows: vector q holds k = 4q..4q+3 of every row. Those of float4 are looked up.
template <int bits, bool float4>
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
    if constexpr (float4) {
      const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kFloat4)));
      for (int q = 0; q < 8; ++q) quad[q] = _mm512_shuffle_epi8(table, quad[q]);
    }
  }

  // Quads first..last-1 alone, where half of them share a scale.
  Ints dot(const int8_t* x, Ints start, int first = 0, int last = 8) const {
    // Two chains: one alone would wait for its own results.
    __m512i odd = _mm512_setzero_si512();
    for (int q = first; q < last; q += 2) {
      int32_t four, next;
      __builtin_memcpy(&four, x + 4 * q, 4);
      __builtin_memcpy(&next, x + 4 * q + 4, 4);
      start = _mm512_dpbusd_epi32(start, quad[q], _mm512_set1_epi32(four));
      odd = _mm512_dpbusd_epi32(odd, quad[q + 1], _mm512_set1_epi32(next));
    }
    return _mm512_add_epi32(start, odd);
  }

  // The sum of each row's codes, each less its zero point.
  Ints sum_less(Ints zero_point, int first = 0, int last = 8) const {
    const __m512i ones = _mm512_set1_epi8(1);
    Ints sum = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(zero_point, last - first == 8 ? 5 : 4));
    if constexpr (bits == 8) {
      __m512i odd = _mm512_setzero_si512();
      for (int q = first; q < last; q += 2) {
        sum = _mm512_dpbusd_epi32(sum, quad[q], ones);
        odd = _mm512_dpbusd_epi32(odd, quad[q + 1], ones);
      }
      sum = _mm512_add_epi32(sum, odd);
    } else {
      // Eight codes, of at most 24, fit a byte, and adding bytes leaves the units that multiply to the tokens.
      __m512i bytes = quad[first];
      for (int q = first + 1; q < last; ++q) bytes = _mm512_add_epi8(bytes, quad[q]);
      sum = _mm512_dpbusd_epi32(sum, bytes, ones);
    }
    return sum;
  }
};

// The extremes of 32 values; a NaN or an infinity among them makes high - low a NaN or an infinity.
inline Range range_of(const float* x) {
  const __m512 a = load(x), b = load(x + 16);
  // Maxima of x and of -x, reduced side by side: each has half of the vector.
  const __m512 high = _mm512_max_ps(a, b), low = _mm512_xor_ps(_mm512_min_ps(a, b), splat(-0.0f));
  __m512 most = _mm512_max_ps(_mm512_shuffle_f32x4(high, low, 0x44), _mm512_shuffle_f32x4(high, low, 0xee));
  most = _mm512_max_ps(most, _mm512_shuffle_f32x4(most, most, 0xb1));
  most = _mm512_max_ps(most, _mm512_permute_ps(most, 0x4e));
  most = _mm512_max_ps(most, _mm512_permute_ps(most, 0xb1));
  const Range range{-_mm512_cvtss_f32(_mm512_shuffle_f32x4(most, most, 2)), _mm512_cvtss_f32(most)};
  // Maxima may lose a NaN.
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) ? Range{range.low, std::numeric_limits<float>::quiet_NaN()} : range;
}

// Rounds 32 values (x - low) * inverse, all within 0..255, less 128, to int8; returns their sum.
inline int32_t quantize_block(const float* x, float low, float inverse, int8_t* codes) {
  const __m512i a = _mm512_cvtps_epi32((load(x) - splat(low)) * splat(inverse));
  const __m512i b = _mm512_cvtps_epi32((load(x + 16) - splat(low)) * splat(inverse));
  const __m256i bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(b), _mm512_cvtepi32_epi8(a));
  // Flipping the highest bit of a byte is the same as taking 128 away.
  const __m256i less = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), less);
  return sum_bytes(bytes) - 32 * 128;
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
