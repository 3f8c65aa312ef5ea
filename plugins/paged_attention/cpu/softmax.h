// A row's scores of a tile become probabilities.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "sums.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

// Keys of a tile.
struct KeyRange {
  int64_t begin, end;

  bool has(int64_t first, int64_t count) const { return first >= begin && first + count <= end; }
};

// Sets lanes of keys that are not seen.
SLIPSTREAM_INLINE Floats keep_seen(Floats a, int64_t key, const KeyRange& seen, float other) {
  return simd::keep(a, seen.begin - key, seen.end - key, simd::splat(other));
}

// c * tanh(score) where there is such a c.
SLIPSTREAM_INLINE Floats cap(Floats score, float soft_cap) {
  return soft_cap > 0.0f ? simd::tanh(score) * simd::splat(soft_cap) : score;
}

// Turns the scores of `keys` into probabilities relative to the running maximum, zero where a key is not seen, and adds
// them to the sums of their row.
inline void softmax_row(float* scores, float soft_cap, const KeyRange& keys, const KeyRange& seen, const Sums& sums,
                        int64_t row) {
  Floats largest = simd::splat(kNoScore);
  for (int64_t i = keys.begin; i < keys.end; i += kLanes) {
    Floats score = cap(simd::load(scores + i), soft_cap);
    if (!seen.has(i, kLanes)) score = keep_seen(score, i, seen, kNoScore);
    largest = simd::max(largest, score);
    simd::store(scores + i, score);
  }
  const float max = std::max(sums.max[row], simd::reduce_max(largest));
  const Floats shift = simd::splat(max == kNoScore ? 0.0f : max);
  Floats total = simd::splat(0.0f);
  for (int64_t i = keys.begin; i < keys.end; i += kLanes) {
    const Floats probability = simd::exp2(simd::load(scores + i) - shift);
    total = total + probability;
    simd::store(scores + i, probability);
  }
  sums.add(row, max, simd::reduce_add(total));
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
