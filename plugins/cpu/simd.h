// One vector of floats and what kernels do with it, on AVX-512, AVX2, NEON and plain 128-bit vectors.
//
// GCC and Clang give every vector type + - * /, so only what has no operator is spelled here. The code is in a
// namespace per instruction set, because one library holds several builds of each kernel.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC 12's own header trips its uninitialized-variable warnings (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace slipstream {

// An IEEE half; only loads and stores know what its bits mean.
struct Half {
  uint16_t bits;
};

// A float8_e4m3fn: no infinities, NaN with all bits but the sign set, 448 the largest.
struct Float8 {
  uint8_t bits;
};

namespace SLIPSTREAM_ISA {
namespace simd {

#define SLIPSTREAM_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

SLIPSTREAM_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
SLIPSTREAM_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
SLIPSTREAM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The instruction can broadcast by itself, but compilers keep a vector for a factor that is used twice.
SLIPSTREAM_INLINE Vec fma_splat(const float* a, Vec b, Vec c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
}
SLIPSTREAM_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
SLIPSTREAM_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
SLIPSTREAM_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a); }
SLIPSTREAM_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SLIPSTREAM_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
SLIPSTREAM_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }

SLIPSTREAM_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
SLIPSTREAM_INLINE Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SLIPSTREAM_INLINE Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// A half has four of a Float8's bits of exponent and one more on top, which is 2^8 apart; a NaN gets them all.
SLIPSTREAM_INLINE Vec from_e4m3(__m128i codes) {
  const __m256i wide = _mm256_cvtepi8_epi16(codes), one = _mm256_set1_epi16(1), top = _mm256_set1_epi16(0x80);
  const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_and_si256(_mm256_add_epi16(size, one), top);
  const __m256i half = _mm256_or_si256(_mm256_slli_epi16(_mm256_or_si256(size, nan), 7),
                                       _mm256_and_si256(wide, _mm256_set1_epi16(-0x8000)));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), splat(256.0f));
}
SLIPSTREAM_INLINE Vec load(const Float8* p) { return from_e4m3(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
SLIPSTREAM_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }

// The first n lanes (1 <= n <= kLanes) and no memory beyond them; the other lanes load as zero.
SLIPSTREAM_INLINE Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
SLIPSTREAM_INLINE Vec load_first(const Half* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
SLIPSTREAM_INLINE Vec load_first(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
SLIPSTREAM_INLINE Vec load_first(const Float8* p, int n) {
  return from_e4m3(_mm_maskz_loadu_epi8(first_lanes(n), p));
}
SLIPSTREAM_INLINE void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
SLIPSTREAM_INLINE void store_first(Half* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SLIPSTREAM_INLINE void store_first(int8_t* p, Vec a, int n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}

// Lanes low <= i < high of a, and of other elsewhere.
SLIPSTREAM_INLINE Vec keep(Vec a, int64_t low, int64_t high, Vec other) {
  const int from = low < 0 ? 0 : low > kLanes ? kLanes : static_cast<int>(low);
  const int to = high < 0 ? 0 : high > kLanes ? kLanes : static_cast<int>(high);
  return _mm512_mask_blend_ps(first_lanes(to) & static_cast<__mmask16>(~first_lanes(from)), other, a);
}
// a * 2^n for whole n, and 0 in lanes where x < -126 or is not a number.
SLIPSTREAM_INLINE Vec scale_or_zero(Vec a, Vec n, Vec x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_GE_OQ), a, n);
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

SLIPSTREAM_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
SLIPSTREAM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SLIPSTREAM_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
SLIPSTREAM_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
SLIPSTREAM_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(splat(-0.0f), a); }
SLIPSTREAM_INLINE Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SLIPSTREAM_INLINE float reduce_add(Vec a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
SLIPSTREAM_INLINE float reduce_max(Vec a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

SLIPSTREAM_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
SLIPSTREAM_INLINE Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SLIPSTREAM_INLINE Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// A half has four of a Float8's bits of exponent and one more on top, which is 2^8 apart; a NaN gets them all.
SLIPSTREAM_INLINE Vec load(const Float8* p) {
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i size = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_and_si128(_mm_add_epi16(size, _mm_set1_epi16(1)), _mm_set1_epi16(0x80));
  const __m128i half = _mm_or_si128(_mm_slli_epi16(_mm_or_si128(size, nan), 7),
                                    _mm_and_si128(wide, _mm_set1_epi16(-0x8000)));
  return _mm256_mul_ps(_mm256_cvtph_ps(half), splat(256.0f));
}
SLIPSTREAM_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
SLIPSTREAM_INLINE void store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SLIPSTREAM_INLINE void store(int8_t* p, Vec a) {
  const __m256i wide = _mm256_cvtps_epi32(a);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

SLIPSTREAM_INLINE Vec keep(Vec a, int64_t low, int64_t high, Vec other) {
  const Vec lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  const Vec inside = _mm256_and_ps(_mm256_cmp_ps(lane, splat(static_cast<float>(low)), _CMP_GE_OQ),
                                   _mm256_cmp_ps(lane, splat(static_cast<float>(high)), _CMP_LT_OQ));
  return _mm256_blendv_ps(other, a, inside);
}
SLIPSTREAM_INLINE Vec scale_or_zero(Vec a, Vec n, Vec x) {
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
  return _mm256_and_ps(_mm256_castsi256_ps(scaled), _mm256_cmp_ps(x, splat(-126.0f), _CMP_GE_OQ));
}

#else  // 128-bit vectors in the compilers' own terms, with NEON where they have none

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kLanes = 4;
#if defined(__ARM_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

SLIPSTREAM_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
SLIPSTREAM_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
SLIPSTREAM_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
SLIPSTREAM_INLINE Vec abs(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<Ints>(a) & 0x7fffffff); }
// Adding 1.5 * 2^23 leaves no bits for a fraction; right for |a| < 2^22.
SLIPSTREAM_INLINE Vec round(Vec a) { return (a + splat(12582912.0f)) - splat(12582912.0f); }
SLIPSTREAM_INLINE float reduce_add(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
SLIPSTREAM_INLINE float reduce_max(Vec a) {
  const float even = a[0] > a[2] ? a[0] : a[2], odd = a[1] > a[3] ? a[1] : a[3];
  return even > odd ? even : odd;
}

SLIPSTREAM_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
SLIPSTREAM_INLINE Vec load(const int8_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
// The bits of a normal number, moved to where a float has them, are 2^120 too small: its exponent grows by 120. That
// gives a subnormal an implicit one which it does not have, and half its unit.
SLIPSTREAM_INLINE Vec load(const Float8* p) {
  const Ints bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits}, size = bits & 0x7f;
  const Vec normal = reinterpret_cast<Vec>((size << 20) + (120 << 23));
  const Vec value = size < 8 ? (normal - splat(0x1p-7f)) * splat(2.0f) : normal;
  const Ints nan = (size == 0x7f) & 0x7fc00000;
  return reinterpret_cast<Vec>(reinterpret_cast<Ints>(value) | nan | ((bits & 0x80) << 24));
}
SLIPSTREAM_INLINE void store(float* p, Vec a) { std::memcpy(p, &a, sizeof(a)); }
SLIPSTREAM_INLINE void store(int8_t* p, Vec a) {
  const Vec whole = round(a);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(whole[i]);
}

#if defined(__ARM_NEON)
SLIPSTREAM_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
SLIPSTREAM_INLINE Vec load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
SLIPSTREAM_INLINE void store(Half* p, Vec a) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
#else
SLIPSTREAM_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// The exponent and fraction of a half, moved to where a float has them, are 2^112 too small; that holds for
// subnormals too. Infinities and NaNs get the float's largest exponent.
SLIPSTREAM_INLINE Vec load(const Half* p) {
  const Ints bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const Vec size = reinterpret_cast<Vec>((bits & 0x7fff) << 13) * splat(0x1p112f);
  const Ints special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return reinterpret_cast<Vec>(reinterpret_cast<Ints>(size) | special | ((bits & 0x8000) << 16));
}
// Rounds to nearest, ties to even.
SLIPSTREAM_INLINE uint16_t half_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (size >= 0x38800000)
    return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
  // Below the smallest normal half: a float of 0.5 has units of 2^-24 in its last place, as a half has there.
  float magnitude;
  std::memcpy(&magnitude, &size, sizeof(magnitude));
  magnitude += 0.5f;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  return static_cast<uint16_t>(sign | (bits - 0x3f000000));
}
SLIPSTREAM_INLINE void store(Half* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i].bits = half_bits(a[i]);
}
#endif

SLIPSTREAM_INLINE Vec keep(Vec a, int64_t low, int64_t high, Vec other) {
  const Vec lane = {0, 1, 2, 3};
  const Ints inside = (lane >= splat(static_cast<float>(low))) & (lane < splat(static_cast<float>(high)));
  return inside ? a : other;
}
SLIPSTREAM_INLINE Vec scale_or_zero(Vec a, Vec n, Vec x) {
  const Vec safe = x >= splat(-126.0f) ? n : splat(0.0f);
  const Ints power = __builtin_convertvector(safe, Ints);
  const Ints scaled = reinterpret_cast<Ints>(a) + (power << 23);
  return reinterpret_cast<Vec>(scaled & (x >= splat(-126.0f)));
}

#endif

// Rounds to nearest, ties to even, and to 448 what is larger.
SLIPSTREAM_INLINE uint8_t e4m3_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 24) & 0x80, size = bits & 0x7fffffff;
  // Below the smallest normal number: a float of 2^14 has units of 2^-9 in its last place, as Float8 has there.
  float magnitude;
  std::memcpy(&magnitude, &size, sizeof(magnitude));
  magnitude += 16384.0f;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  const uint32_t small = bits - 0x46800000, normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
  const uint32_t finite = size < 0x3c800000 ? small : size < 0x43e00000 ? normal : 0x7e;
  return static_cast<uint8_t>(sign | (size > 0x7f800000 ? 0x7f : finite));
}
SLIPSTREAM_INLINE void store_e4m3(Float8* p, Vec a, int n) {
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i].bits = e4m3_bits(lanes[i]);
}
#if defined(__AVX512F__)
SLIPSTREAM_INLINE void store_first(Float8* p, Vec a, int n) { store_e4m3(p, a, n); }
#else
SLIPSTREAM_INLINE void store(Float8* p, Vec a) { store_e4m3(p, a, kLanes); }
#endif

