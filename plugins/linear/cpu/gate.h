// What a gate lets through, for one row of a tile.
#pragma once

#include "codes.h"
#include "weight.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

// e^v to about one unit in the last place (Cephes' expf: a polynomial on half of [-ln 2, ln 2]).
inline Floats exponential(Floats v) {
  v = clamp(v, -87.0f, 88.0f);
  const Floats n = round(v * splat(1.44269504088896341f));
  Floats r = fma(n, splat(-0.693359375f), v);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(r * r, p, r + splat(1.0f));
  return p * exp2_whole(n);
}

// g * sigmoid(factor * g): SiLU where the factor is 1.
inline Floats swish(Floats g, Floats factor) {
  return g / (splat(1.0f) + exponential(g * factor * splat(-1.0f)));
}

// gate becomes the gated activation of up, for one row of a tile.
inline void gate_row(int64_t kind, float* gate, const float* up) {
  for (int i = 0; i < kTile; i += kLanes) {
    const Floats g = load(gate + i), u = load(up + i);
    if (kind == 0) {
      store(gate + i, swish(g, splat(1.0f)) * u);
    } else if (kind == 1) {  // 0.5 * (1 + tanh(z)) is sigmoid(2z)
      store(gate + i, swish(g, splat(1.5957691216f) * fma(splat(0.044715f) * g, g, splat(1.0f))) * u);
    } else {
      store(gate + i, swish(min(g, splat(7.0f)), splat(1.702f)) * (clamp(u, -7.0f, 7.0f) + splat(1.0f)));
    }
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
