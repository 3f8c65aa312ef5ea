// What Linear and Embedding check of a call beyond their specs.
#include "operators.h"
#include "weight.h"

namespace slipstream {

template <class Args>
static const char* check_weight(const Args& args, bool gated) {
  const bool halves = args.group_size == 16 && args.bits == 8 && args.zero_kind == 0 && args.in_features % 32 == 0;
  const bool blocks = args.group_size >= 32 && args.group_size % 32 == 0;
  const bool known = args.weight_type == 0 && args.group_rows == 1 && (halves || blocks) &&
                     args.in_features % args.group_size == 0 && (args.bits == 4 || args.bits == 8) &&
                     (args.scale_bytes == 2 || args.scale_bytes == 4);
  if (!known) return "the attributes describe no packed format";
  if (args.weight_size != packed_bytes(packed_weight(args, gated)))
    return "the packed weight has the wrong size for its attributes";
  return nullptr;
}

const char* check(const LinearArgs& args) {
  return check_weight(args, args.gated == 1);
}

const char* check(const EmbeddingArgs& args) {
  if (const char* problem = check_weight(args, false)) return problem;
  for (int64_t i = 0; i < args.tokens; ++i)
    if (args.token_ids[i] < 0 || args.token_ids[i] >= args.out_features) return "a token id is outside the vocabulary";
  return nullptr;
}

}  // namespace slipstream