#if !defined(__AVX512F__)
// Kernels ask for whole vectors where 8 divides a length, so these never see fewer lanes.
template <class T>
SLIPSTREAM_INLINE Vec load_first(const T* p, int) {
  return load(p);
}
template <class T>
SLIPSTREAM_INLINE void store_first(T* p, Vec a, int) {
  store(p, a);
}
// The same factor for all lanes of b.
SLIPSTREAM_INLINE Vec fma_splat(const float* a, Vec b, Vec c) { return fma(splat(*a), b, c); }
#endif

// 2^x for x <= 127 with a relative error below 3e-7; exactly 0 for x < -126, -infinity and NaN. The polynomial is a
// minimax fit of 2^f on [-1/2, 1/2] that is exact at 0.
SLIPSTREAM_INLINE Vec exp2(Vec x) {
  const Vec n = round(x), f = x - n;
  Vec p = fma(splat(1.32647203e-3f), f, splat(9.67151299e-3f));
  p = fma(p, f, splat(5.55073358e-2f));
  p = fma(p, f, splat(2.40222424e-1f));
  p = fma(p, f, splat(6.93147004e-1f));
  return scale_or_zero(fma(p, f, splat(1.0f)), n, x);
}

// Absolute error below 3e-7.
SLIPSTREAM_INLINE Vec tanh(Vec x) {
  const Vec bounded = max(min(x, splat(12.0f)), splat(-12.0f));
  return splat(1.0f) - splat(2.0f) / (exp2(bounded * splat(2.88539008f)) + splat(1.0f));
}

}  // namespace simd
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
