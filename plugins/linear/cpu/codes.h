// A block of 32 elements along K: weight codes and their products, and the rounding of activations.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/simd.h"
#include "weight.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

using namespace simd;

struct Range {
  float low, high;
};

#if defined(__AVX2__)
// The sum of 32 unsigned bytes.
inline int32_t sum_bytes(__m256i bytes) {
  const __m256i quarters = _mm256_sad_epu8(bytes, _mm256_setzero_si256());
  const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256(quarters, 1));
  return _mm_cvtsi128_si32(halves) + _mm_extract_epi32(halves, 2);
}

#endif

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream

#if defined(__AVX512VNNI__)
#include "codes_avx512.h"
#elif defined(__AVX2__)
#include "codes_avx2.h"
#else
#include "codes_portable.h"
#endif
