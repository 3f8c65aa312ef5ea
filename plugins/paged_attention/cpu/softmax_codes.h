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

// The scales of the values of those keys of a tile that a row sees.
struct SeenValues {
  float* scales = nullptr;  // [tile], zero where a key is not seen
  KeyRange seen = {-1, -1};
  float nothing = 0.0f;  // NaN if a scale that is seen is none

  void see(const Scales& all, int64_t tile, const KeyRange& now) {
    if (seen.begin == now.begin && seen.end == now.end) return;
    seen = now;
    Floats spoilt = simd::splat(0.0f);
    for (int64_t i = 0; i < tile; i += kLanes) {
      const Floats of_value = keep_seen(simd::load(all.values + i), i, seen, 0.0f);
      const Floats of_key = keep_seen(simd::load(all.keys + i), i, seen, 0.0f);
      spoilt = simd::fma(of_value + of_key, simd::splat(0.0f), spoilt);
      simd::store(scales + i, of_value);
    }
    nothing = simd::reduce_add(spoilt);
  }
};

// Brings the scores of `keys` to units of log2; returns the largest of them.
inline float scale_scores(float* scores, const float* key_scales, float soft_cap, const KeyRange& keys,
                          const KeyRange& seen) {
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
  return simd::reduce_max(largest[0]);
}

// A tile's sum of probabilities, and the unit of their codes times the scales of values.
struct Encoded {
  float sum;
  float unit;
};

// Turns scores into codes of probabilities relative to their largest `max`, times the scales of the values, in place.
// The largest product has the largest code, and others are those of no other keys: so small ones, beside a key that
// most look at and that says little, have as many digits as they can, and all are the same in every chunk.
inline Encoded encode_scores(float* scores, const float* value_scales, int64_t tile, const KeyRange& keys, float max) {
  constexpr int n = kTogether / kLanes;
  const Floats shift = simd::splat(max == kNoScore ? 0.0f : max);
  Floats total[n], largest[n];
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) total[v] = largest[v] = simd::splat(0.0f);
  for (int64_t i = keys.begin; i < keys.end; i += kTogether) {
    Floats p[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) p[v] = simd::load(scores + i + v * kLanes) - shift;
    simd::exp2_short<n>(p);
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      total[v] = total[v] + p[v];
      p[v] = p[v] * simd::load(value_scales + i + v * kLanes);
      largest[v] = simd::max(largest[v], p[v]);
      simd::store(scores + i + v * kLanes, p[v]);
    }
  }
  for (int v = 1; v < n; ++v) {
    total[0] = total[0] + total[v];
    largest[0] = simd::max(largest[0], largest[v]);
  }
  // A tile's sum of codes times values of 8 bits fits 32.
  const float most = static_cast<float>(std::min<int64_t>(INT16_MAX, INT32_MAX / INT8_MAX / tile));
  const float top = simd::reduce_max(largest[0]);
  const Floats factor = simd::splat(code_factor(top, most));
  int16_t* codes = reinterpret_cast<int16_t*>(scores + keys.begin);
  for (int64_t i = keys.begin; i < keys.end; i += kTogether, codes += kTogether) {
    Floats p[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) p[v] = simd::load(scores + i + v * kLanes) * factor;
    simd::store_codes(codes, p);
  }
  return {simd::reduce_add(total[0]), top / most};
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
