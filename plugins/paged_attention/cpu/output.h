// What all tasks of a call share, and how the sums of a query head over the parts of its keys become its output.
#pragma once

#include <cstdint>

#include "operators.h"
#include "plan.h"
#include "sums.h"
#include "write.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

constexpr float kLog2E = 1.44269504f;

struct Call {
  const PagedAttentionArgs& args;
  int64_t group;     // query heads of a kv head
  float soft_cap;    // in units of log2
  void* queries;     // [num_kv_heads, tokens, group, head_dim], floats or integers
  float* units;      // of integers, [num_kv_heads, tokens, group]
  Sums partial;      // of parts of keys, see Plan
};

// The sink of a query head, where there are sinks, into cleared sums.
inline void add_sink(const PagedAttentionArgs& args, int64_t query_head, const Sums& sums, int64_t row) {
  if (args.sinks == nullptr) return;
  sums.max[row] = args.sinks[query_head] * kLog2E;
  sums.sum[row] = 1.0f;
}

inline void store_output(const PagedAttentionArgs& args, const Sums& sums, int64_t row, int64_t token,
                         int64_t query_head) {
  float* __restrict out = args.output + (token * args.num_heads + query_head) * args.head_dim;
  const float* const sum = sums.out + row * sums.width;
  const float inverse = args.v_scale / sums.sum[row];
  for (int64_t i = 0; i < args.head_dim; ++i) out[i] = sum[i] * inverse;
}

// Joins the partial results of one row of a kv head.
inline void reduce_row(const Call& call, const Reduction& reduction, int64_t head, int64_t row) {
  const int64_t step = reduction.count * call.args.num_heads, query_head = head * call.group + row % call.group;
  const int64_t first = reduction.partial + head * reduction.count * call.group + row;
  alignas(64) float out[kMaxHeadDim];
  float max, sum;
  const Sums sums{out, &max, &sum, call.partial.width};
  sums.clear(1);
  add_sink(call.args, query_head, sums, 0);
  for (int64_t part = 0; part < reduction.parts; ++part) sums.join(0, call.partial, first + part * step);
  store_output(call.args, sums, 0, reduction.token + row / call.group, query_head);
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
