// Flash attention of a task's rows over one tile of keys (Dao et al., 2022).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/simd.h"
#include "plan.h"
#include "softmax.h"
#include "softmax_codes.h"
#include "sums.h"
#include "tile.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

// What a task attends with, whatever its tiles are made of.
template <class Query>
struct Attention {
  Rows<Query> rows;
  int64_t group;     // rows of a token
  int64_t position;  // of the first token in its sequence
  int64_t window;    // keys that a token sees, or 0 for all
  int64_t page_size;
  float soft_cap;
  Scores scores;
  Scales scales;       // [heads, tile]
  float* seen_scales;  // of values, [heads, tile]

  static constexpr bool kCoded = kPack<Query> == 2;
  static constexpr int64_t kMostRows = std::max<int64_t>(kRows, kHeadRows);  // of all heads of a block

  // All rows against keys [start, end), a tile or less.
  template <class Tile>
  void attend_tile(const Tile& tile, int64_t start, int64_t end, const Sums& sums) const {
    SeenValues of_heads[kMostRows];
    for (int64_t head = 0; head < rows.heads; ++head) of_heads[head].scales = seen_scales + head * scores.tile;
    for (int64_t row = 0; row < rows.count; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows.count - row);
      const int64_t first = seen(row, start, end).begin / page_size * page_size;
      const Block block{row, count, {first, seen(row + count - 1, start, end).end}};
      if (block.keys.begin >= block.keys.end) continue;
      tile.multiply_keys(rows, block, scores);
      float units[kMostRows];
      softmax(block, start, end, of_heads, units, sums);
      for (int64_t head = 0; head < rows.heads; ++head)
        tile.multiply_values(head, block, scores, units + head * count, sums.from(head * rows.count + row));
    }
  }

  // The keys of a tile [start, end) that a row sees.
  KeyRange seen(int64_t row, int64_t start, int64_t end) const {
    const int64_t behind = position + row / group + 1;
    return {window > 0 ? std::max<int64_t>(behind - window - start, 0) : 0, std::min(behind, end) - start};
  }

  // Turns a block's scores into what its values are multiplied by, integers in `units`.
  void softmax(const Block& block, int64_t start, int64_t end, SeenValues* of_heads, float* units,
               const Sums& sums) const {
    for (int64_t head = 0; head < rows.heads; ++head)
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = head * rows.count + block.row + i;
        const KeyRange of_row = seen(block.row + i, start, end);
        float* const of_keys = scores.of(block, head, i);
        if constexpr (kCoded) {
          const Scales of_head{scales.keys + head * scores.tile, scales.values + head * scores.tile};
          const KeyRange keys{block.keys.begin, divide_up(block.keys.end, kTogether) * kTogether};
          const float max = scale_scores(of_keys, of_head.keys, soft_cap, keys, of_row);
          SeenValues& values = of_heads[head];
          values.see(of_head, scores.tile, of_row);
          const Encoded encoded = encode_scores(of_keys, values.scales, scores.tile, keys, max);
          const float now = std::max(sums.max[row], max), lowered = max == now ? 1.0f : std::exp2(max - now);
          units[head * block.rows + i] = encoded.unit * lowered + values.nothing;
          sums.add(row, now, encoded.sum * lowered);
        } else {
          softmax_row(of_keys, soft_cap, block.keys, of_row, sums, row);
        }
      }
  }
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
