// AVX-512: 16 floats a vector. Included by simd.h, which has what all instruction sets share.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace simd {

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

SLIPSTREAM_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
SLIPSTREAM_INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
SLIPSTREAM_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The instruction can broadcast by itself, but compilers keep a vector for a factor that is used twice.
SLIPSTREAM_INLINE Floats fma_splat(const float* a, Floats b, Floats c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
}
SLIPSTREAM_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
SLIPSTREAM_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
SLIPSTREAM_INLINE Floats abs(Floats a) { return _mm512_abs_ps(a); }
SLIPSTREAM_INLINE Floats round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SLIPSTREAM_INLINE float reduce_add(Floats a) { return _mm512_reduce_add_ps(a); }
SLIPSTREAM_INLINE float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }
// A bit for each lane that is no less.
SLIPSTREAM_INLINE uint32_t lanes_from(Floats a, float least) {
  return _mm512_cmp_ps_mask(a, splat(least), _CMP_GE_OQ);
}
// 2^(a - 127) for a from 1 to 254 on the straight lines between whole numbers, and 0 below.
SLIPSTREAM_INLINE Floats exp2_line(Floats a) {
  const __mmask16 some = _mm512_cmp_ps_mask(a, splat(1.0f), _CMP_GE_OQ);
  return _mm512_castsi512_ps(_mm512_maskz_cvtps_epi32(some, _mm512_mul_ps(a, splat(0x1p23f))));
}

SLIPSTREAM_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
SLIPSTREAM_INLINE Floats load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SLIPSTREAM_INLINE Floats load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// A half has four of a Float8's bits of exponent and one more on top, which is 2^8 apart; a NaN gets them all.
SLIPSTREAM_INLINE Floats from_e4m3(__m128i codes) {
  const __m256i wide = _mm256_cvtepi8_epi16(codes), one = _mm256_set1_epi16(1), top = _mm256_set1_epi16(0x80);
  const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_and_si256(_mm256_add_epi16(size, one), top);
  const __m256i half = _mm256_or_si256(_mm256_slli_epi16(_mm256_or_si256(size, nan), 7),
                                       _mm256_and_si256(wide, _mm256_set1_epi16(-0x8000)));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), splat(256.0f));
}
SLIPSTREAM_INLINE Floats load(const Float8* p) { return from_e4m3(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// Of kLanes pairs, the first of each and the second.
SLIPSTREAM_INLINE Floats load_firsts(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
SLIPSTREAM_INLINE Floats load_seconds(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-0x10000)));
}
SLIPSTREAM_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }

// The first n lanes (1 <= n <= kLanes) and no memory beyond them; the other lanes load as zero.
SLIPSTREAM_INLINE Floats load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
SLIPSTREAM_INLINE Floats load_first(const Half* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
SLIPSTREAM_INLINE Floats load_first(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
SLIPSTREAM_INLINE Floats load_first(const Float8* p, int n) {
  return from_e4m3(_mm_maskz_loadu_epi8(first_lanes(n), p));
}
SLIPSTREAM_INLINE void store_first(float* p, Floats a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
SLIPSTREAM_INLINE void store_first(Half* p, Floats a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SLIPSTREAM_INLINE void store_first(int8_t* p, Floats a, int n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}

// Lanes low <= i < high of a, and of other elsewhere.
SLIPSTREAM_INLINE Floats keep(Floats a, int64_t low, int64_t high, Floats other) {
  const int from = low < 0 ? 0 : low > kLanes ? kLanes : static_cast<int>(low);
  const int to = high < 0 ? 0 : high > kLanes ? kLanes : static_cast<int>(high);
  return _mm512_mask_blend_ps(first_lanes(to) & static_cast<__mmask16>(~first_lanes(from)), other, a);
}
// a * 2^n for whole n, and 0 in lanes where x < -126 or is not a number.
SLIPSTREAM_INLINE Floats scale_or_zero(Floats a, Floats n, Floats x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_GE_OQ), a, n);
}

SLIPSTREAM_INLINE Ints splat(int32_t x) { return _mm512_set1_epi32(x); }
SLIPSTREAM_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
SLIPSTREAM_INLINE Ints load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// a is 0..255 and b fits 16 bits, so one multiply of 16-bit halves is enough.
SLIPSTREAM_INLINE Ints multiply_small(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
// kLanes pairs, and a pair in every lane.
SLIPSTREAM_INLINE Ints load(const Pair16* p) { return _mm512_loadu_si512(p); }
SLIPSTREAM_INLINE Ints load(const Pair8* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SLIPSTREAM_INLINE Ints load_first(const Pair16* p, int n) { return _mm512_maskz_loadu_epi32(first_lanes(n), p); }
SLIPSTREAM_INLINE Ints load_first(const Pair8* p, int n) {
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
SLIPSTREAM_INLINE void store(Pair16* p, Ints a) { _mm512_storeu_si512(p, a); }
SLIPSTREAM_INLINE Ints splat(Pair16 a) {
  int32_t both;
  std::memcpy(&both, &a, sizeof(both));
  return _mm512_set1_epi32(both);
}
// c and the products of the pairs' first integers and of their second.
SLIPSTREAM_INLINE Ints fma(Ints a, Ints b, Ints c) { return _mm512_dpwssd_epi32(c, a, b); }
SLIPSTREAM_INLINE Ints fma_splat(const Pair16* a, Ints b, Ints c) { return fma(splat(*a), b, c); }
SLIPSTREAM_INLINE void store_first(int16_t* p, Floats a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
}
SLIPSTREAM_INLINE void store(int16_t* p, Floats a) { store_first(p, a, kLanes); }
// 16 numbers.
SLIPSTREAM_INLINE void store_codes(int16_t* p, const Floats (&a)[16 / kLanes]) {
  for (int v = 0; v < 16 / kLanes; ++v) store(p + v * kLanes, a[v]);
}
// 2^a of whole numbers in -126..127.
SLIPSTREAM_INLINE Floats exp2_whole(Floats a) { return _mm512_scalef_ps(splat(1.0f), a); }

}  // namespace simd
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
