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
  void* queries;      // [num_kv_heads, tokens, group, head_dim], floats or integers
  float* units;       // of integers, [num_kv_heads, tokens, group]
  float* partial_out;
  float* partial_max;
  float* partial_sum;
};

// Queries, running softmax and output of a task: the rows of one kv head after those of another. Queries are floats, or
// pairs of integers in units of their own.
template <class Query>
struct Rows {
  const Query* queries;
  const float* units;
  int64_t depth;   // of a query
  int64_t stride;  // rows from one head to the next
  float* out;
  float* max;
  float* sum;
  float* scores;   // [heads, up to kRows, tile]
  float* scales;   // of values that a row sees, [heads, tile]
  int64_t heads;
  int64_t count;  // of each head
  int64_t tile;   // keys, in whole pages
};

// Some rows of every head, and the keys of a tile that one of them sees, from the first of a page.
struct Block {
  int64_t row, rows;
  int64_t first, last;
};

// The scales of a tile's tokens, null if there are none.
struct Scales {
  float* keys;  // [heads, tile]
  float* values;
};

// Pages of one tile. Values are fetched while keys are multiplied, and the next keys while values are.
template <class K, class V>
struct PageTile {
  using Query = Left<K>;
  const K** keys;  // [heads, pages]
  const V** values;
  const K** next_keys;
  int64_t pages, page_size, head_dim;

  void multiply_keys(const Rows<Query>& rows, const Block& block) const {
    for (int64_t key = block.first; key < block.last; key += page_size)
      for (int64_t head = 0; head < rows.heads; ++head) {
        const int64_t at = head * pages + key / page_size, row = head * rows.stride + block.row, depth = rows.depth;
        const Panels<K, V> panels{keys + at, values + at, depth, depth, page_size, next_keys + at};
        multiply(block.rows, rows.queries + row * depth, depth, panels, page_size,
                 rows.scores + head * block.rows * rows.tile + key, rows.tile, rows.units + row, false);
      }
  }

  void multiply_values(int64_t head, const Block& block, const Query* factors, int64_t tile, const float* units,
                       float* out, int64_t out_width) const {
    const int64_t at = head * pages + block.first / page_size, depth = divide_up(block.last - block.first, kPack<K>);
    const Panels<V, K> panels{values + at, next_keys + at, page_size / kPack<K>, depth, head_dim};
    multiply(block.rows, factors, tile, panels, head_dim, out, out_width, units, true);
  }
};

// One tile of one head copied in strips.
template <class T>
struct StripTile {
  const T* keys;
  const T* values;
  int64_t head_dim;

  void multiply_keys(const Rows<T>& rows, const Block& block) const {
    const int64_t depth = rows.depth, columns = divide_up(block.last - block.first, kStrip) * kStrip;
    multiply(block.rows, rows.queries + block.row * depth, depth, Strips<T>{keys + block.first * depth, depth, depth},
             columns, rows.scores + block.first, rows.tile, rows.units + block.row, false);
  }

  void multiply_values(int64_t, const Block& block, const T* factors, int64_t tile, const float* units, float* out,
                       int64_t out_width) const {
    const int64_t depth = divide_up(block.last - block.first, kPack<T>);
    const Strips<T> strips{values + block.first / kPack<T> * kStrip, tile / kPack<T>, depth};
    multiply(block.rows, factors, tile, strips, head_dim, out, out_width, units, true);
  }
};

void scale_row(float* row, int64_t n, float factor) {
  if (factor == 1.0f) return;
  for (int64_t i = 0; i < n; i += kLanes) simd::store(row + i, simd::load(row + i) * simd::splat(factor));
}

