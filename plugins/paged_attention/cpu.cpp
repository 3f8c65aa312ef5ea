// PagedAttention on a CPU: k and v go into their pages, then flash attention reads pages only.
//
// The query heads that share a kv head are packed with the tokens of a chunk into rows (row = token * group + head),
// so that a page is read once for all of them. Scores are kept in units of log2, so that softmax uses 2^x.
#include "cpu.h"

#include <cassert>
#include <cmath>
#include <cstring>
#include <utility>

#include "../cpu/simd.h"
#include "multiply.h"
#include "plan.h"
#include "scratch.h"
#include "softmax.h"
#include "write.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kTileKeys = 128;  // keys between two updates of the running maximum
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
  int64_t tile;       // kTileKeys in whole pages
  float soft_cap;     // in units of log2
  float* queries;     // [num_kv_heads, tokens, group, head_dim]
  float* partial_out;
  float* partial_max;
  float* partial_sum;
};

// Pages of one tile, or copies of them as floats, and the scales of their tokens (null if there are none).
template <class T>
struct Tile {
  const T** keys;  // then those of the next tile, `opened` in all
  const T** values;
  float* key_scales;
  float* value_scales;
  int64_t opened;  // 0: nothing is to be prefetched
};

// Running softmax and output of the rows of a task.
struct Rows {
  const float* queries;
  float* out;
  float* max;
  float* sum;
  float* scores;  // [kRows, tile]
  int64_t count;
};

void scale_row(float* row, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += kLanes) simd::store(row + i, simd::load(row + i) * simd::splat(factor));
}

