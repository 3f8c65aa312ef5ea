// The RMS norm and the rotary embedding of one head of one token.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

using simd::kLanes;
using simd::Floats;

// What brings x to a root mean square of 1.
inline float rms_scale(const PagedAttentionArgs& args, const float* x) {
  Floats squares = simd::splat(0.0f);
  for (int64_t i = 0; i < args.head_dim; i += kLanes) {
    const Floats v = simd::load_first(x + i, simd::lanes_left(i, args.head_dim));
    squares = simd::fma(v, v, squares);
  }
  const float mean = simd::reduce_add(squares) / static_cast<float>(args.head_dim);
  return 1.0f / std::sqrt(mean + args.norm_eps);
}

// out = rotated(norm(x)) * factor; `norm` may be null.
inline void rotate(const PagedAttentionArgs& args, int64_t token, const float* x, const float* norm, float factor,
                   float* __restrict out) {
  const int64_t dim = args.head_dim, half = args.rotary_half;
  if (norm != nullptr) {
    const float scale = rms_scale(args, x);
    for (int64_t i = 0; i < dim; ++i) out[i] = x[i] * scale * norm[i];
  } else {
    std::memcpy(out, x, static_cast<size_t>(dim) * sizeof(float));
  }
  const float* __restrict cos = args.cos + token * half;
  const float* __restrict sin = args.sin + token * half;
  float* __restrict second = out + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = out[i], b = second[i];
    out[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
  if (factor != 1.0f)
    for (int64_t i = 0; i < dim; ++i) out[i] *= factor;
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
