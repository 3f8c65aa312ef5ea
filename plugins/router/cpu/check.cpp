// What Router checks of a call beyond its spec.
#include "operators.h"

namespace slipstream {

const char* check(const RouterArgs& args) {
  if (args.scoring != 0 && args.scoring != 1) return "scoring is neither softmax nor sigmoid";
  if (args.groups < 1 || args.experts < 1 || args.experts % args.groups != 0)
    return "the experts do not form that many equal groups";
  if (args.groups > 1 && args.experts / args.groups < 2) return "a group has less than two experts";
  if (args.top_groups < 1 || args.top_groups > args.groups) return "top_groups is not within the groups";
  if (args.top_k < 1 || args.top_k > args.experts / args.groups * args.top_groups)
    return "top_k is not within the experts of the chosen groups";
  return nullptr;
}

}  // namespace slipstream
