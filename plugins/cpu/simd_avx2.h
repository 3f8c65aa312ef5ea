// AVX2: 8 floats a vector. Included by simd.h, which has what all instruction sets share.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace simd {

using Floats = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

SLIPSTREAM_INLINE Floats splat(float x) { return _mm256_set1_ps(x); }
SLIPSTREAM_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
SLIPSTREAM_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
SLIPSTREAM_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
SLIPSTREAM_INLINE Floats abs(Floats a) { return _mm256_andnot_ps(splat(-0.0f), a); }
SLIPSTREAM_INLINE Floats round(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SLIPSTREAM_INLINE float reduce_add(Floats a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
SLIPSTREAM_INLINE float reduce_max(Floats a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

SLIPSTREAM_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
SLIPSTREAM_INLINE Floats load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SLIPSTREAM_INLINE Floats load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// A half has four of a Float8's bits of exponent and one more on top, which is 2^8 apart; a NaN gets them all.
SLIPSTREAM_INLINE Floats load(const Float8* p) {
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i size = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_and_si128(_mm_add_epi16(size, _mm_set1_epi16(1)), _mm_set1_epi16(0x80));
  const __m128i half = _mm_or_si128(_mm_slli_epi16(_mm_or_si128(size, nan), 7),
                                    _mm_and_si128(wide, _mm_set1_epi16(-0x8000)));
  return _mm256_mul_ps(_mm256_cvtph_ps(half), splat(256.0f));
}
// Of kLanes pairs, the first of each and the second.
SLIPSTREAM_INLINE Floats load_firsts(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
SLIPSTREAM_INLINE Floats load_seconds(const BFloat16* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}
SLIPSTREAM_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
SLIPSTREAM_INLINE void store(Half* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SLIPSTREAM_INLINE void store(int8_t* p, Floats a) {
  const __m256i wide = _mm256_cvtps_epi32(a);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

SLIPSTREAM_INLINE Floats keep(Floats a, int64_t low, int64_t high, Floats other) {
  const Floats lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  const Floats inside = _mm256_and_ps(_mm256_cmp_ps(lane, splat(static_cast<float>(low)), _CMP_GE_OQ),
                                   _mm256_cmp_ps(lane, splat(static_cast<float>(high)), _CMP_LT_OQ));
  return _mm256_blendv_ps(other, a, inside);
}
SLIPSTREAM_INLINE Floats scale_or_zero(Floats a, Floats n, Floats x) {
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
  return _mm256_and_ps(_mm256_castsi256_ps(scaled), _mm256_cmp_ps(x, splat(-126.0f), _CMP_GE_OQ));
}

// A bit for each lane that is no less.
SLIPSTREAM_INLINE uint32_t lanes_from(Floats a, float least) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, splat(least), _CMP_GE_OQ)));
}
// 2^(a - 127) for a from 1 to 254 on the straight lines between whole numbers, and 0 below.
SLIPSTREAM_INLINE Floats exp2_line(Floats a) {
  const __m256i bits = _mm256_cvtps_epi32(_mm256_mul_ps(a, splat(0x1p23f)));
  return _mm256_and_ps(_mm256_castsi256_ps(bits), _mm256_cmp_ps(a, splat(1.0f), _CMP_GE_OQ));
}

SLIPSTREAM_INLINE Ints splat(int32_t x) { return _mm256_set1_epi32(x); }
SLIPSTREAM_INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
SLIPSTREAM_INLINE Ints load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// a is 0..255 and b fits 16 bits, so one multiply of 16-bit halves is enough.
SLIPSTREAM_INLINE Ints multiply_small(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
// kLanes pairs, and a pair in every lane.
SLIPSTREAM_INLINE Ints load(const Pair16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
SLIPSTREAM_INLINE Ints load(const Pair8* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SLIPSTREAM_INLINE void store(Pair16* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
SLIPSTREAM_INLINE Ints splat(Pair16 a) {
  int32_t both;
  std::memcpy(&both, &a, sizeof(both));
  return _mm256_set1_epi32(both);
}
// c and the products of the pairs' first integers and of their second.
SLIPSTREAM_INLINE Ints fma(Ints a, Ints b, Ints c) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
SLIPSTREAM_INLINE void store(int16_t* p, Floats a) {
  const __m256i wide = _mm256_cvtps_epi32(a);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
}
// 16 numbers.
SLIPSTREAM_INLINE void store_codes(int16_t* p, const Floats (&a)[2]) {
  const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
// 2^a of whole numbers in -126..127.
SLIPSTREAM_INLINE Floats exp2_whole(Floats a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a), splat(127)), 23));
}

}  // namespace simd
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
