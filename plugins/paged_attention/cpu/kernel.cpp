// PagedAttention on a CPU: k and v go into their pages, then flash attention reads pages only.
//
// The query heads that share a kv head are packed with the tokens of a chunk into rows (row = token * group + head),
// so that a page is read once for all of them. Scores are kept in units of log2, so that softmax uses 2^x.
#include <cassert>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "multiply.h"
#include "operators.h"
#include "plan.h"
#include "scratch.h"
#include "softmax.h"
#include "write.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {
namespace {

constexpr float kLog2E = 1.44269504f;
// So many rows widen a page while they read it, which is faster than doing it once for all; 8 tokens of a group of 3.
constexpr int64_t kFewRows = 24;
// Keys between two updates of the running maximum, from the same places for all queries.
constexpr int64_t kTileKeys = 128;
// Multiply-adds (first phase: elements) below which waking another thread costs more than it saves.
constexpr int64_t kParallelWork = 100000;

thread_local Scratch plan_scratch;  // of the calling thread, for one call: tasks
thread_local Scratch call_scratch;  // of the calling thread, for one call: queries, partial results
thread_local Scratch task_scratch;  // of every thread, for one task

// What all tasks of a call share.
struct Call {
  const PagedAttentionArgs& args;
  int64_t group;      // query heads of a kv head
  int64_t out_width;  // head_dim in whole vectors
  float soft_cap;     // in units of log2
  void* queries;      // [num_kv_heads, tokens, group, head_dim]
  float* units;       // [num_kv_heads, tokens, group]
  float* partial_out;
  float* partial_max;
  float* partial_sum;
};

// Pages of one tile, or copies of them as floats, and the scales of their tokens (null if there are none).
template <class K, class V>
struct Tile {
  const K** keys;  // [heads, pages]
  const V** values;
  const K** next_keys;  // to fetch ahead
  float* key_scales;    // [heads, tile]
  float* value_scales;
};

// Queries, running softmax and output of a task: the rows of one kv head after those of another.
struct Rows {
  const void* queries;
  const float* units;
  int64_t query_stride;  // rows from one head to the next
  float* out;
  float* max;
  float* sum;
  float* scores;  // [heads, up to kRows, tile]
  float* factors;  // [heads, tile]
  int64_t heads;
  int64_t count;  // of each head
  int64_t tile;   // keys, in whole pages
};

void scale_row(float* row, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += kLanes) simd::store(row + i, simd::load(row + i) * simd::splat(factor));
}

template <class T>
struct Copies {
  const T* keys;
  const T* values;
};