// All rows of a task against keys [start, end), a tile or less.
template <class Tile, class Query>
void attend_tile(const Call& call, const Chunk& chunk, const Rows<Query>& rows, const Tile& tile, const Scales& scales,
                 int64_t start, int64_t end) {
  constexpr bool integers = kPack<Query> == 2;
  constexpr int64_t kMostRows = std::max<int64_t>(kRows, kHeadRows);
  const PagedAttentionArgs& args = call.args;
  const auto low = [&](int64_t row) {
    const int64_t position = chunk.position + row / call.group;
    return args.sliding_window > 0 ? std::max<int64_t>(position + 1 - args.sliding_window - start, 0) : 0;
  };
  const auto high = [&](int64_t row) { return std::min(chunk.position + row / call.group + 1, end) - start; };
  float units[kMostRows] = {};
  SeenValues seen[kMostRows];
  const float most = most_of_probability(rows.tile);
  for (int64_t r = 0; r < rows.count; r += kRows) {
    const int64_t n = std::min<int64_t>(kRows, rows.count - r);
    const Block block{r, n, low(r) / args.page_size * args.page_size, high(r + n - 1)};
    if (block.first >= block.last) continue;
    tile.multiply_keys(rows, block);

    const auto for_rows = [&](auto&& take) {  // take(place in the block, row of the task, its scores, keys it sees)
      for (int64_t head = 0; head < rows.heads; ++head)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = head * n + i, scaled = integers ? head * rows.tile : 0;
          const Scores scores{rows.scores + at * rows.tile, scales.keys + scaled, scales.values + scaled,
                              call.soft_cap};
          take(at, head * rows.count + r + i, scores, low(r + i), high(r + i));
        }
    };
    if constexpr (integers) {
      const int64_t whole = divide_up(block.last, kTogether) * kTogether;
      float max[kMostRows];
      for_rows([&](int64_t at, int64_t, const Scores& scores, int64_t from, int64_t to) {
        max[at] = scale_scores(scores, block.first, whole, from, to);
      });
      for_rows([&](int64_t at, int64_t row, const Scores& scores, int64_t from, int64_t to) {
        const int64_t head = at / n;
        SeenValues& values = seen[head];
        values.scales = rows.scales + head * rows.tile;
        values.see(scores.key_scales, scores.value_scales, rows.tile, from, to);
        const Encoded encoded = encode_scores(scores.values, block.first, whole, values.scales, max[at], most);
        const float now = std::max(rows.max[row], max[at]);
        const float lowered = max[at] == now ? 1.0f : std::exp2(max[at] - now);
        units[at] = encoded.unit * lowered + values.nothing;
        scale_row(rows.out + row * call.out_width, call.out_width,
                  add_sum(now, encoded.sum * lowered, rows.max + row, rows.sum + row));
      });
    } else {
      for_rows([&](int64_t, int64_t row, const Scores& scores, int64_t from, int64_t to) {
        scale_row(rows.out + row * call.out_width, call.out_width,
                  softmax_row(scores, block.first, block.last, from, to, rows.max + row, rows.sum + row));
      });
    }

    for (int64_t head = 0; head < rows.heads; ++head) {
      const auto* factors = reinterpret_cast<const Query*>(rows.scores + head * n * rows.tile + block.first);
      tile.multiply_values(head, block, factors, rows.tile, units + head * n,
                           rows.out + (head * rows.count + r) * call.out_width, call.out_width);
    }
  }
}

// Scratch of one task: rows of results, one tile of scores, page pointers, scales, and copies of pages.
template <class F>
struct TaskMemory {
  using K = typename F::Key;
  using V = typename F::Value;
  using Copy = typename F::Query;
  Rows<Copy> rows;
  PageTile<K, V> tile;
  PageTile<Copy, Copy> wide;  // copies
  Scales scales;
  Copy* copies;
  Sums* joined;  // over the parts so far
  float* joined_out;

  TaskMemory(const Call& call, const Chunk& chunk) {
    const PagedAttentionArgs& args = call.args;
    const int64_t count = chunk.count * call.group, all = chunk.heads * count, dim = args.head_dim;
    const int64_t width = std::max<int64_t>(1, kTileKeys / args.page_size) * args.page_size;
    const int64_t score_rows = chunk.heads * std::min<int64_t>(kRows, count);
    const int64_t scaled = F::kScaled ? chunk.heads * width : 0;
    const int64_t pages = width / args.page_size, all_pages = chunk.heads * pages;
    const int64_t copied = key_elements(dim, width) + Strips<Copy>::elements(width / F::kPack, dim);
    task_scratch.reset(2 * Scratch::room<float>(all * call.out_width) + 2 * Scratch::room<float>(all) +
                       Scratch::room<Sums>(all) + Scratch::room<float>(score_rows * width) +
                       6 * Scratch::room<K*>(all_pages) + 3 * Scratch::room<float>(scaled) +
                       Scratch::room<Copy>(copied));
    const int64_t first_row = (chunk.head * args.tokens + chunk.token) * call.group;
    rows = {static_cast<Copy*>(call.queries) + first_row * dim / F::kPack,
            call.units + first_row,
            dim / F::kPack,
            args.tokens * call.group,
            task_scratch.take<float>(all * call.out_width),
            task_scratch.take<float>(all),
            task_scratch.take<float>(all),
            task_scratch.take<float>(score_rows * width),
            task_scratch.take<float>(scaled),
            chunk.heads,
            count,
            width};
    scales = {task_scratch.take<float>(scaled), task_scratch.take<float>(scaled)};
    if (!F::kScaled) scales = {nullptr, nullptr};
    take_pages(tile, all_pages, pages, args);
    take_pages(wide, all_pages, pages, args);
    copies = task_scratch.take<Copy>(copied);
    joined = task_scratch.take<Sums>(all);
    joined_out = task_scratch.take<float>(all * call.out_width);
  }

  static int64_t key_elements(int64_t dim, int64_t keys) { return Strips<Copy>::elements(dim / F::kPack, keys); }

