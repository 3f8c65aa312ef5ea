// Codes and their sums on AVX2: 8 weight rows a vector, so a tile of 16 takes two passes. Included by codes.h.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {

constexpr int kMaxTokens = 6;  // of which registers hold few, but a block is unpacked once for all; 8 take a sixth more each

// Four-bit numbers times int8, two products a 16-bit lane: eight quads reach at most 8*2*15*128 = 30720, which fits;
// four quads of float4, whose codes reach 24, at most 4*2*24*128 = 24576.
inline __m256i dot_nibbles(const __m256i* quad, const int8_t* x, int first, int last) {
  __m256i sum = _mm256_setzero_si256();
  for (int q = first; q < last; ++q) {
    int32_t four;
    __builtin_memcpy(&four, x + 4 * q, 4);
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(quad[q], splat(four)));
  }
  return sum;
}

// Sums of four bytes, each a sum of at most eight nibbles.
inline __m256i sum_nibbles(const __m256i* quad, int first, int last) {
  __m256i sum = quad[first];
  for (int q = first + 1; q < last; ++q) sum = _mm256_add_epi8(sum, quad[q]);
  return _mm256_madd_epi16(_mm256_maddubs_epi16(sum, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

// 32 codes of 8 rows: vector q holds k = 4q..4q+3 of every row. Those of float4 are looked up; codes of 8 bits are kept
// as two nibbles, because products of whole bytes would saturate the 16-bit lanes of vpmaddubsw.
template <int bits, bool float4>
struct Codes {
  __m256i low[8];
  __m256i high[bits == 8 ? 8 : 1];

  explicit Codes(const uint8_t* p) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < bits; ++i) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64 * i));
      const __m256i even = _mm256_and_si256(bytes, mask);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
      if constexpr (bits == 8) {
        low[i] = even;
        high[i] = odd;
      } else {
        low[2 * i] = even;
        low[2 * i + 1] = odd;
      }
    }
    if constexpr (float4) {
      const __m256i table =
          _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kFloat4)));
      for (int q = 0; q < 8; ++q) low[q] = _mm256_shuffle_epi8(table, low[q]);
    }
  }

  // Quads first..last-1 alone, where half of them share a scale.
  Ints dot(const int8_t* x, Ints start, int first = 0, int last = 8) const {
    const int part = float4 ? 4 : 8;
    for (int q = first; q < last; q += part) {
      const __m256i units = dot_nibbles(low, x, q, last - q < part ? last : q + part);
      start = _mm256_add_epi32(start, _mm256_madd_epi16(units, _mm256_set1_epi16(1)));
    }
    if constexpr (bits == 8) {
      const __m256i sixteens = dot_nibbles(high, x, first, last);
      start = _mm256_add_epi32(start, _mm256_madd_epi16(sixteens, _mm256_set1_epi16(16)));
    }
    return start;
  }

  // The sum of each row's codes, each less its zero point.
  Ints sum_less(Ints zero_point, int first = 0, int last = 8) const {
    Ints sum = sum_nibbles(low, first, last);
    if constexpr (bits == 8) sum = _mm256_add_epi32(sum, _mm256_slli_epi32(sum_nibbles(high, first, last), 4));
    return _mm256_sub_epi32(sum, _mm256_slli_epi32(zero_point, last - first == 8 ? 5 : 4));
  }
};

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