// Brings a page to the second-level cache: pages lie apart, so the hardware does not see the next one coming.
template <class T>
void prefetch(const T* page, int64_t elements) {
  const char* bytes = reinterpret_cast<const char*>(page);
  for (int64_t i = 0; i < elements * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// All rows of a task against keys [start, end), a tile or less.
template <class T>
void attend_tile(const Call& call, const Chunk& chunk, const Rows& rows, const Tile<T>& tile, int64_t start,
                 int64_t end) {
  const PagedAttentionArgs& args = call.args;
  const int64_t dim = args.head_dim, page = args.page_size;
  const auto low = [&](int64_t row) {
    const int64_t position = chunk.position + row / call.group;
    return args.sliding_window > 0 ? std::max<int64_t>(position + 1 - args.sliding_window - start, 0) : 0;
  };
  const auto high = [&](int64_t row) { return std::min(chunk.position + row / call.group + 1, end) - start; };
  for (int64_t r = 0; r < rows.count; r += kRows) {
    const int64_t n = std::min<int64_t>(kRows, rows.count - r);
    const int64_t first = low(r) / page * page, last = high(r + n - 1);
    if (first >= last) continue;
    for (int64_t key = first; key < last; key += page) {
      const int64_t i = key / page, next = i + call.tile / page;
      if (tile.opened > 0) prefetch(tile.values[i], page * dim);
      if (next < tile.opened) prefetch(tile.keys[next], page * dim);
      multiply(n, rows.queries + r * dim, dim, Panels<T>{tile.keys + i, dim, dim, page}, page, rows.scores + key,
               call.tile, false);
    }
    for (int64_t i = 0; i < n; ++i) {
      const Scores scores{rows.scores + i * call.tile, tile.key_scales, tile.value_scales, call.soft_cap};
      const float factor =
          softmax_row(scores, first, last, low(r + i), high(r + i), rows.max + r + i, rows.sum + r + i);
      if (factor != 1.0f) scale_row(rows.out + (r + i) * call.out_width, call.out_width, factor);
    }
    multiply(n, rows.scores + first, call.tile, Panels<T>{tile.values + first / page, page, last - first, dim}, dim,
             rows.out + r * call.out_width, call.out_width, true);
  }
}

template <class T>
const float* as_floats(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) simd::store(to + i, simd::load(from + i));
  return to;
}

// Scratch of one task: rows of results, one tile of scores, page pointers, scales, and pages as floats.
template <class T>
struct TaskMemory {
  Rows rows;
  Tile<T> tile;
  Tile<float> floats;
  float* copies;

  TaskMemory(const Call& call, int64_t row_count) {
    const int64_t pages = call.tile / call.args.page_size, elements = call.tile * call.args.head_dim;
    const bool scaled = call.args.kv_type == KVType::i8;
    task_scratch.reset(Scratch::room<float>(row_count * call.out_width) + 2 * Scratch::room<float>(row_count) +
                       Scratch::room<float>((kRows + 2) * call.tile) + 5 * Scratch::room<T*>(pages) +
                       Scratch::room<float>(2 * elements) + 2 * Scratch::room<float>(call.tile));
    rows = {nullptr,
            task_scratch.take<float>(row_count * call.out_width),
            task_scratch.take<float>(row_count),
            task_scratch.take<float>(row_count),
            task_scratch.take<float>(kRows * call.tile),
            row_count};
    float* key_scales = scaled ? task_scratch.take<float>(call.tile) : nullptr;
    float* value_scales = scaled ? task_scratch.take<float>(call.tile) : nullptr;
    tile = {task_scratch.take<const T*>(2 * pages), task_scratch.take<const T*>(pages), key_scales, value_scales, 0};
    floats = {task_scratch.take<const float*>(pages), task_scratch.take<const float*>(pages), key_scales,
              value_scales, 0};
    copies = task_scratch.take<float>(2 * elements);
  }
};

// Finds the pages of keys [start, end) and gathers their scales.
template <class T>
void open_tile(const PagedAttentionArgs& args, int64_t sequence, int64_t head, int64_t start, int64_t end,
               Tile<T>& tile) {
  const int32_t* table = args.page_table + sequence * args.max_pages + start / args.page_size;
  const size_t bytes = static_cast<size_t>(args.page_size) * sizeof(float);
  for (int64_t i = 0; start + i * args.page_size < end; ++i) {
    tile.keys[i] = page_data<T>(args, table[i], kKeys, head);
    tile.values[i] = page_data<T>(args, table[i], kValues, head);
    if (tile.key_scales == nullptr) continue;
    std::memcpy(tile.key_scales + i * args.page_size, page_scales(args, table[i], kKeys, head), bytes);
    std::memcpy(tile.value_scales + i * args.page_size, page_scales(args, table[i], kValues, head), bytes);
  }
}

// A few rows use a page for less time than it takes to arrive, so the next tile's keys are fetched beside this one's,
// and a task's first tile at once.
template <class T>
void look_ahead(const Call& call, const Chunk& chunk, int64_t head, int64_t start, int64_t end, Tile<T>& tile) {
  const PagedAttentionArgs& args = call.args;
  const int32_t* table = args.page_table + chunk.sequence * args.max_pages + start / args.page_size;
  const int64_t here = divide_up(end - start, args.page_size);
  tile.opened = divide_up(std::min(end + call.tile, chunk.end) - start, args.page_size);
  for (int64_t i = here; i < tile.opened; ++i) tile.keys[i] = page_data<T>(args, table[i], kKeys, head);
  if (start > chunk.begin) return;
  for (int64_t i = 1; i < here; ++i) prefetch(tile.keys[i], args.page_size * args.head_dim);
}

template <class T>
void attend_keys(const Call& call, const Chunk& chunk, int64_t head, TaskMemory<T>& memory) {
  const PagedAttentionArgs& args = call.args;
  const int64_t elements = args.page_size * args.head_dim;
  for (int64_t start = chunk.begin / args.page_size * args.page_size; start < chunk.end; start += call.tile) {
    const int64_t end = std::min(start + call.tile, chunk.end);
    open_tile(args, chunk.sequence, head, start, end, memory.tile);
    if (memory.rows.count <= kRows) look_ahead(call, chunk, head, start, end, memory.tile);
    if (sizeof(T) == sizeof(float) || memory.rows.count <= kRows) {
      attend_tile(call, chunk, memory.rows, memory.tile, start, end);
      continue;
    }
    // So many rows read a page several times: convert it once.
    float* copy = memory.copies;
    for (int64_t i = 0; start + i * args.page_size < end; ++i, copy += 2 * elements) {
      memory.floats.keys[i] = as_floats(memory.tile.keys[i], elements, copy);
      memory.floats.values[i] = as_floats(memory.tile.values[i], elements, copy + elements);
    }
    attend_tile(call, chunk, memory.rows, memory.floats, start, end);
  }
}

template <class T>
void attend(const Call& call, const Chunk& chunk, int64_t head) {
  const PagedAttentionArgs& args = call.args;
  TaskMemory<T> memory(call, chunk.count * call.group);
  Rows& rows = memory.rows;
  rows.queries = call.queries + (head * args.tokens + chunk.token) * call.group * args.head_dim;
  if (chunk.partial >= 0) {
    const int64_t at = chunk.partial + head * rows.count;
    rows.out = call.partial_out + at * call.out_width;
    rows.max = call.partial_max + at;
    rows.sum = call.partial_sum + at;
  }
  const bool sinks = chunk.sinks && args.sinks != nullptr;
  for (int64_t r = 0; r < rows.count; ++r) {
    rows.max[r] = sinks ? args.sinks[head * call.group + r % call.group] * kLog2E : kNoScore;
    rows.sum[r] = sinks ? 1.0f : 0.0f;
  }
  std::memset(rows.out, 0, static_cast<size_t>(rows.count * call.out_width) * sizeof(float));
  attend_keys(call, chunk, head, memory);
  if (chunk.partial >= 0) return;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t token = chunk.token + r / call.group, query_head = head * call.group + r % call.group;
    float* out = args.output + (token * args.num_heads + query_head) * args.head_dim;
    const float inverse = 1.0f / rows.sum[r];
    for (int64_t i = 0; i < args.head_dim; ++i) out[i] = rows.out[r * call.out_width + i] * inverse;
  }
}

