// What TopToken checks of a call beyond its spec.
#include <limits>

#include "operators.h"

namespace slipstream {

const char* check(const TopTokenArgs& args) {
  return args.vocab < 1 || args.vocab > std::numeric_limits<int32_t>::max()
             ? "a row has from one logit to as many as an int32 counts"
             : nullptr;
}

}  // namespace slipstream
