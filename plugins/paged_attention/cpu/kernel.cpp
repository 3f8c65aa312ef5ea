// PagedAttention on a CPU: k and v go into their pages, then flash attention reads pages only.
//
// The query heads that share a kv head are packed with the tokens of a chunk into rows (row = token * group + head),
// so that a page is read once for all of them. Scores are kept in units of log2, so that softmax uses 2^x.
#include <algorithm>
#include <cassert>
#include <utility>

#include "arena.h"
#include "cpu/parallel.h"
#include "operators.h"
#include "output.h"
#include "pages.h"
#include "plan.h"
#include "sums.h"
#include "task.h"
#include "write.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {
namespace {

// Multiply-adds (first phase: elements) below which waking another thread costs more than it saves.
constexpr int64_t kParallelWork = 100000;

thread_local Arena plan_arena;  // of the calling thread, for one call: tasks
thread_local Arena call_arena;  // of the calling thread, for one call: queries, partial results
thread_local Arena task_arena;  // of every thread, for one task

template <class F>
void run(Parallel& parallel, int64_t tasks, int64_t work, F&& task) {
  if (tasks > 1 && work >= kParallelWork && parallel.threads() > 1)
    return parallel.for_each(tasks, std::forward<F>(task));
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

template <class F>
void paged_attention_of(const PagedAttentionArgs& args, Parallel& parallel) {
  const int64_t heads = args.num_kv_heads, dim = args.head_dim, group = args.num_heads / heads;
  const int64_t width = divide_up(dim, kLanes) * kLanes, rows = args.tokens * args.num_heads;
  Plan plan(args, plan_arena);
  call_arena.reset(Arena::room<typename F::Query>(rows * dim / F::kPack) + Arena::room<float>(rows) +
                   Sums::room(plan.partial_rows, width));
  auto* const queries = call_arena.take<typename F::Query>(rows * dim / F::kPack);
  float* const units = call_arena.take<float>(rows);
  const Call call{args, group, args.soft_cap * kLog2E, queries, units,
                  Sums::take(call_arena, plan.partial_rows, width)};

  const float scale = args.scale * args.k_scale;
  const float factor = args.soft_cap > 0.0f ? scale / args.soft_cap : scale * kLog2E;
  const int64_t elements = args.tokens * (args.num_heads + args.kv_parts * heads) * dim;
  run(parallel, divide_up(args.tokens, kWriteTokens) * heads, elements, [&](int64_t i) {
    const int64_t head = i % heads, begin = i / heads * kWriteTokens;
    const int64_t row = (head * args.tokens + begin) * group;
    write_tokens<F>(args, begin, std::min(begin + kWriteTokens, args.tokens), head, factor,
                    queries + row * dim / F::kPack, units + row);
  });

  const int64_t work = plan.cost * group * dim * 2;
  if (work >= kParallelWork) plan.sort();
  run(parallel, plan.chunk_count, work, [&](int64_t i) { Task<F>(call, plan.chunks[i], task_arena).attend(); });

  run(parallel, plan.reduction_count * heads, plan.partial_rows * dim, [&](int64_t i) {
    const Reduction& reduction = plan.reductions[i / heads];
    for (int64_t row = 0; row < reduction.count * group; ++row) reduce_row(call, reduction, i % heads, row);
  });
}

}  // namespace
}  // namespace attention

void paged_attention(const PagedAttentionArgs& given, Parallel& parallel) {
  PagedAttentionArgs args = given;
  if (args.kv_cache_type != ElementType::float8e4m3fn) args.k_scale = args.v_scale = 1.0f;  // only codes have a unit
  switch (args.kv_cache_type) {
    case ElementType::float32: return attention::paged_attention_of<attention::Format<float>>(args, parallel);
    case ElementType::float16: return attention::paged_attention_of<attention::Format<Half>>(args, parallel);
    case ElementType::float8e4m3fn: return attention::paged_attention_of<attention::Format<Float8>>(args, parallel);
    case ElementType::int8: return attention::paged_attention_of<attention::Format<Pair8>>(args, parallel);
    case ElementType::uint8: return attention::paged_attention_of<attention::Format<Pair16, Pair8>>(args, parallel);
    default: assert(false);
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