// Joins the partial results of one row, in the order of the keys.
void reduce_row(const Call& call, const Reduction& reduction, int64_t head, int64_t row) {
  const PagedAttentionArgs& args = call.args;
  const int64_t step = reduction.count * args.num_heads;
  const int64_t first = reduction.partial + head * reduction.count * call.group + row;
  float max = kNoScore, sum = 0.0f;
  for (int64_t p = 0; p < reduction.parts; ++p) max = std::max(max, call.partial_max[first + p * step]);
  const int64_t token = reduction.token + row / call.group, query_head = head * call.group + row % call.group;
  float* __restrict out = args.output + (token * args.num_heads + query_head) * args.head_dim;
  std::memset(out, 0, static_cast<size_t>(args.head_dim) * sizeof(float));
  for (int64_t p = 0; p < reduction.parts; ++p) {
    const int64_t at = first + p * step;
    if (call.partial_sum[at] == 0.0f) continue;
    const float weight = std::exp2(call.partial_max[at] - max);
    const float* __restrict part = call.partial_out + at * call.out_width;
    sum += weight * call.partial_sum[at];
    for (int64_t i = 0; i < args.head_dim; ++i) out[i] += weight * part[i];
  }
  const float inverse = 1.0f / sum;
  for (int64_t i = 0; i < args.head_dim; ++i) out[i] *= inverse;
}

template <class F>
void run(Parallel& parallel, int64_t tasks, int64_t work, F&& task) {
  if (tasks > 1 && work >= kParallelWork && parallel.threads() > 1)
    return parallel.for_each(tasks, std::forward<F>(task));
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

template <class T>
void paged_attention_of(const PagedAttentionArgs& args, Parallel& parallel) {
  const int64_t heads = args.num_kv_heads, dim = args.head_dim, group = args.num_heads / heads;
  const int64_t out_width = (dim + kLanes - 1) / kLanes * kLanes;
  const int64_t tile = std::max<int64_t>(1, kTileKeys / args.page_size) * args.page_size;
  const int64_t max_chunks = Plan::max_chunks(args), query_elements = args.tokens * args.num_heads * dim;
  Plan plan;
  plan_scratch.reset(Scratch::room<Chunk>(max_chunks) + Scratch::room<Reduction>(args.sequences));
  plan.chunks = plan_scratch.take<Chunk>(max_chunks);
  plan.reductions = plan_scratch.take<Reduction>(args.sequences);
  plan.make(args);

  call_scratch.reset(Scratch::room<float>(query_elements) + Scratch::room<float>(plan.partial_rows * out_width) +
                     2 * Scratch::room<float>(plan.partial_rows));
  const bool capped = args.soft_cap > 0.0f;
  const Call call{args,
                  group,
                  out_width,
                  tile,
                  args.soft_cap * kLog2E,
                  call_scratch.take<float>(query_elements),
                  call_scratch.take<float>(plan.partial_rows * out_width),
                  call_scratch.take<float>(plan.partial_rows),
                  call_scratch.take<float>(plan.partial_rows)};

  const float factor = capped ? args.scale / args.soft_cap : args.scale * kLog2E;
  const int64_t elements = args.tokens * (args.num_heads + 2 * heads) * dim;
  run(parallel, divide_up(args.tokens, kWriteTokens) * heads, elements, [&](int64_t i) {
    const int64_t head = i % heads, begin = i / heads * kWriteTokens;
    write_tokens<T>(args, begin, std::min(begin + kWriteTokens, args.tokens), head, factor,
                    call.queries + (head * args.tokens + begin) * group * dim);
  });

  const int64_t work = plan.cost * args.num_heads * dim * 2;
  if (work >= kParallelWork) plan.sort();
  run(parallel, plan.chunk_count * heads, work,
      [&](int64_t i) { attend<T>(call, plan.chunks[i / heads], i % heads); });

  run(parallel, plan.reduction_count * heads, plan.partial_rows * dim, [&](int64_t i) {
    const Reduction& reduction = plan.reductions[i / heads];
    for (int64_t row = 0; row < reduction.count * group; ++row) reduce_row(call, reduction, i % heads, row);
  });
}

}  // namespace
}  // namespace attention

void paged_attention(const PagedAttentionArgs& args, Parallel& parallel) {
  assert(args.head_dim % 8 == 0 && args.head_dim <= attention::kMaxHeadDim && args.page_size % 16 == 0);
  assert(args.num_heads % args.num_kv_heads == 0 && 2 * args.rotary_half <= args.head_dim);
  switch (args.kv_type) {
    case KVType::f32: return attention::paged_attention_of<float>(args, parallel);
    case KVType::f16: return attention::paged_attention_of<Half>(args, parallel);
    case KVType::i8: return attention::paged_attention_of<int8_t>(args, parallel);
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
