// The rounding of activations on AVX2. Included by codes.h; products of codes are in multiply_avx2.h.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {

constexpr int kMaxTokens = 4;  // whose products with 16 rows, 8 vectors, leave room for codes; see multiply_avx2.h

// The extremes of 32 values; a NaN or an infinity among them makes high - low a NaN or an infinity.
inline Range range_of(const float* x) {
  const __m256 a = load(x), b = load(x + 8), c = load(x + 16), d = load(x + 24);
  // Maxima of x and of -x, reduced side by side: each has half of the vector.
  const __m256 high = _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
  const __m256 least = _mm256_min_ps(_mm256_min_ps(a, b), _mm256_min_ps(c, d));
  const __m256 low = _mm256_xor_ps(least, splat(-0.0f));
  __m256 most = _mm256_max_ps(_mm256_permute2f128_ps(high, low, 0x20), _mm256_permute2f128_ps(high, low, 0x31));
  most = _mm256_max_ps(most, _mm256_permute_ps(most, 0x4e));
  most = _mm256_max_ps(most, _mm256_permute_ps(most, 0xb1));
  const Range range{-_mm_cvtss_f32(_mm256_extractf128_ps(most, 1)), _mm256_cvtss_f32(most)};
  // Maxima may lose a NaN.
  const __m256 unordered = _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q), _mm256_cmp_ps(c, d, _CMP_UNORD_Q));
  return _mm256_movemask_ps(unordered) ? Range{range.low, std::numeric_limits<float>::quiet_NaN()} : range;
}

// Rounds 32 values (x - low) * inverse, all within 0..255, less 128, to int8; returns their sum.
inline int32_t quantize_block(const float* x, float low, float inverse, int8_t* codes) {
  __m256i q[4];
  for (int i = 0; i < 4; ++i) {
    q[i] = _mm256_cvtps_epi32((load(x + 8 * i) - splat(low)) * splat(inverse));
  }
  // The packs work on 128-bit halves: put the groups of four back in order.
  const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i bytes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  // Flipping the highest bit of a byte is the same as taking 128 away.
  const __m256i less = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), less);
  return sum_bytes(bytes) - 32 * 128;
}

// In double, so that the result does not depend on the order; n is a multiple of 32.
inline double sum_of_squares(const float* x, int64_t n) {
  __m256d even = _mm256_setzero_pd(), odd = even;
  for (int64_t i = 0; i < n; i += 8) {
    const __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(x + i)), b = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4));
    even = _mm256_fmadd_pd(a, a, even);
    odd = _mm256_fmadd_pd(b, b, odd);
  }
  double lanes[4];
  _mm256_storeu_pd(lanes, _mm256_add_pd(even, odd));
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
