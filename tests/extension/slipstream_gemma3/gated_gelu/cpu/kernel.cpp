// gelu(gate) * up, a row at a time.
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace {

using namespace simd;

SLIPSTREAM_INLINE Floats gelu(Floats x) {
  const Floats inner = splat(0.7978845608f) * x * fma(splat(0.044715f) * x, x, splat(1.0f));
  return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
}

}  // namespace

void gated_gelu(const GatedGELUArgs& args, Parallel& parallel) {
  const int64_t half = args.width / 2;
  parallel.for_each(args.tokens, [&](int64_t row) {
    const float *gate = args.gate_up + row * args.width, *up = gate + half;
    float* y = args.y + row * half;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) store(y + i, gelu(load(gate + i)) * load(up + i));
    if (i == half) return;
    float gates[kLanes] = {}, ups[kLanes] = {};
    std::memcpy(gates, gate + i, (half - i) * sizeof(float));
    std::memcpy(ups, up + i, (half - i) * sizeof(float));
    store(gates, gelu(load(gates)) * load(ups));
    std::memcpy(y + i, gates, (half - i) * sizeof(float));
  });
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