// All rows of a task against keys [start, end), a tile or less. Values are fetched while keys are multiplied, and the
// next keys while values are.
template <bool in_strips, class K, class V>
void attend_tile(const Call& call, const Chunk& chunk, const Rows& rows, const Tile<K, V>& tile,
                 const Copies<K>& copies, int64_t start, int64_t end) {
  using Query = Left<K>;
  constexpr bool integers = std::is_same_v<Query, Pair16>;
  constexpr int64_t pack = integers ? 2 : 1;
  const PagedAttentionArgs& args = call.args;
  const float most = std::min(32767.0f, std::floor(2147483647.0f / 127.0f / static_cast<float>(rows.tile)));
  constexpr int64_t kMostRows = std::max<int64_t>(kRows, kHeadRows);
  float units[kMostRows];
  Weights weights[kMostRows];
  if constexpr (integers)
    for (int64_t head = 0; head < rows.heads; ++head) weights[head].factors = rows.factors + head * rows.tile;
  const int64_t dim = args.head_dim, page = args.page_size, pages = rows.tile / page;
  const auto low = [&](int64_t row) {
    const int64_t position = chunk.position + row / call.group;
    return args.sliding_window > 0 ? std::max<int64_t>(position + 1 - args.sliding_window - start, 0) : 0;
  };
  const auto high = [&](int64_t row) { return std::min(chunk.position + row / call.group + 1, end) - start; };
  for (int64_t r = 0; r < rows.count; r += kRows) {
    const int64_t n = std::min<int64_t>(kRows, rows.count - r), block = n * rows.tile;
    const int64_t first = low(r) / page * page, last = high(r + n - 1);
    if (first >= last) continue;
    if constexpr (in_strips) {
      const int64_t depth = dim / pack, columns = divide_up(last - first, kStrip) * kStrip;
      multiply(n, static_cast<const Query*>(rows.queries) + r * depth, depth,
               Strips<K>{copies.keys + first * depth, depth, depth}, columns, rows.scores + first, rows.tile,
               integers ? rows.units + r : nullptr, false);
    } else for (int64_t key = first; key < last; key += page)
      for (int64_t head = 0; head < rows.heads; ++head) {
        const int64_t at = head * pages + key / page;
        const int64_t row = head * rows.query_stride + r, depth = dim / pack;
        const Query* queries = static_cast<const Query*>(rows.queries) + row * depth;
        const float* query_units = integers ? rows.units + row : nullptr;
        float* scores = rows.scores + head * block + key;
        multiply(n, queries, depth, Panels<K, V>{tile.keys + at, tile.values + at, depth, depth, page}, page, scores,
                 rows.tile, query_units, false);
      }
    const auto scores_of = [&](int64_t head, int64_t i) {
      const int64_t scales = head * rows.tile;
      return Scores{rows.scores + head * block + i * rows.tile,
                    tile.key_scales == nullptr ? nullptr : tile.key_scales + scales,
                    tile.key_scales == nullptr ? nullptr : tile.value_scales + scales, call.soft_cap};
    };
    const auto rescale = [&](int64_t row, float factor) {
      if (factor != 1.0f) scale_row(rows.out + row * call.out_width, call.out_width, factor);
    };
    if constexpr (integers) {
      const int64_t whole = divide_up(last, kTogether) * kTogether;
      float max[kMostRows];
      for (int64_t head = 0; head < rows.heads; ++head)
        for (int64_t i = 0; i < n; ++i)
          max[head * n + i] = scale_scores(scores_of(head, i), first, whole, low(r + i), high(r + i),
                                           rows.max[head * rows.count + r + i]);
      for (int64_t head = 0; head < rows.heads; ++head)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t row = head * rows.count + r + i;
          const Scores scores = scores_of(head, i);
          const float before = rows.max[row], now = max[head * n + i];
          weights[head].of(scores.value_scales, rows.tile, low(r + i), high(r + i), most);
          units[head * n + i] = weights[head].unit;
          const float sum = encode_scores(scores.values, first, whole, weights[head].factors, now);
          const float factor = before == now || before == kNoScore ? 1.0f : std::exp2(before - now);
          rows.max[row] = now;
          rows.sum[row] = rows.sum[row] * factor + sum;
          rescale(row, factor);
        }
    } else {
      for (int64_t head = 0; head < rows.heads; ++head)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t row = head * rows.count + r + i;
          rescale(row, softmax_row(scores_of(head, i), first, last, low(r + i), high(r + i), rows.max + row,
                                   rows.sum + row));
        }
    }
    for (int64_t head = 0; head < rows.heads; ++head) {
      const int64_t at = head * pages + first / page;
      float* scores = rows.scores + head * block;
      const Query* factors = reinterpret_cast<const Query*>(scores + first);
      const int64_t panel = page / pack, depth = divide_up(last - first, pack);
      float* out = rows.out + (head * rows.count + r) * call.out_width;
      if constexpr (in_strips) {
        multiply(n, factors, rows.tile, Strips<V>{copies.values + first / pack * kStrip, rows.tile / pack, depth}, dim, out, call.out_width,
                 units + head * n, true);
      } else {
        multiply(n, factors, rows.tile, Panels<V, K>{tile.values + at, tile.next_keys + at, panel, depth, dim}, dim,
                 out, call.out_width, units + head * n, true);
      }
    }
  }
}

// Scratch of one task: rows of results, one tile of scores, page pointers, scales, and pages as floats.
template <class F>
struct TaskMemory {
  using K = typename F::Key;
  using V = typename F::Value;
  using Copy = typename F::Query;
  Rows rows;
  Tile<K, V> tile;
  Tile<Copy, Copy> floats;
  Copy* copies;
  Sums* joined;  // over the parts so far
  float* joined_out;

