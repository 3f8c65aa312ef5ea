// What DrawTokens checks of a call beyond its spec.
#include <limits>

#include "operators.h"

namespace slipstream {

const char* check(const DrawTokensArgs& args) {
  constexpr float least = std::numeric_limits<float>::min(), most = std::numeric_limits<float>::max();
  if (args.draws > 0 && (args.vocab < 1 || args.vocab > std::numeric_limits<int32_t>::max()))
    return "a row has from one logit to as many as an int32 counts";
  for (int64_t i = 0; i < args.draws; ++i) {
    if (args.row[i] < 0 || args.row[i] >= args.rows) return "a row is outside the logits";
    const float temperature = args.temperature[i];
    if (temperature != 0.0f && !(temperature >= least && temperature <= most))
      return "a temperature is 0, or positive and neither subnormal nor infinite";
    if (!(args.min_p[i] >= 0.0f && args.min_p[i] <= 1.0f)) return "min_p is from 0 to 1";
    if (args.uniform[i] < 0 || args.uniform[i] >= int64_t(1) << 53) return "a uniform number is from 0 to below 2^53";
  }
  return nullptr;
}

}  // namespace slipstream
