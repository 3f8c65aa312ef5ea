// The running softmax of flash attention (Milakov and Gimelshein, 2018; Dao et al., 2022), in units of log2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

using simd::kLanes;
using simd::Floats;

constexpr int kExponentials = 4;  // vectors whose exponentials are computed together
constexpr float kNoScore = -std::numeric_limits<float>::infinity();

// One row's scores against a tile.
struct Scores {
  float* values;
  const float* key_scales;    // of int8 pages, or null: they multiply the scores,
  const float* value_scales;  // and these the probabilities, outside of their sum
  float soft_cap;             // 0, or c for c * tanh(score)
};

// The largest of scores [begin, end) of a row, after what is still to be done to them: scales, a cap, and the mask that
// leaves [low, high).
inline float finish_scores(const Scores& row, int64_t begin, int64_t end, int64_t low, int64_t high) {
  float* scores = row.values;
  Floats largest = simd::splat(kNoScore);
  if (row.key_scales == nullptr && row.soft_cap <= 0.0f && low <= begin && high - begin >= (end - begin + kLanes - 1) / kLanes * kLanes) {
    for (int64_t i = begin; i < end; i += kLanes) largest = simd::max(largest, simd::load(scores + i));
    return simd::reduce_max(largest);
  }
  for (int64_t i = begin; i < end; i += kLanes) {
    Floats score = simd::load(scores + i);
    if (row.key_scales != nullptr) score = score * simd::load(row.key_scales + i);
    if (row.soft_cap > 0.0f) score = simd::tanh(score) * simd::splat(row.soft_cap);
    if (i < low || i + kLanes > high) score = simd::keep(score, low - i, high - i, simd::splat(kNoScore));
    largest = simd::max(largest, score);
    simd::store(scores + i, score);
  }
  return simd::reduce_max(largest);
}

// n vectors of scores become 2^(score - shift), which are added to `total` from the first to the last.
template <int n>
SLIPSTREAM_INLINE Floats exponentials(float* scores, const float* value_scales, Floats shift, Floats total) {
  Floats x[n];
#pragma GCC unroll 8
  for (int v = 0; v < n; ++v) x[v] = simd::load(scores + v * kLanes) - shift;
  simd::exp2(x);
#pragma GCC unroll 8
  for (int v = 0; v < n; ++v) {
    total = total + x[v];
    simd::store(scores + v * kLanes, value_scales == nullptr ? x[v] : x[v] * simd::load(value_scales + v * kLanes));
  }
  return total;
}

// Turns scores [begin, end) of a row into probabilities relative to the running maximum, of which only [low, high)
// are not zero, and returns the factor that brings earlier ones to the new maximum.
inline float softmax_row(const Scores& row, int64_t begin, int64_t end, int64_t low, int64_t high, float* row_max,
                         float* row_sum) {
  const float before = *row_max, now = std::max(before, finish_scores(row, begin, end, low, high));
  const Floats shift = simd::splat(now == kNoScore ? 0.0f : now);
  Floats total = simd::splat(0.0f);
  int64_t i = begin;
  const auto take = [&](auto vectors) {
    constexpr int n = decltype(vectors)::value;
    for (; i + (n - 1) * kLanes < end; i += n * kLanes)
      total = exponentials<n>(row.values + i, row.value_scales == nullptr ? nullptr : row.value_scales + i, shift, total);
  };
  take(std::integral_constant<int, kExponentials>{});
  take(std::integral_constant<int, 1>{});
  const float factor = before == now || before == kNoScore ? 1.0f : std::exp2(before - now);
  *row_max = now;
  *row_sum = *row_sum * factor + simd::reduce_add(total);
  return factor;
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
  const float before = row.max == now ? 1.0f : std::exp2(row.max - now);  // 2^0 is 1, without the call
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
