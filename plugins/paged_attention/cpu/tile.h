// The two products of a tile of keys: scores of queries, and sums of values, in pages or in copies of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "multiply.h"
#include "panels.h"
#include "plan.h"
#include "softmax.h"
#include "sums.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

// Queries of a task: the rows of one kv head after those of another. They are floats, or pairs of integers in units of
// their own.
template <class Query>
struct Rows {
  const Query* queries;
  const float* units;
  int64_t depth;   // of a query
  int64_t stride;  // rows from one head to the next
  int64_t heads;
  int64_t count;  // of each head
};

// Some rows of every head, and the keys of a tile that one of them sees, from the first of a page.
struct Block {
  int64_t row, rows;
  KeyRange keys;
};

// Scores of a block's rows [heads, rows, tile], or in their place what values are multiplied by.
struct Scores {
  float* data;
  int64_t tile;

  float* of(const Block& block, int64_t head, int64_t row = 0) const {
    return data + (head * block.rows + row) * tile;
  }
};

// Pages of one tile. Values are fetched while keys are multiplied, and the next keys while values are.
template <class K, class V>
struct PageTile {
  static_assert(sizeof(K) >= sizeof(V), "only keys ask for further panels, see Panels::after");
  using Query = Left<K>;
  const K** keys;  // [heads, pages]
  const V** values;
  const K** next_keys;
  int64_t pages, page_size, head_dim;

  static int64_t room(int64_t heads, int64_t pages) { return 3 * Arena::room<K*>(heads * pages); }

  static PageTile take(Arena& arena, int64_t heads, int64_t pages, int64_t page_size, int64_t head_dim) {
    const K** const keys = arena.take<const K*>(heads * pages);
    const V** const values = arena.take<const V*>(heads * pages);
    return {keys, values, arena.take<const K*>(heads * pages), pages, page_size, head_dim};
  }

  void multiply_keys(const Rows<Query>& rows, const Block& block, const Scores& scores) const {
    for (int64_t key = block.keys.begin; key < block.keys.end; key += page_size)
      for (int64_t head = 0; head < rows.heads; ++head) {
        const int64_t at = head * pages + key / page_size, row = head * rows.stride + block.row, depth = rows.depth;
        const Panels<K, V> panels{keys + at, values + at, depth, depth, page_size, next_keys + at};
        multiply(block.rows, rows.queries + row * depth, depth, panels, page_size, scores.of(block, head) + key,
                 scores.tile, rows.units + row, false);
      }
  }

  void multiply_values(int64_t head, const Block& block, const Scores& scores, const float* units,
                       const Sums& sums) const {
    const int64_t at = head * pages + block.keys.begin / page_size;
    const int64_t depth = divide_up(block.keys.end - block.keys.begin, kPack<K>);
    const Panels<V, K> panels{values + at, next_keys + at, page_size / kPack<K>, depth, head_dim};
    const auto* factors = reinterpret_cast<const Query*>(scores.of(block, head) + block.keys.begin);
    multiply(block.rows, factors, scores.tile, panels, head_dim, sums.out, sums.width, units, true);
  }
};

// One tile of one head copied in strips.
template <class T>
struct StripTile {
  const T* keys;
  const T* values;
  int64_t head_dim;

  void multiply_keys(const Rows<T>& rows, const Block& block, const Scores& scores) const {
    const int64_t depth = rows.depth, begin = block.keys.begin;
    const int64_t columns = divide_up(block.keys.end - begin, kStrip) * kStrip;
    multiply(block.rows, rows.queries + block.row * depth, depth, Strips<T>{keys + begin * depth, depth, depth},
             columns, scores.of(block, 0) + begin, scores.tile, rows.units + block.row, false);
  }

  void multiply_values(int64_t, const Block& block, const Scores& scores, const float* units, const Sums& sums) const {
    const int64_t begin = block.keys.begin, depth = divide_up(block.keys.end - begin, kPack<T>);
    const Strips<T> strips{values + begin / kPack<T> * kStrip, scores.tile / kPack<T>, depth};
    const auto* factors = reinterpret_cast<const T*>(scores.of(block, 0) + begin);
    multiply(block.rows, factors, scores.tile, strips, head_dim, sums.out, sums.width, units, true);
  }
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