  TaskMemory(const Call& call, const Chunk& chunk) {
    const PagedAttentionArgs& args = call.args;
    constexpr bool scaled = F::integers;
    const int64_t count = chunk.count * call.group, all = chunk.heads * count;
    const int64_t width = std::max<int64_t>(1, kTileKeys / args.page_size) * args.page_size;
    const int64_t score_rows = chunk.heads * std::min<int64_t>(kRows, count);
    const int64_t pages = chunk.heads * width / args.page_size;
    const int64_t copied = Strips<Copy>::elements(args.head_dim / F::kPack, width) +
                           Strips<Copy>::elements(width / F::kPack, args.head_dim);
    task_scratch.reset(2 * Scratch::room<float>(all * call.out_width) + 2 * Scratch::room<float>(all) +
                       Scratch::room<Sums>(all) +
                       Scratch::room<float>(score_rows * width) + 6 * Scratch::room<K*>(pages) +
                       3 * Scratch::room<float>(chunk.heads * width) + Scratch::room<float>(copied));
    const int64_t first_row = (chunk.head * args.tokens + chunk.token) * call.group;
    rows = {static_cast<Copy*>(call.queries) + first_row * args.head_dim / F::kPack,
            F::integers ? call.units + first_row : nullptr,
            args.tokens * call.group,
            task_scratch.take<float>(all * call.out_width),
            task_scratch.take<float>(all),
            task_scratch.take<float>(all),
            task_scratch.take<float>(score_rows * width),
            task_scratch.take<float>(chunk.heads * width),
            chunk.heads,
            count,
            width};
    float* key_scales = scaled ? task_scratch.take<float>(chunk.heads * width) : nullptr;
    float* value_scales = scaled ? task_scratch.take<float>(chunk.heads * width) : nullptr;
    tile = {task_scratch.take<const K*>(pages), task_scratch.take<const V*>(pages), task_scratch.take<const K*>(pages),
            key_scales, value_scales};
    floats = {task_scratch.take<const Copy*>(pages), task_scratch.take<const Copy*>(pages),
              task_scratch.take<const Copy*>(pages), key_scales, value_scales};
    copies = task_scratch.take<Copy>(copied);
    joined = task_scratch.take<Sums>(all);
    joined_out = task_scratch.take<float>(all * call.out_width);
  }
};

// Finds the pages of the tile of keys [start, end) and of the keys after it, and gathers the scales. After the last
// tile of a task come keys that this thread is likely to take next.
template <class F>
void open_tile(const PagedAttentionArgs& args, const Chunk& chunk, int64_t width, int64_t start, int64_t end,
               Tile<typename F::Key, typename F::Value>& tile) {
  const int64_t pages = width / args.page_size, context = args.context_len[chunk.sequence];
  const int32_t* table = args.page_table + chunk.sequence * args.max_pages + start / args.page_size;
  const size_t bytes = static_cast<size_t>(args.page_size) * sizeof(float);
  for (int64_t i = 0; start + i * args.page_size < end; ++i)
    for (int64_t h = 0; h < chunk.heads; ++h) {
      const int64_t head = chunk.head + h, at = h * pages + i, key = h * width + i * args.page_size;
      const bool more = start + (pages + i) * args.page_size < context;
      tile.keys[at] = page_keys<F>(args, table[i], head);
      tile.values[at] = page_values<F>(args, table[i], head);
      tile.next_keys[at] = more ? page_keys<F>(args, table[pages + i], head) : tile.keys[at];
      if (tile.key_scales == nullptr) continue;
      std::memcpy(tile.key_scales + key, page_scales(args, table[i], kKeys, head), bytes);
      std::memcpy(tile.value_scales + key, page_scales(args, table[i], kValues, head), bytes);
    }
}

