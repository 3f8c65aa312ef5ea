// Vectors of floats and of integers and what kernels do with them, on AVX-512, AVX2, NEON and plain 128-bit vectors.
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
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace slipstream {

// An IEEE half; only loads and stores know what its bits mean.
struct Half {
  uint16_t bits;
};

// A bfloat16: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// Two integers that are multiplied by two others at once, and their products added.
struct Pair16 {
  int16_t first, second;
};
struct Pair8 {
  int8_t first, second;
};

// A float8_e4m3fn: no infinities, NaN with all bits but the sign set, 448 the largest.
struct Float8 {
  uint8_t bits;
};

}  // namespace slipstream

#define SLIPSTREAM_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include "cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_portable.h"
#endif

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace simd {

SLIPSTREAM_INLINE Floats clamp(Floats a, float low, float high) { return min(max(a, splat(low)), splat(high)); }

// Halves at any address.
SLIPSTREAM_INLINE Floats load_halves(const uint8_t* p) { return load(reinterpret_cast<const Half*>(p)); }

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
SLIPSTREAM_INLINE void store_e4m3(Float8* p, Floats a, int n) {
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i].bits = e4m3_bits(lanes[i]);
}
#if defined(__AVX512F__)
SLIPSTREAM_INLINE void store_first(Float8* p, Floats a, int n) { store_e4m3(p, a, n); }
#else
SLIPSTREAM_INLINE void store(Float8* p, Floats a) { store_e4m3(p, a, kLanes); }
#endif

// Of n numbers, those of the vector that begins with the i-th.
inline int lanes_left(int64_t i, int64_t n) { return n - i < kLanes ? static_cast<int>(n - i) : kLanes; }

#if !defined(__AVX512F__)
// Kernels ask for whole vectors where 8 divides a length, so these never see fewer lanes.
template <class T>
SLIPSTREAM_INLINE auto load_first(const T* p, int) {
  return load(p);
}
template <class T>
SLIPSTREAM_INLINE void store_first(T* p, Floats a, int) {
  store(p, a);
}
// The same factor for all lanes of b.
SLIPSTREAM_INLINE Floats fma_splat(const float* a, Floats b, Floats c) { return fma(splat(*a), b, c); }
SLIPSTREAM_INLINE Ints fma_splat(const Pair16* a, Ints b, Ints c) { return fma(splat(*a), b, c); }
#endif

// 2^x for x <= 127 with a relative error below 3e-7; exactly 0 for x < -126, -infinity and NaN. The polynomial is a
// minimax fit of 2^f on [-1/2, 1/2] that is exact at 0.
SLIPSTREAM_INLINE Floats exp2(Floats x) {
  const Floats n = round(x), f = x - n;
  Floats p = fma(splat(1.32647203e-3f), f, splat(9.67151299e-3f));
  p = fma(p, f, splat(5.55073358e-2f));
  p = fma(p, f, splat(2.40222424e-1f));
  p = fma(p, f, splat(6.93147004e-1f));
  return scale_or_zero(fma(p, f, splat(1.0f)), n, x);
}

// The same with a relative error below 3e-6, of several vectors at once.
template <int n>
SLIPSTREAM_INLINE void exp2_short(Floats (&x)[n]) {
  Floats whole[n], p[n];
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) whole[v] = round(x[v]);
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) {
    const Floats f = x[v] - whole[v];
    p[v] = fma(splat(9.58285e-3f), f, splat(5.590643e-2f));
    p[v] = fma(p[v], f, splat(2.4024099e-1f));
    p[v] = fma(p[v], f, splat(6.9312419e-1f));
    p[v] = fma(p[v], f, splat(1.0f));
  }
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) x[v] = scale_or_zero(p[v], whole[v], x[v]);
}

// Absolute error below 3e-7.
SLIPSTREAM_INLINE Floats tanh(Floats x) {
  const Floats bounded = max(min(x, splat(12.0f)), splat(-12.0f));
  return splat(1.0f) - splat(2.0f) / (exp2(bounded * splat(2.88539008f)) + splat(1.0f));
}

}  // namespace simd
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
