// Cuts a batch into tasks: which queries attend to which keys together.
//
// Keys are cut into parts at the same places for every query, and a query's sums over its parts are joined in their
// order, by one task or after several. So its result is the same in any company, and whether it comes alone, in a
// chunk of whatever size, or again after its pages were lost.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "arena.h"
#include "cpu/simd.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

constexpr int64_t kBlockRows = 96;  // query rows (tokens times heads of a group) of one task, at least
// A task copies the pages it reads, so more rows are better while they and their sums, of so many elements each, stay
// in the second-level cache beside the copies. Not measured with 32 registers.
constexpr int64_t kBlockElements = simd::kRegisters == 16 ? 256 * 64 : 0;
constexpr int64_t kBlocks = 6;  // tasks of a sequence and kv head before blocks grow, so that threads end together
constexpr int64_t kHeadRows = 16;   // rows of one task that covers several kv heads, at most
// About so many keys are a part, in whole pages. Where a sequence has too few queries for many tasks, each part is one.
constexpr int64_t kPartKeys = 256;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Neighbouring queries of one sequence and the keys they attend to, for some kv heads.
struct Chunk {
  int64_t sequence;
  int64_t token;     // first row of qkv
  int64_t count;     // tokens
  int64_t position;  // of the first token in its sequence
  int64_t begin;     // first key
  int64_t end;       // last key + 1
  int64_t partial;   // first row of partial results of a part, or -1: these are all the keys
  int64_t head;      // first kv head
  int64_t heads;     // kv heads

  int64_t cost() const { return heads * count * (end - begin); }
};

// A sequence whose keys were split: how its partial results become its output.
struct Reduction {
  int64_t token, count;
  int64_t partial, parts;
};

// The tasks of a call. They and what they say of partial results lie in `arena`.
struct Plan {
  Chunk* chunks;
  Reduction* reductions;
  int64_t chunk_count = 0, reduction_count = 0, partial_rows = 0;
  int64_t cost = 0;

  Plan(const PagedAttentionArgs& args, Arena& arena) {
    const int64_t most = max_chunks(args);
    arena.reset(Arena::room<Chunk>(most) + Arena::room<Reduction>(args.sequences));
    chunks = arena.take<Chunk>(most);
    reductions = arena.take<Reduction>(args.sequences);
    for (int64_t s = 0; s < args.sequences; ++s) add_sequence(args, s);
    for (int64_t i = 0; i < chunk_count; ++i) cost += chunks[i].cost();
  }

  static int64_t part_keys(int64_t page_size) { return divide_up(kPartKeys, page_size) * page_size; }

  // The costly tasks first, so that no thread starts one when the others have finished. A session's pool gives every
  // thread neighbouring tasks, so equal ones follow their keys: each thread walks its own and finds them fetched ahead.
  void sort() {
    std::sort(chunks, chunks + chunk_count, [](const Chunk& a, const Chunk& b) {
      return std::tuple(-a.cost(), a.sequence, a.begin) < std::tuple(-b.cost(), b.sequence, b.begin);
    });
  }

 private:
  static int64_t block_tokens(const PagedAttentionArgs& args) {
    return std::max<int64_t>(1, kBlockRows / (args.num_heads / args.num_kv_heads));
  }

  // Of a sequence with so many queries that their tasks take all keys.
  static int64_t block_tokens(const PagedAttentionArgs& args, int64_t count) {
    const int64_t most = kBlockElements / args.head_dim / (args.num_heads / args.num_kv_heads);
    return std::max(block_tokens(args), std::min(most, divide_up(count, kBlocks)));
  }

  // Room for chunks that is always enough.
  static int64_t max_chunks(const PagedAttentionArgs& args) {
    int64_t n = 0;
    for (int64_t s = 0; s < args.sequences; ++s)
      n += std::max(divide_up(args.query_start[s + 1] - args.query_start[s], block_tokens(args)),
                    divide_up(args.context_len[s], part_keys(args.page_size)));
    return n * args.num_kv_heads;
  }

  static int64_t first_key(const PagedAttentionArgs& args, int64_t position) {
    return args.sliding_window > 0 ? std::max<int64_t>(0, position + 1 - args.sliding_window) : 0;
  }

  void add_sequence(const PagedAttentionArgs& args, int64_t s) {
    const int64_t token = args.query_start[s], count = args.query_start[s + 1] - token;
    const int64_t context = args.context_len[s], position = context - count;
    if (count == 0) return;
    if (count <= block_tokens(args))
      return add_splits(args, {s, token, count, position, first_key(args, position), context, -1, 0, 0});
    const int64_t block = block_tokens(args, count);
    for (int64_t done = 0; done < count; done += block) {
      const int64_t tokens = std::min(block, count - done), at = position + done;
      add_heads(args, {s, token + done, tokens, at, first_key(args, at), at + tokens, -1, 0, 0});
    }
  }

  // A few rows wait for memory, which is fastest in order: they take several heads, which lie together in a page.
  void add_heads(const PagedAttentionArgs& args, Chunk chunk) {
    const int64_t rows = chunk.count * (args.num_heads / args.num_kv_heads);
    const int64_t parts = divide_up(args.num_kv_heads, std::max<int64_t>(1, kHeadRows / rows));
    const int64_t step = divide_up(args.num_kv_heads, parts);
    for (; chunk.head < args.num_kv_heads; chunk.head += step) {
      chunk.heads = std::min(step, args.num_kv_heads - chunk.head);
      chunks[chunk_count++] = chunk;
    }
  }

  void add_splits(const PagedAttentionArgs& args, Chunk chunk) {
    const int64_t keys = part_keys(args.page_size);
    const int64_t first = chunk.begin / keys, parts = divide_up(chunk.end, keys) - first;
    if (parts == 1) return add_heads(args, chunk);
    reductions[reduction_count++] = {chunk.token, chunk.count, partial_rows, parts};
    for (int64_t part = 0; part < parts; ++part) {
      Chunk piece = chunk;
      piece.begin = std::max(chunk.begin, (first + part) * keys);
      piece.end = std::min(chunk.end, (first + part + 1) * keys);
      piece.partial = partial_rows + part * chunk.count * args.num_heads;
      add_heads(args, piece);
    }
    partial_rows += parts * chunk.count * args.num_heads;
  }
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