  template <class A, class B>
  static void take_pages(PageTile<A, B>& tile, int64_t all, int64_t pages, const PagedAttentionArgs& args) {
    tile = {task_scratch.take<const A*>(all), task_scratch.take<const B*>(all), task_scratch.take<const A*>(all),
            pages, args.page_size, args.head_dim};
  }
};

// Finds the pages of the tile of keys [start, end) and of the keys after it, and gathers the scales. After the last
// tile of a task come keys that this thread is likely to take next.
template <class F>
void open_tile(const PagedAttentionArgs& args, const Chunk& chunk, int64_t start, int64_t end, TaskMemory<F>& memory) {
  auto& tile = memory.tile;
  const int64_t pages = tile.pages, context = args.context_len[chunk.sequence];
  const int32_t* table = args.page_table + chunk.sequence * args.max_pages + start / args.page_size;
  const size_t bytes = static_cast<size_t>(args.page_size) * sizeof(float);
  for (int64_t i = 0; start + i * args.page_size < end; ++i)
    for (int64_t h = 0; h < chunk.heads; ++h) {
      const int64_t head = chunk.head + h, at = h * pages + i, key = at * args.page_size;
      const bool more = start + (pages + i) * args.page_size < context;
      tile.keys[at] = page_keys<F>(args, table[i], head);
      tile.values[at] = page_values<F>(args, table[i], head);
      tile.next_keys[at] = more ? page_keys<F>(args, table[pages + i], head) : tile.keys[at];
      if (!F::kScaled) continue;
      std::memcpy(memory.scales.keys + key, page_scales(args, table[i], kKeys, head), bytes);
      std::memcpy(memory.scales.values + key, page_scales(args, table[i], kValues, head), bytes);
    }
}

// The first `count` pages of a tile of one head as rows can multiply them again and again.
template <class F>
StripTile<typename F::Query> copy_in_strips(const PagedAttentionArgs& args, int64_t count, TaskMemory<F>& memory) {
  const int64_t dim = args.head_dim, page = args.page_size, tile = memory.rows.tile, pack = F::kPack;
  typename F::Query* keys = memory.copies;
  typename F::Query* values = keys + memory.key_elements(dim, tile);
  for (int64_t i = 0; i < count; ++i) {
    copy_strips(memory.tile.keys[i], dim / pack, page, dim / pack, keys + i * page * dim / pack);
    copy_strips(memory.tile.values[i], page / pack, dim, tile / pack, values + i * page / pack * kStrip);
  }
  return {keys, values, dim};
}

template <class F>
const PageTile<typename F::Query, typename F::Query>& copy_pages(const PagedAttentionArgs& args, int64_t count,
                                                                 TaskMemory<F>& memory) {
  const int64_t elements = args.page_size * args.head_dim / F::kPack;
  typename F::Query* to = memory.copies;
  const auto copy = [&](const auto* from) {
    for (int64_t at = 0; at < elements; at += kLanes) simd::store(to + at, simd::load(from + at));
    to += elements;
    return to - elements;
  };
  for (int64_t i = 0; i < count; ++i) {
    memory.wide.keys[i] = memory.wide.next_keys[i] = copy(memory.tile.keys[i]);
    memory.wide.values[i] = copy(memory.tile.values[i]);
  }
  return memory.wide;
}

// The sums over keys [begin, end), a part or what a task has of it.
template <class F>
void attend_keys(const Call& call, const Chunk& chunk, int64_t begin, int64_t end, TaskMemory<F>& memory) {
  const PagedAttentionArgs& args = call.args;
  const auto& rows = memory.rows;
  const int64_t width = rows.tile, all = rows.heads * rows.count;
  std::fill_n(rows.max, all, kNoScore);
  std::fill_n(rows.sum, all, 0.0f);
  std::fill_n(rows.out, all * call.out_width, 0.0f);
  int64_t stop;
  for (int64_t start = begin / args.page_size * args.page_size; start < end; start = stop) {
    stop = std::min((start / width + 1) * width, end);
    open_tile(args, chunk, start, stop, memory);
    const int64_t count = divide_up(stop - start, args.page_size);
    // Many rows read a page several times: widen it once.
    if (rows.count <= kFewRows || (!kInStrips && std::is_same_v<typename F::Key, float>)) {
      attend_tile(call, chunk, rows, memory.tile, memory.scales, start, stop);
    } else if constexpr (kInStrips) {
      attend_tile(call, chunk, rows, copy_in_strips(args, count, memory), memory.scales, start, stop);
    } else {
      attend_tile(call, chunk, rows, copy_pages(args, count, memory), memory.scales, start, stop);
    }
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
  auto& rows = memory.rows;
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

  call_scratch.reset(Scratch::room<float>(query_elements) + Scratch::room<float>(args.tokens * args.num_heads) +
                     Scratch::room<float>(plan.partial_rows * out_width) +
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
