// The running softmax of flash attention (Milakov and Gimelshein, 2018; Dao et al., 2022), in units of log2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

using simd::kLanes;
using simd::Floats;

constexpr float kLeast = 1e-30f;  // what is smaller is 0 in units of itself, so that its inverse is a number
constexpr float kNoScore = -std::numeric_limits<float>::infinity();

// One row's scores against a tile.
struct Scores {
  float* values;
  const float* key_scales;    // of integers: they multiply the scores,
  const float* value_scales;  // and these the probabilities, outside of their sum
  float soft_cap;             // 0, or c for c * tanh(score)
};

// Adds a tile's sum, in units of 2^now, to that of a row; returns the factor that brings earlier ones to this maximum.
inline float add_sum(float now, float sum, float* row_max, float* row_sum) {
  const float before = *row_max;
  const float factor = before == now || before == kNoScore ? 1.0f : std::exp2(before - now);
  *row_max = now;
  *row_sum = *row_sum * factor + sum;
  return factor;
}

// Turns scores [begin, end) of a row into probabilities relative to the running maximum, of which only [low, high)
// are not zero, and returns the factor that brings earlier ones to the new maximum.
inline float softmax_row(const Scores& row, int64_t begin, int64_t end, int64_t low, int64_t high, float* row_max,
                         float* row_sum) {
  float* scores = row.values;
  Floats largest = simd::splat(kNoScore);
  for (int64_t i = begin; i < end; i += kLanes) {
    Floats score = simd::load(scores + i);
    if (row.soft_cap > 0.0f) score = simd::tanh(score) * simd::splat(row.soft_cap);
    if (i < low || i + kLanes > high) score = simd::keep(score, low - i, high - i, simd::splat(kNoScore));
    largest = simd::max(largest, score);
    simd::store(scores + i, score);
  }
  const float before = *row_max, now = std::max(before, simd::reduce_max(largest));
  const Floats shift = simd::splat(now == kNoScore ? 0.0f : now);
  Floats total = simd::splat(0.0f);
  for (int64_t i = begin; i < end; i += kLanes) {
    Floats probability = simd::exp2(simd::load(scores + i) - shift);
    total = total + probability;
    simd::store(scores + i, probability);
  }
  return add_sum(now, simd::reduce_add(total), row_max, row_sum);
}

// Keys that are taken together, so that their chains of operations overlap.
constexpr int kTogether = 16;

// Codes of probabilities are at most this, so that a tile's sum of them times values of 8 bits fits 32.
inline float most_of_probability(int64_t tile) {
  return static_cast<float>(std::min<int64_t>(INT16_MAX, INT32_MAX / INT8_MAX / tile));
}

// The scales of the values of those keys of a tile that a row sees.
struct SeenValues {
  float* scales = nullptr;  // zero where no key is seen
  int64_t low = -1, high = -1;
  float nothing = 0.0f;  // NaN if a scale that is seen is none

  void see(const float* key_scales, const float* value_scales, int64_t tile, int64_t from, int64_t to) {
    if (low == from && high == to) return;
    low = from;
    high = to;
    Floats spoilt = simd::splat(0.0f);
    for (int64_t i = 0; i < tile; i += kLanes) {
      const Floats scale = simd::keep(simd::load(value_scales + i), low - i, high - i, simd::splat(0.0f));
      const Floats of_key = simd::keep(simd::load(key_scales + i), low - i, high - i, simd::splat(0.0f));
      spoilt = simd::fma(scale + of_key, simd::splat(0.0f), spoilt);
      simd::store(scales + i, scale);
    }
    nothing = simd::reduce_add(spoilt);
  }
};

// Scores [begin, end) of a row, in units of their keys' scales before, and the largest of them.
inline float scale_scores(const Scores& row, int64_t begin, int64_t end, int64_t low, int64_t high) {
  constexpr int n = kTogether / kLanes;
  float* scores = row.values;
  Floats largest[n];
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) largest[v] = simd::splat(kNoScore);
  for (int64_t i = begin; i < end; i += kTogether) {
    Floats score[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v)
      score[v] = simd::load(scores + i + v * kLanes) * simd::load(row.key_scales + i + v * kLanes);
    if (row.soft_cap > 0.0f)
      for (int v = 0; v < n; ++v) score[v] = simd::tanh(score[v]) * simd::splat(row.soft_cap);
    if (i < low || i + kTogether > high)
      for (int v = 0; v < n; ++v)
        score[v] = simd::keep(score[v], low - i - v * kLanes, high - i - v * kLanes, simd::splat(kNoScore));
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

// Turns scores into codes, at most `most`, of probabilities relative to their largest `max`, times the scales of the
// values, in place. The largest product has the largest code, and others are those of no other keys: so small ones,
// beside a key that most look at and that says little, have as many digits as they can, and all are the same in every
// chunk.
inline Encoded encode_scores(float* scores, int64_t begin, int64_t end, const float* scales, float max, float most) {
  constexpr int n = kTogether / kLanes;
  const Floats shift = simd::splat(max == kNoScore ? 0.0f : max);
  Floats total[n], largest[n];
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) total[v] = largest[v] = simd::splat(0.0f);
  for (int64_t i = begin; i < end; i += kTogether) {
    Floats p[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) p[v] = simd::load(scores + i + v * kLanes) - shift;
    simd::exp2_short<n>(p);
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      total[v] = total[v] + p[v];
      p[v] = p[v] * simd::load(scales + i + v * kLanes);
      largest[v] = simd::max(largest[v], p[v]);
      simd::store(scores + i + v * kLanes, p[v]);
    }
  }
  for (int v = 1; v < n; ++v) {
    total[0] = total[0] + total[v];
    largest[0] = simd::max(largest[0], largest[v]);
  }
  const float top = simd::reduce_max(largest[0]);
  const Floats inverse = simd::splat(top > kLeast ? most / top : 0.0f);
  int16_t* codes = reinterpret_cast<int16_t*>(scores + begin);
  for (int64_t i = begin; i < end; i += kTogether, codes += kTogether) {
    Floats p[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) p[v] = simd::load(scores + i + v * kLanes) * inverse;
    simd::store_codes(codes, p);
  }
  return {simd::reduce_add(total[0]), top / most};
}

// The running softmax of a row: its sums are in units of 2^max.
struct Sums {
  float* out;  // whole vectors
  float max;
  float sum;
};

// Adds the sums over the next part of the keys.
inline void join(Sums& row, const float* out, float max, float sum, int64_t width) {
  if (sum == 0.0f) return;  // a window begins behind this part
  const float now = std::max(row.max, max);
  const float before = row.max == now ? 1.0f : std::exp2(row.max - now);  // one of both is 2^0
  const float factor = max == now ? 1.0f : std::exp2(max - now);
  row.sum = std::fma(row.sum, before, sum * factor);
  row.max = now;
  for (int64_t i = 0; i < width; i += kLanes)
    simd::store(row.out + i,
                simd::fma(simd::load(row.out + i), simd::splat(before), simd::load(out + i) * simd::splat(factor)));
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
