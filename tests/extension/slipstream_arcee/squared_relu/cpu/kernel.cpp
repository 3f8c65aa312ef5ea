// max(x, 0)^2, a row at a time.
#include <algorithm>

#include "cpu/parallel.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

void squared_relu(const SquaredReluArgs& args, Parallel& parallel) {
  parallel.for_each(args.tokens, [&](int64_t row) {
    const float* x = args.x + row * args.width;
    float* y = args.y + row * args.width;
    for (int64_t i = 0; i < args.width; ++i) {
      const float positive = std::max(x[i], 0.0f);
      y[i] = positive * positive;
    }
  });
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
