// Whether attributes describe a weight that the kernels read.
#pragma once

#include "weight.h"

namespace slipstream {

// Null, or what is wrong.
template <class Args>
const char* check_format(const Args& args) {
  if (is_dense(args.weight_type)) return nullptr;
  const bool halves = args.group_size == 16 && args.bits == 8 && args.zero_kind == 0 && args.in_features % 32 == 0;
  const bool blocks = args.group_size >= 32 && args.group_size % 32 == 0;
  const bool integers = args.weight_type == 0 && (halves || blocks);
  const bool float4 = args.weight_type == kFloat4Type && args.bits == 4 && args.zero_kind == 0 && blocks;
  const bool known = (integers || float4) && args.group_rows == 1 && args.in_features % args.group_size == 0 &&
                     (args.bits == 4 || args.bits == 8) && (args.scale_bytes == 2 || args.scale_bytes == 4);
  return known ? nullptr : "the attributes describe no packed format";
}

}  // namespace slipstream
