// What AllReduce and AllGather check of a call beyond their specs.
#include "collectives/cpu/ranks.h"
#include "operators.h"

namespace slipstream {

const char* check(const AllReduceArgs& args) { return check_ranks(args.ranks); }
const char* check(const AllGatherArgs& args) { return check_ranks(args.ranks); }

}  // namespace slipstream
