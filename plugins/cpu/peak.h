// The largest of a row of logits, by blocks of 64.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

constexpr int64_t kBlock = 64;

// 64 of n numbers; in place of those beyond the end there is `rest`.
inline const float* block_of(const float* x, int64_t n, int64_t index, float* padded, float rest = -INFINITY) {
  if ((index + 1) * kBlock <= n) return x + index * kBlock;
  const int64_t left = n - index * kBlock;
  std::fill_n(std::copy_n(x + index * kBlock, left, padded), kBlock - left, rest);
  return padded;
}

// Calls tell(block, its largest) of all blocks in order. Returns the largest of n numbers, or NaN if there is one; then
// what was told means nothing.
template <class Tell>
SLIPSTREAM_INLINE float find_peak(const float* x, int64_t n, Tell&& tell) {
  using namespace simd;
  float peak = -INFINITY;
  // Several sums, none of which waits for another.
  constexpr int64_t kSums = 4;
  Floats all[kSums];
  for (Floats& sum : all) sum = splat(0.0f);
  for (int64_t b = 0; b * kBlock < n; ++b) {
    float padded[kBlock];
    const float* block = block_of(x, n, b, padded, x[b * kBlock]);  // no infinity that is not one of them
    Floats top = load(block);
    for (int64_t i = 0; i < kBlock; i += kSums * kLanes) {
      for (int64_t s = 0; s < kSums; ++s) {
        const Floats values = load(block + i + s * kLanes);
        top = max(values, top);
        all[s] = fma(values, splat(0x1p-64f), all[s]);  // no sum of finite numbers overflows
      }
    }
    const float largest = reduce_max(top);
    tell(b, largest);
    peak = std::max(peak, largest);
  }
  if (!std::isfinite(reduce_add((all[0] + all[1]) + (all[2] + all[3]))))
    for (int64_t i = 0; i < n; ++i)
      if (std::isnan(x[i])) return x[i];
  return peak;
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
