// A tile times a block of tokens, kLanes of its rows at a time. Included by tiles.h.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {

// Weights are fetched this far ahead into the second-level cache, into the next tile if need be: short products
// otherwise wait for memory at the start of every tile and page. Times bits, since wider codes are read faster.
constexpr int64_t kAhead = 2048;
// Tiles are not taken apart for many blocks of tokens: registers hold the codes of a block for as many as it has.
struct Expansion {
  static constexpr bool any = false;
};
// Over a tile, of kLanes rows each, which fetch lines in turn.
constexpr int kPasses = kTile / kLanes;

// kLanes rows of a tile, from row `lane`, times one block of tokens; out is [tokens, 16].
template <int bits, ZeroKind zero, int tokens>
void multiply_lanes(const TileArgs& tile, int lane, const uint8_t* record, float* out) {
  const uint8_t* codes = tile.codes + lane * 4;
  Floats sum[tokens];
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) sum[t] = splat(0.0f);
  const uint8_t* ahead = tile.codes + kAhead * bits + lane / kLanes * 64;
  for (int64_t g = 0; g < tile.groups; ++g) {
    const int64_t index = g * kTile + lane;
    const Floats scale = load_scales(tile.scales, index, tile.scale_bytes);
    Ints zero_point = splat(zero == ZeroKind::offset ? 0 : midpoint_of(zero, bits));
    [[maybe_unused]] Floats offset;
    if constexpr (zero == ZeroKind::zero) zero_point = load_bytes(tile.zeros + index);
    if constexpr (zero == ZeroKind::offset) offset = load_scales(tile.zeros, index, tile.scale_bytes);
    for (int b = 0; b < tile.blocks; ++b) {
      for (int i = 0; i <= bits; i += kPasses) __builtin_prefetch(ahead + 64 * i, 0, 2);
      ahead += tile.step;
      const Codes<bits, zero == ZeroKind::float4> block(codes);
      // What a token's centre multiplies: the sum of the weights, without their offset.
      const Floats weights = scale * to_floats(block.sum_less(zero_point));
      const float* token_scales = reinterpret_cast<const float*>(record + tokens * kBlock);
      const float* centres = token_scales + tokens;
      const int32_t* terms = reinterpret_cast<const int32_t*>(centres + tokens);
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) {
        Ints start = splat(zero == ZeroKind::offset ? 0 : terms[t]);
        if constexpr (zero == ZeroKind::zero) start = multiply_small(zero_point, start);
        const Ints dot = block.dot(reinterpret_cast<const int8_t*>(record) + t * kBlock, start);
        sum[t] = fma(to_floats(dot), scale * splat(token_scales[t]), sum[t]);
      }
      // Apart, so that no dot product waits for the sum of codes.
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) {
        sum[t] = fma(weights, splat(centres[t]), sum[t]);
        if constexpr (zero == ZeroKind::offset) {
          sum[t] = fma(offset, splat(reinterpret_cast<const float*>(terms)[t]), sum[t]);
        }
      }
      codes += kTile * kBlock * bits / 8;
      record += tokens * kRecordBytes;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) store(out + t * kTile + lane, sum[t]);
}

// The same for groups of 16, of which a block holds two. Zeros are midpoints; a term holds two sums of codes.
template <int bits, int tokens>
void multiply_halves(const TileArgs& tile, int lane, const uint8_t* record, float* out) {
  const uint8_t* codes = tile.codes + lane * 4;
  const Ints zero_point = splat(1 << (bits - 1));
  Floats sum[tokens];
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) sum[t] = splat(0.0f);
  const uint8_t* ahead = tile.codes + kAhead * bits + lane / kLanes * 64;
  for (int64_t g = 0; g < tile.groups; g += 2) {
    const int64_t index = g * kTile + lane;
    const Floats low = load_scales(tile.scales, index, tile.scale_bytes);
    const Floats high = load_scales(tile.scales, index + kTile, tile.scale_bytes);
    for (int i = 0; i <= bits; i += kPasses) __builtin_prefetch(ahead + 64 * i, 0, 2);
    ahead += tile.step;
    const Codes<bits, false> block(codes);
    const Floats weights = fma(high, to_floats(block.sum_less(zero_point, 4, 8)),
                               low * to_floats(block.sum_less(zero_point, 0, 4)));
    const float* token_scales = reinterpret_cast<const float*>(record + tokens * kBlock);
    const float* centres = token_scales + tokens;
    const int32_t* terms = reinterpret_cast<const int32_t*>(centres + tokens);
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) {
      const int8_t* x = reinterpret_cast<const int8_t*>(record) + t * kBlock;
      const Floats scale = splat(token_scales[t]);
      const Ints first = block.dot(x, splat(-int32_t(int16_t(terms[t])) * (1 << (bits - 1))), 0, 4);
      const Ints second = block.dot(x, splat(-(terms[t] >> 16) * (1 << (bits - 1))), 4, 8);
      sum[t] = fma(to_floats(first), low * scale, sum[t]);
      sum[t] = fma(to_floats(second), high * scale, sum[t]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) sum[t] = fma(weights, splat(centres[t]), sum[t]);
    codes += kTile * kBlock * bits / 8;
    record += tokens * kRecordBytes;
  }
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) store(out + t * kTile + lane, sum[t]);
}

template <int bits, ZeroKind zero, bool halves, int tokens>
void multiply_tile(const TileArgs& tile, const uint8_t* block, float* out) {
  for (int lane = 0; lane < kTile; lane += kLanes) {
    if constexpr (halves) {
      multiply_halves<bits, tokens>(tile, lane, block, out);
    } else {
      multiply_lanes<bits, zero, tokens>(tile, lane, block, out);
    }
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
