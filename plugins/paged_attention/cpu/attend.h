// Flash attention of one task: its rows against its keys, a tile after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arena.h"
#include "operators.h"
#include "output.h"
#include "pages.h"
#include "plan.h"
#include "softmax.h"
#include "softmax_codes.h"
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
    const int64_t first_row = (chunk.head * args_.tokens + chunk.token) * call.group;
    rows_ = {static_cast<Query*>(call.queries) + first_row * dim / F::kPack, call.units + first_row, dim / F::kPack,
             args_.tokens * call.group, chunk.heads, count};
    part_ = Sums::take(arena, all, width);
    joined_ = Sums::take(arena, all, width);
    scores_ = {arena.take<float>(scored), tile};
    factors_ = arena.take<float>(scaled);
    scales_ = {arena.take<float>(scaled), arena.take<float>(scaled)};
    pages_ = Pages::take(arena, chunk.heads, pages, args_.page_size, dim);
    wide_ = Wide::take(arena, chunk.heads, pages, args_.page_size, dim);
    copies_ = arena.take<Query>(copied);
  }

  void attend() {
    const int64_t all = rows_.heads * rows_.count, part = Plan::part_keys(args_.page_size);
    if (chunk_.partial >= 0) {
      part_ = call_.partial.from(chunk_.partial + chunk_.head * rows_.count);
      return attend_keys(chunk_.begin, chunk_.end);
    }
    for (int64_t row = 0; row < all; ++row) begin_row(args_, query_head(row), joined_, row);
    int64_t end;
    for (int64_t begin = chunk_.begin; begin < chunk_.end; begin = end) {
      end = std::min((begin / part + 1) * part, chunk_.end);
      attend_keys(begin, end);
      for (int64_t row = 0; row < all; ++row) joined_.join(row, part_, row);
    }
    for (int64_t row = 0; row < all; ++row)
      store_output(args_, joined_, row, chunk_.token + row % rows_.count / call_.group, query_head(row));
  }

 private:
  using K = typename F::Key;
  using V = typename F::Value;
  using Query = typename F::Query;
  using Pages = PageTile<K, V>;
  using Wide = PageTile<Query, Query>;
  static constexpr int64_t kMostRows = std::max<int64_t>(kRows, kHeadRows);  // of all heads of a block

  int64_t query_head(int64_t row) const {
    return (chunk_.head + row / rows_.count) * call_.group + row % call_.group;
  }

  // The sums over keys [begin, end), a part or what a task has of it.
  void attend_keys(int64_t begin, int64_t end) {
    part_.clear(rows_.heads * rows_.count);
    int64_t stop;
    for (int64_t start = begin / args_.page_size * args_.page_size; start < end; start = stop) {
      stop = std::min((start / scores_.tile + 1) * scores_.tile, end);
      open_tile(start, stop);
      const int64_t count = divide_up(stop - start, args_.page_size);
      // Many rows read a page several times: widen it once.
      if (rows_.count <= kFewRows || (!kInStrips && std::is_same_v<K, float>)) {
        attend_tile(pages_, start, stop);
      } else if constexpr (kInStrips) {
        attend_tile(copy_in_strips(count), start, stop);
      } else {
        attend_tile(copy_pages(count), start, stop);
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
        std::memcpy(scales_.keys + key, page_scales(args_, table[i], kKeys, head), bytes);
        std::memcpy(scales_.values + key, page_scales(args_, table[i], kValues, head), bytes);
      }
  }

  int64_t copied_keys(int64_t keys) const { return Strips<Query>::elements(args_.head_dim / F::kPack, keys); }

  // The first `count` pages of a tile of one head as rows can multiply them again and again.
  StripTile<Query> copy_in_strips(int64_t count) const {
    const int64_t dim = args_.head_dim, page = args_.page_size, tile = scores_.tile, pack = F::kPack;
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

  // All rows against keys [start, end), a tile or less.
  template <class Tile>
  void attend_tile(const Tile& tile, int64_t start, int64_t end) {
    CodeFactors factors[kMostRows];  // of the heads
    for (int64_t head = 0; head < rows_.heads; ++head) factors[head].factors = factors_ + head * scores_.tile;
    for (int64_t row = 0; row < rows_.count; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows_.count - row);
      const int64_t first = seen(row, start, end).begin / args_.page_size * args_.page_size;
      const Block block{row, count, {first, seen(row + count - 1, start, end).end}};
      if (block.keys.begin >= block.keys.end) continue;
      tile.multiply_keys(rows_, block, scores_);
      float units[kMostRows];
      softmax(block, start, end, factors, units);
      for (int64_t head = 0; head < rows_.heads; ++head)
        tile.multiply_values(head, block, scores_, units + head * count, part_.from(head * rows_.count + row));
    }
  }

  // The keys of a tile [start, end) that a row sees.
  KeyRange seen(int64_t row, int64_t start, int64_t end) const {
    const int64_t position = chunk_.position + row / call_.group, window = args_.sliding_window;
    const int64_t first = window > 0 ? std::max<int64_t>(position + 1 - window - start, 0) : 0;
    return {first, std::min(position + 1, end) - start};
  }

  // Turns a block's scores into what its values are multiplied by, integers in `units`.
  void softmax(const Block& block, int64_t start, int64_t end, CodeFactors* factors, float* units) const {
    for (int64_t head = 0; head < rows_.heads; ++head)
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = head * rows_.count + block.row + i;
        const KeyRange of_row = seen(block.row + i, start, end);
        float* const scores = scores_.of(block, head, i);
        if constexpr (F::kScaled) {
          const Scales scales{scales_.keys + head * scores_.tile, scales_.values + head * scores_.tile};
          const KeyRange keys{block.keys.begin, divide_up(block.keys.end, kTogether) * kTogether};
          const float max = scale_scores(scores, scales.keys, call_.soft_cap, keys, of_row, part_.max[row]);
          factors[head].see(scales, scores_.tile, of_row);
          units[head * block.rows + i] = factors[head].unit;
          part_.add(row, max, encode_scores(scores, factors[head].factors, keys, max));
        } else {
          softmax_row(scores, call_.soft_cap, block.keys, of_row, part_, row);
        }
      }
  }

  const Call& call_;
  const PagedAttentionArgs& args_;
  const Chunk& chunk_;
  Rows<Query> rows_;
  Sums part_, joined_;  // over the keys of a part, and over the parts so far
  Scores scores_;
  float* factors_;  // of probabilities, [heads, tile]
  Scales scales_;   // [heads, tile]
  Pages pages_;
  Wide wide_;
  Query* copies_;
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
