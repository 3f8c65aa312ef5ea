// The sums of attention over the keys so far, which a running maximum scales (Milakov and Gimelshein, 2018; Dao et al.,
// 2022). Scores are in units of log2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "arena.h"
#include "cpu/simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

using simd::kLanes;
using simd::Floats;

constexpr float kNoScore = -std::numeric_limits<float>::infinity();

// Those of some rows, in units of 2^max.
struct Sums {
  float* out;  // [rows, width], probabilities times values
  float* max;  // [rows]
  float* sum;  // [rows], of the probabilities
  int64_t width;  // head_dim in whole vectors

  static int64_t room(int64_t rows, int64_t width) {
    return Arena::room<float>(rows * width) + 2 * Arena::room<float>(rows);
  }

  static Sums take(Arena& arena, int64_t rows, int64_t width) {
    float* const out = arena.take<float>(rows * width);
    float* const max = arena.take<float>(rows);
    return {out, max, arena.take<float>(rows), width};
  }

  Sums from(int64_t row) const { return {out + row * width, max + row, sum + row, width}; }

  void clear(int64_t rows) const {
    std::fill_n(out, rows * width, 0.0f);
    std::fill_n(max, rows, kNoScore);
    std::fill_n(sum, rows, 0.0f);
  }

  // Adds the probabilities of further keys, relative to the maximum with them, and brings what was added before to it.
  void add(int64_t row, float now, float probabilities) const {
    const float before = max[row];
    const float factor = before == now || before == kNoScore ? 1.0f : std::exp2(before - now);
    max[row] = now;
    sum[row] = sum[row] * factor + probabilities;
    if (factor == 1.0f) return;
    float* const scaled = out + row * width;
    for (int64_t i = 0; i < width; i += kLanes)
      simd::store(scaled + i, simd::load(scaled + i) * simd::splat(factor));
  }

  // Adds a row's sums over the next part of the keys.
  void join(int64_t row, const Sums& next, int64_t next_row) const {
    const float next_max = next.max[next_row], next_sum = next.sum[next_row];
    if (next_sum == 0.0f) return;  // a window begins behind this part
    const float now = std::max(max[row], next_max);
    const float before = max[row] == now ? 1.0f : std::exp2(max[row] - now);  // one of both is 2^0
    const float factor = next_max == now ? 1.0f : std::exp2(next_max - now);
    sum[row] = std::fma(sum[row], before, next_sum * factor);
    max[row] = now;
    float* const joined = out + row * width;
    const float* const added = next.out + next_row * width;
    for (int64_t i = 0; i < width; i += kLanes)
      simd::store(joined + i, simd::fma(simd::load(joined + i), simd::splat(before),
                                        simd::load(added + i) * simd::splat(factor)));
  }
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