// The sums over keys [begin, end), a part or what a task has of it.
template <class F>
void attend_keys(const Call& call, const Chunk& chunk, int64_t begin, int64_t end, TaskMemory<F>& memory) {
  const PagedAttentionArgs& args = call.args;
  const Rows& rows = memory.rows;
  const int64_t width = rows.tile, all = rows.heads * rows.count;
  std::fill_n(rows.max, all, kNoScore);
  std::fill_n(rows.sum, all, 0.0f);
  std::fill_n(rows.out, all * call.out_width, 0.0f);
  int64_t stop;
  for (int64_t start = begin / args.page_size * args.page_size; start < end; start = stop) {
    stop = std::min((start / width + 1) * width, end);
    open_tile<F>(args, chunk, width, start, stop, memory.tile);
    if (rows.count <= kFewRows || (!kInStrips && std::is_same_v<typename F::Key, float>)) {
      attend_tile<false>(call, chunk, rows, memory.tile, {}, start, stop);
      continue;
    }
    // So many rows read a page several times: convert it once.
    typename F::Query* copy = memory.copies;
    const int64_t dim = args.head_dim, page = args.page_size;
    using Copy = typename F::Query;
    constexpr int64_t pack = F::kPack;
    Copy* values = copy + Strips<Copy>::elements(dim / pack, width);
    for (int64_t i = 0; start + i * page < stop; ++i) {
      const auto* page_keys = memory.tile.keys[i];
      const auto* page_values = memory.tile.values[i];
      if constexpr (kInStrips) {
        copy_strips(page_keys, dim / pack, page, dim / pack, copy + i * page * dim / pack);
        copy_strips(page_values, page / pack, dim, width / pack, values + i * page / pack * kStrip);
      } else {
        Copy* to = copy + i * page * dim / pack * 2;
        memory.floats.keys[i] = memory.floats.next_keys[i] = to;
        for (int64_t at = 0; at < page * dim / pack; at += kLanes) simd::store(to + at, simd::load(page_keys + at));
        memory.floats.values[i] = to += page * dim / pack;
        for (int64_t at = 0; at < page * dim / pack; at += kLanes) simd::store(to + at, simd::load(page_values + at));
      }
    }
    attend_tile<kInStrips>(call, chunk, rows, memory.floats, Copies<Copy>{copy, values}, start, stop);
  }
}

// The sums of a query head before its first key, in zeroed `out`.
inline Sums before_keys(const PagedAttentionArgs& args, int64_t query_head, float* out) {
  if (args.sinks == nullptr) return {out, kNoScore, 0.0f};
  return {out, args.sinks[query_head] * kLog2E, 1.0f};
}

inline void store_output(const Call& call, const Sums& sums, int64_t token, int64_t query_head) {
  const PagedAttentionArgs& args = call.args;
  float* __restrict out = args.output + (token * args.num_heads + query_head) * args.head_dim;
  const float inverse = args.v_scale / sums.sum;
  for (int64_t i = 0; i < args.head_dim; ++i) out[i] = sums.out[i] * inverse;
}

template <class F>
void attend(const Call& call, const Chunk& chunk) {
  const PagedAttentionArgs& args = call.args;
  TaskMemory<F> memory(call, chunk);
  Rows& rows = memory.rows;
  const int64_t all = rows.heads * rows.count, part = Plan::part_keys(args.page_size);
  if (chunk.partial >= 0) {
    const int64_t at = chunk.partial + chunk.head * rows.count;
    rows.out = call.partial_out + at * call.out_width;
    rows.max = call.partial_max + at;
    rows.sum = call.partial_sum + at;
    return attend_keys(call, chunk, chunk.begin, chunk.end, memory);
  }
  const auto query_head = [&](int64_t row) { return (chunk.head + row / rows.count) * call.group + row % call.group; };
  std::fill_n(memory.joined_out, all * call.out_width, 0.0f);
  for (int64_t r = 0; r < all; ++r)
    memory.joined[r] = before_keys(args, query_head(r), memory.joined_out + r * call.out_width);
  int64_t end;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin = end) {
    end = std::min((begin / part + 1) * part, chunk.end);
    attend_keys(call, chunk, begin, end, memory);
    for (int64_t r = 0; r < all; ++r)
      join(memory.joined[r], rows.out + r * call.out_width, rows.max[r], rows.sum[r], call.out_width);
  }
  for (int64_t r = 0; r < all; ++r)
    store_output(call, memory.joined[r], chunk.token + r % rows.count / call.group, query_head(r));
}

