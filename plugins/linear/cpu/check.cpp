// What Linear and Embedding check of a call beyond their specs.
#include "check.h"
#include "operators.h"

namespace slipstream {

template <class Args>
static const char* check_weight(const Args& args, bool gated) {
  if (const char* problem = check_format(args)) return problem;
  if (args.weight_size != blob_bytes(args, gated))
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
