// One task: its rows attend to its keys, a part after the other and in each a tile after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arena.h"
#include "attend_tile.h"
#include "operators.h"
#include "output.h"
#include "pages.h"
#include "plan.h"
#include "sums.h"
#include "tile.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

// So many rows widen a page while they read it, which is faster than doing it once for all; 8 tokens of a group of 3.
constexpr int64_t kFewRows = 24;
// Keys between two updates of the running maximum, from the same places for all queries.
constexpr int64_t kTileKeys = 128;

template <class F>
class Task {
 public:
  Task(const Call& call, const Chunk& chunk, Arena& arena) : call_(call), args_(call.args), chunk_(chunk) {
    const int64_t count = chunk.count * call.group, all = chunk.heads * count, dim = args_.head_dim;
    const int64_t pages = std::max<int64_t>(1, kTileKeys / args_.page_size), tile = pages * args_.page_size;
    const int64_t scored = chunk.heads * std::min<int64_t>(kRows, count) * tile;
    const int64_t scaled = F::kScaled ? chunk.heads * tile : 0, width = call.partial.width;
    const int64_t copied = copied_keys(tile) + Strips<Query>::elements(tile / F::kPack, dim);
    arena.reset(2 * Sums::room(all, width) + Arena::room<float>(scored) + 3 * Arena::room<float>(scaled) +
                2 * Pages::room(chunk.heads, pages) + Arena::room<Query>(copied));
    const int64_t first_row = (chunk.head * args_.tokens + chunk.token) * call.group, depth = dim / F::kPack;
    const Rows<Query> rows{static_cast<Query*>(call.queries) + first_row * depth, call.units + first_row, depth,
                           args_.tokens * call.group, chunk.heads, count};
    attention_ = {rows, call.group, chunk.position, args_.sliding_window, args_.page_size, call.soft_cap,
                  {arena.take<float>(scored), tile},
                  {arena.take<float>(scaled), arena.take<float>(scaled)},
                  arena.take<float>(scaled)};
    part_ = Sums::take(arena, all, width);
    joined_ = Sums::take(arena, all, width);
    pages_ = Pages::take(arena, chunk.heads, pages, args_.page_size, dim);
    wide_ = Wide::take(arena, chunk.heads, pages, args_.page_size, dim);
    copies_ = arena.take<Query>(copied);
  }

  void attend() {
    const Rows<Query>& rows = attention_.rows;
    const int64_t all = rows.heads * rows.count, part = Plan::part_keys(args_.page_size);
    if (chunk_.partial >= 0) {
      part_ = call_.partial.from(chunk_.partial + chunk_.head * rows.count);
      return attend_keys(chunk_.begin, chunk_.end);
    }
    joined_.clear(all);
    for (int64_t row = 0; row < all; ++row) add_sink(args_, query_head(row), joined_, row);
    int64_t end;
    for (int64_t begin = chunk_.begin; begin < chunk_.end; begin = end) {
      end = std::min((begin / part + 1) * part, chunk_.end);
      attend_keys(begin, end);
      for (int64_t row = 0; row < all; ++row) joined_.join(row, part_, row);
    }
    for (int64_t row = 0; row < all; ++row)
      store_output(args_, joined_, row, chunk_.token + row % rows.count / call_.group, query_head(row));
  }

 private:
  using K = typename F::Key;
  using V = typename F::Value;
  using Query = typename F::Query;
  using Pages = PageTile<K, V>;
  using Wide = PageTile<Query, Query>;

  int64_t query_head(int64_t row) const {
    return (chunk_.head + row / attention_.rows.count) * call_.group + row % call_.group;
  }

  // The sums over keys [begin, end), a part or what a task has of it.
  void attend_keys(int64_t begin, int64_t end) {
    const Rows<Query>& rows = attention_.rows;
    const int64_t tile = attention_.scores.tile;
    part_.clear(rows.heads * rows.count);
    int64_t stop;
    for (int64_t start = begin / args_.page_size * args_.page_size; start < end; start = stop) {
      stop = std::min((start / tile + 1) * tile, end);
      open_tile(start, stop);
      const int64_t count = divide_up(stop - start, args_.page_size);
      // Many rows read a page several times: widen it once.
      if (rows.count <= kFewRows || (!kInStrips && std::is_same_v<K, float>)) {
        attention_.attend_tile(pages_, start, stop, part_);
      } else if constexpr (kInStrips) {
        attention_.attend_tile(copy_in_strips(count), start, stop, part_);
      } else {
        attention_.attend_tile(copy_pages(count), start, stop, part_);
      }
    }
  }

  // Finds the pages of the tile of keys [start, end) and of the keys after it, and gathers the scales. After the last
  // tile of a task come keys that this thread is likely to take next.
  void open_tile(int64_t start, int64_t end) {
    const int64_t pages = pages_.pages, page_size = args_.page_size, context = args_.context_len[chunk_.sequence];
    const int32_t* table = args_.page_table + chunk_.sequence * args_.max_pages + start / page_size;
    const size_t bytes = static_cast<size_t>(page_size) * sizeof(float);
    for (int64_t i = 0; start + i * page_size < end; ++i)
      for (int64_t h = 0; h < chunk_.heads; ++h) {
        const int64_t head = chunk_.head + h, at = h * pages + i, key = at * page_size;
        const bool more = start + (pages + i) * page_size < context;
        pages_.keys[at] = page_keys<F>(args_, table[i], head);
        pages_.values[at] = page_values<F>(args_, table[i], head);
        pages_.next_keys[at] = more ? page_keys<F>(args_, table[pages + i], head) : pages_.keys[at];
        if (!F::kScaled) continue;
        std::memcpy(attention_.scales.keys + key, page_scales(args_, table[i], kKeys, head), bytes);
        std::memcpy(attention_.scales.values + key, page_scales(args_, table[i], kValues, head), bytes);
      }
  }

  int64_t copied_keys(int64_t keys) const { return Strips<Query>::elements(args_.head_dim / F::kPack, keys); }

  // The first `count` pages of a tile of one head as rows can multiply them again and again.
  StripTile<Query> copy_in_strips(int64_t count) const {
    const int64_t dim = args_.head_dim, page = args_.page_size, tile = attention_.scores.tile, pack = F::kPack;
    Query* const keys = copies_;
    Query* const values = keys + copied_keys(tile);
    for (int64_t i = 0; i < count; ++i) {
      copy_strips(pages_.keys[i], dim / pack, page, dim / pack, keys + i * page * dim / pack);
      copy_strips(pages_.values[i], page / pack, dim, tile / pack, values + i * page / pack * kStrip);
    }
    return {keys, values, dim};
  }

  const Wide& copy_pages(int64_t count) const {
    const int64_t elements = args_.page_size * args_.head_dim / F::kPack;
    Query* to = copies_;
    const auto copy = [&](const auto* from) {
      for (int64_t at = 0; at < elements; at += kLanes) simd::store(to + at, simd::load(from + at));
      to += elements;
      return to - elements;
    };
    for (int64_t i = 0; i < count; ++i) {
      wide_.keys[i] = wide_.next_keys[i] = copy(pages_.keys[i]);
      wide_.values[i] = copy(pages_.values[i]);
    }
    return wide_;
  }

  const Call& call_;
  const PagedAttentionArgs& args_;
  const Chunk& chunk_;
  Attention<Query> attention_;
  Sums part_, joined_;  // over the keys of a part, and over the parts so far
  Pages pages_;
  Wide wide_;
  Query* copies_;
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