// Joins the partial results of one row.
void reduce_row(const Call& call, const Reduction& reduction, int64_t head, int64_t row) {
  const int64_t step = reduction.count * call.args.num_heads, query_head = head * call.group + row % call.group;
  const int64_t first = reduction.partial + head * reduction.count * call.group + row;
  alignas(64) float out[kMaxHeadDim] = {};
  Sums sums = before_keys(call.args, query_head, out);
  for (int64_t p = 0; p < reduction.parts; ++p) {
    const int64_t at = first + p * step;
    join(sums, call.partial_out + at * call.out_width, call.partial_max[at], call.partial_sum[at], call.out_width);
  }
  store_output(call, sums, reduction.token + row / call.group, query_head);
}

template <class F>
void run(Parallel& parallel, int64_t tasks, int64_t work, F&& task) {
  if (tasks > 1 && work >= kParallelWork && parallel.threads() > 1)
    return parallel.for_each(tasks, std::forward<F>(task));
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

template <class F>
void paged_attention_of(const PagedAttentionArgs& args, Parallel& parallel) {
  const int64_t heads = args.num_kv_heads, dim = args.head_dim, group = args.num_heads / heads;
  const int64_t out_width = (dim + kLanes - 1) / kLanes * kLanes;
  const int64_t max_chunks = Plan::max_chunks(args), query_elements = args.tokens * args.num_heads * dim;
  Plan plan;
  plan_scratch.reset(Scratch::room<Chunk>(max_chunks) + Scratch::room<Reduction>(args.sequences));
  plan.chunks = plan_scratch.take<Chunk>(max_chunks);
  plan.reductions = plan_scratch.take<Reduction>(args.sequences);
  plan.make(args);

  call_scratch.reset(Scratch::room<float>(query_elements) + Scratch::room<float>(args.tokens * args.num_heads) + Scratch::room<float>(plan.partial_rows * out_width) +
                     2 * Scratch::room<float>(plan.partial_rows));
  const bool capped = args.soft_cap > 0.0f;
  const Call call{args,
                  group,
                  out_width,
                  args.soft_cap * kLog2E,
                  call_scratch.take<float>(query_elements),
                  call_scratch.take<float>(args.tokens * args.num_heads),
                  call_scratch.take<float>(plan.partial_rows * out_width),
                  call_scratch.take<float>(plan.partial_rows),
                  call_scratch.take<float>(plan.partial_rows)};

  const float scale = args.scale * args.k_scale, factor = capped ? scale / args.soft_cap : scale * kLog2E;
  const int64_t elements = args.tokens * (args.num_heads + args.kv_parts * heads) * dim;
  run(parallel, divide_up(args.tokens, kWriteTokens) * heads, elements, [&](int64_t i) {
    const int64_t head = i % heads, begin = i / heads * kWriteTokens;
    const int64_t row = (head * args.tokens + begin) * group;
    write_tokens<F>(args, begin, std::min(begin + kWriteTokens, args.tokens), head, factor,
                    static_cast<typename F::Query*>(call.queries) + row * dim / F::kPack, call.units + row);
  });

  const int64_t work = plan.cost * group * dim * 2;
  if (work >= kParallelWork) plan.sort();
  run(parallel, plan.chunk_count, work, [&](int64_t i) { attend<F>(call, plan.chunks[i]); });

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
    case ElementType::float32: return attention::paged_attention_of<attention::Format<float, float>>(args, parallel);
    case ElementType::float16: return attention::paged_attention_of<attention::Format<Half, Half>>(args, parallel);
    case ElementType::int8: return attention::paged_attention_of<attention::Format<Pair8, Pair8>>(args, parallel);
    case ElementType::uint8: return attention::paged_attention_of<attention::Format<Pair16, Pair8>>(args, parallel);
    case ElementType::float8e4m3fn: return attention::paged_attention_of<attention::Format<Float8, Float8>>(args, parallel);
    default: assert(false);
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
