// What ExpertLinear checks of a call beyond its spec.
#include "linear/cpu/check.h"
#include "operators.h"

namespace slipstream {

static const char* check_weight(const ExpertLinearArgs& args) {
  if (const char* problem = check_format(args)) return problem;
  const int64_t expert = blob_bytes(args, args.gated != 0);
  if (args.weight_size / args.experts != expert || args.weight_size % args.experts != 0)
    return "the weight has the wrong size for its attributes";
  return nullptr;
}

const char* check(const ExpertLinearArgs& args) {
  if (args.gated && args.out_features % 2 != 0) return "a gated weight has as many gate rows as up rows";
  if (args.reduce && args.gated) return "a gate comes before the sum";
  if (args.reduce != (args.expert_weights != nullptr)) return "expert_weights belong to a sum, and a sum needs them";
  if (args.residual && !args.reduce) return "a residual belongs to a sum";
  if (const char* problem = check_weight(args)) return problem;
  for (int64_t i = 0; i < args.tokens * args.top_k; ++i)
    if (args.expert_ids[i] < 0 || args.expert_ids[i] >= args.experts) return "an expert id is outside the experts";
  return nullptr;
}

}  // namespace slipstream
