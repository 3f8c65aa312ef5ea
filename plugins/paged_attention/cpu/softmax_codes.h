// A row's scores of a tile beside pages of integers become codes: probabilities times their values' scales in 16 bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "codes.h"
#include "cpu/simd.h"
#include "softmax.h"
#include "sums.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

// Keys that are taken together, so that their chains of operations overlap.
constexpr int kTogether = 16;

// The scales of the keys and values of a tile.
struct Scales {
  float* keys;
  float* values;
};

// What brings the probabilities of a tile's keys, times the scales of their values, to codes in units of `unit`. It
// depends on the keys that a row sees and on no others, so it is the same in every chunk.
struct CodeFactors {
  float* factors = nullptr;  // [tile], zero where a key is not seen
  KeyRange seen = {-1, -1};
  float unit = 0.0f;

  void see(const Scales& scales, int64_t tile, const KeyRange& now) {
    if (seen.begin == now.begin && seen.end == now.end) return;
    seen = now;
    Floats largest = simd::splat(0.0f), nothing = simd::splat(0.0f);
    for (int64_t i = 0; i < tile; i += kLanes) {
      const Floats of_value = keep_seen(simd::load(scales.values + i), i, seen, 0.0f);
      const Floats of_key = keep_seen(simd::load(scales.keys + i), i, seen, 0.0f);
      largest = simd::max(largest, of_value);
      nothing = simd::fma(of_value + of_key, simd::splat(0.0f), nothing);  // or NaN
      simd::store(factors + i, of_value);
    }
    // A tile's sum of codes times values of 8 bits fits 32.
    const float most = static_cast<float>(std::min<int64_t>(INT16_MAX, INT32_MAX / INT8_MAX / tile));
    const float top = simd::reduce_max(largest);
    unit = (top + simd::reduce_add(nothing)) / most;
    const Floats factor = simd::splat(code_factor(top, most));
    for (int64_t i = 0; i < tile; i += kLanes) simd::store(factors + i, simd::load(factors + i) * factor);
  }
};

// Brings the scores of `keys` to units of log2; returns the running maximum with them.
inline float scale_scores(float* scores, const float* key_scales, float soft_cap, const KeyRange& keys,
                          const KeyRange& seen, float before) {
  constexpr int n = kTogether / kLanes;
  Floats largest[n];
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) largest[v] = simd::splat(kNoScore);
  for (int64_t i = keys.begin; i < keys.end; i += kTogether) {
    Floats score[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v)
      score[v] = cap(simd::load(scores + i + v * kLanes) * simd::load(key_scales + i + v * kLanes), soft_cap);
    if (!seen.has(i, kTogether))
      for (int v = 0; v < n; ++v) score[v] = keep_seen(score[v], i + v * kLanes, seen, kNoScore);
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      largest[v] = simd::max(largest[v], score[v]);
      simd::store(scores + i + v * kLanes, score[v]);
    }
  }
  for (int v = 1; v < n; ++v) largest[0] = simd::max(largest[0], largest[v]);
  return std::max(before, simd::reduce_max(largest[0]));
}

// Turns them into codes of probabilities relative to `max`, in place; returns the sum of the probabilities.
inline float encode_scores(float* scores, const float* factors, const KeyRange& keys, float max) {
  constexpr int n = kTogether / kLanes;
  const Floats shift = simd::splat(max == kNoScore ? 0.0f : max);
  Floats total[n];
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) total[v] = simd::splat(0.0f);
  int16_t* codes = reinterpret_cast<int16_t*>(scores + keys.begin);
  for (int64_t i = keys.begin; i < keys.end; i += kTogether, codes += kTogether) {
    Floats p[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) p[v] = simd::load(scores + i + v * kLanes) - shift;
    simd::exp2_short<n>(p);
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      total[v] = total[v] + p[v];
      p[v] = p[v] * simd::load(factors + i + v * kLanes);
    }
    simd::store_codes(codes, p);
  }
  for (int v = 1; v < n; ++v) total[0] = total[0] + total[v];
  return simd::reduce_add(total[0]);
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
