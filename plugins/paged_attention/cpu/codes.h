// Floats as what pages hold: halves, float8 in one unit, integers in units of a scale each head.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

using simd::kLanes;
using simd::Floats;

// What brings numbers up to `largest` to codes up to `most`. One too small for its inverse to be a number is 0.
inline float code_factor(float largest, float most) { return largest > 1e-30f ? most / largest : 0.0f; }

inline void encode(float* out, const float* x, int64_t dim, float*) {
  std::memcpy(out, x, static_cast<size_t>(dim) * sizeof(float));
}

inline void encode(Half* out, const float* x, int64_t dim, float*) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int n = simd::lanes_left(i, dim);
    simd::store_first(out + i, simd::load_first(x + i, n), n);
  }
}

// In units of *scale, saturated.
inline void encode(Float8* out, const float* x, int64_t dim, float* scale) {
  const Floats unit = simd::splat(*scale);
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int n = simd::lanes_left(i, dim);
    simd::store_first(out + i, simd::load_first(x + i, n) / unit, n);
  }
}

// Symmetric: x is about out * scale, out at most `most`. One number that is none spoils the scale, and so what is
// computed with it.
template <class Code>
void encode_integers(Code* out, const float* x, int64_t dim, float most, float* scale) {
  Floats largest = simd::splat(0.0f), nothing = simd::splat(0.0f);
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Floats lanes = simd::load_first(x + i, simd::lanes_left(i, dim));
    largest = simd::max(largest, simd::abs(lanes));
    nothing = simd::fma(lanes, simd::splat(0.0f), nothing);  // or NaN
  }
  const float amax = simd::reduce_max(largest);
  *scale = (amax + simd::reduce_add(nothing)) / most;
  const Floats factor = simd::splat(code_factor(amax, most));
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int n = simd::lanes_left(i, dim);
    simd::store_first(out + i, simd::load_first(x + i, n) * factor, n);
  }
}

inline void encode(int8_t* out, const float* x, int64_t dim, float* scale) {
  encode_integers(out, x, dim, 127.0f, scale);
}

// Queries and keys of 16 bits: sums of their products fit 32.
inline float most_of(int64_t dim) { return std::floor(std::sqrt(2147483647.0f / static_cast<float>(dim)) - 0.01f); }

inline void encode(int16_t* out, const float* x, int64_t dim, float* scale) {
  encode_integers(out, x, dim, most_of(dim), scale);
}

// What an element of a page is made of.
template <class T>
struct Coded {
  using Code = T;
};
template <>
struct Coded<Pair8> {
  using Code = int8_t;
};
template <>
struct Coded<Pair16> {
  using Code = int16_t;
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
