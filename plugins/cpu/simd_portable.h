// 128-bit vectors in the compilers' own terms, with NEON where they have none. Included by simd.h, which has what all instruction sets share.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace simd {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));  // bits of floats: their sums and shifts may wrap around
constexpr int kLanes = 4;
#if defined(__ARM_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

SLIPSTREAM_INLINE Floats splat(float x) { return Floats{x, x, x, x}; }
SLIPSTREAM_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
SLIPSTREAM_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
SLIPSTREAM_INLINE Floats abs(Floats a) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(a) & 0x7fffffff); }
// Adding 1.5 * 2^23 leaves no bits for a fraction; right for |a| < 2^22.
SLIPSTREAM_INLINE Floats round(Floats a) { return (a + splat(12582912.0f)) - splat(12582912.0f); }
SLIPSTREAM_INLINE float reduce_add(Floats a) { return (a[0] + a[2]) + (a[1] + a[3]); }
SLIPSTREAM_INLINE float reduce_max(Floats a) {
  const float even = a[0] > a[2] ? a[0] : a[2], odd = a[1] > a[3] ? a[1] : a[3];
  return even > odd ? even : odd;
}

// A bit for each lane that is no less.
SLIPSTREAM_INLINE uint32_t lanes_from(Floats a, float least) {
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<uint32_t>(a[i] >= least) << i;
  return lanes;
}
// 2^(a - 127) for a from 1 to 254 on the straight lines between whole numbers, and 0 below.
SLIPSTREAM_INLINE Floats exp2_line(Floats a) {
  const Ints some = a >= splat(1.0f);
  const Floats bounded = reinterpret_cast<Floats>(reinterpret_cast<Ints>(a) & some);
  return reinterpret_cast<Floats>(__builtin_convertvector(bounded * splat(0x1p23f), Ints));
}

SLIPSTREAM_INLINE Floats load(const float* p) {
  Floats a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
SLIPSTREAM_INLINE Floats load(const int8_t* p) {
  return Floats{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
// The bits of a normal number, moved to where a float has them, are 2^120 too small: its exponent grows by 120. That
// gives a subnormal an implicit one which it does not have, and half its unit.
SLIPSTREAM_INLINE Floats load(const Float8* p) {
  const Ints bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits}, size = bits & 0x7f;
  const Floats normal = reinterpret_cast<Floats>((size << 20) + (120 << 23));
  const Floats value = size < 8 ? (normal - splat(0x1p-7f)) * splat(2.0f) : normal;
  const Ints nan = (size == 0x7f) & 0x7fc00000;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(value) | nan | ((bits & 0x80) << 24));
}
// Of kLanes pairs, the first of each and the second. A pair is read as a word of little-endian bytes.
SLIPSTREAM_INLINE Words load_pairs(const BFloat16* p) {
  Words pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return pairs;
}
SLIPSTREAM_INLINE Floats load_firsts(const BFloat16* p) { return reinterpret_cast<Floats>(load_pairs(p) << 16); }
SLIPSTREAM_INLINE Floats load_seconds(const BFloat16* p) {
  return reinterpret_cast<Floats>(load_pairs(p) & 0xffff0000u);
}
SLIPSTREAM_INLINE void store(float* p, Floats a) { std::memcpy(p, &a, sizeof(a)); }
SLIPSTREAM_INLINE void store(int8_t* p, Floats a) {
  const Floats whole = round(a);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(whole[i]);
}

#if defined(__ARM_NEON)
SLIPSTREAM_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
SLIPSTREAM_INLINE Floats load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
SLIPSTREAM_INLINE void store(Half* p, Floats a) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
#else
SLIPSTREAM_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
// The exponent and fraction of a half, moved to where a float has them, are 2^112 too small; that holds for
// subnormals too. Infinities and NaNs get the float's largest exponent.
SLIPSTREAM_INLINE Floats load(const Half* p) {
  const Ints bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const Floats size = reinterpret_cast<Floats>((bits & 0x7fff) << 13) * splat(0x1p112f);
  const Ints special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(size) | special | ((bits & 0x8000) << 16));
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
SLIPSTREAM_INLINE void store(Half* p, Floats a) {
  for (int i = 0; i < kLanes; ++i) p[i].bits = half_bits(a[i]);
}
#endif

SLIPSTREAM_INLINE Floats keep(Floats a, int64_t low, int64_t high, Floats other) {
  const Floats lane = {0, 1, 2, 3};
  const Ints inside = (lane >= splat(static_cast<float>(low))) & (lane < splat(static_cast<float>(high)));
  return inside ? a : other;
}
SLIPSTREAM_INLINE Floats scale_or_zero(Floats a, Floats n, Floats x) {
  const Floats safe = x >= splat(-126.0f) ? n : splat(0.0f);
  const Words power = reinterpret_cast<Words>(__builtin_convertvector(safe, Ints));
  const Words scaled = reinterpret_cast<Words>(a) + (power << 23);
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(scaled) & (x >= splat(-126.0f)));
}

SLIPSTREAM_INLINE Ints splat(int32_t x) { return Ints{x, x, x, x}; }
SLIPSTREAM_INLINE Floats to_floats(Ints a) { return __builtin_convertvector(a, Floats); }
SLIPSTREAM_INLINE Ints load_bytes(const uint8_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }
SLIPSTREAM_INLINE Ints multiply_small(Ints a, Ints b) { return a * b; }
// kLanes pairs, and a pair in every lane.
SLIPSTREAM_INLINE Ints load(const Pair16* p) {
  Ints a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
SLIPSTREAM_INLINE Ints load(const Pair8* p) {
  Pair16 pairs[kLanes];
  for (int i = 0; i < kLanes; ++i) pairs[i] = {p[i].first, p[i].second};
  return load(pairs);
}
SLIPSTREAM_INLINE void store(Pair16* p, Ints a) { std::memcpy(p, &a, sizeof(a)); }
SLIPSTREAM_INLINE Ints splat(Pair16 a) {
  int32_t both;
  std::memcpy(&both, &a, sizeof(both));
  return splat(both);
}
// c and the products of the pairs' first integers and of their second; what does not fit wraps around, as elsewhere.
SLIPSTREAM_INLINE Ints fma(Ints a, Ints b, Ints c) {
#if defined(__SSE2__)
  const auto products = reinterpret_cast<Words>(
      _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const Words second = reinterpret_cast<Words>((a >> 16) * (b >> 16));
  a = reinterpret_cast<Ints>(reinterpret_cast<Words>(a) << 16) >> 16;
  b = reinterpret_cast<Ints>(reinterpret_cast<Words>(b) << 16) >> 16;
  const Words products = reinterpret_cast<Words>(a * b) + second;
#endif
  return reinterpret_cast<Ints>(reinterpret_cast<Words>(c) + products);
}
SLIPSTREAM_INLINE void store(int16_t* p, Floats a) {
  const Floats whole = round(a);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int16_t>(whole[i]);
}
// 16 numbers.
SLIPSTREAM_INLINE void store_codes(int16_t* p, const Floats (&a)[16 / kLanes]) {
  for (int v = 0; v < 16 / kLanes; ++v) store(p + v * kLanes, a[v]);
}
// 2^a of whole numbers in -126..127.
SLIPSTREAM_INLINE Floats exp2_whole(Floats a) {
  return reinterpret_cast<Floats>((reinterpret_cast<Words>(__builtin_convertvector(a, Ints)) + 127) << 23);
}

}  // namespace simd
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
