// Dense weights in tiles of 16 rows, and their products with blocks of tokens.
//
// Weights are float32, float16 or bfloat16 and x is float32. A product is a float32 fused multiply-add of a weight that
// was widened, which is exact, in the order of K: the same whatever the batch, the block and the thread.
//
// Tokens are cut into blocks of at most kDenseTokens. A block of n stores for every element along K its n tokens, so
// that a kernel reads one sequential stream. Two tiles are multiplied at a time. Few tokens read the weights as they
// are, at the speed of memory; many read a part of both tiles that was widened once for all of them.
#pragma once

#include "activations.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

constexpr int kVectors = kTile / kLanes;  // of a tile, for one element along K
// Vectors of sums at once: what is left of the registers beside weights and one number of x.
constexpr int kSums = kRegisters - 4;
// As many tokens of a tile as have registers, or of both tiles where a tile is one vector.
constexpr int kDenseTokens = kSums / (kVectors == 1 ? 2 : kVectors);
// Tokens that share a widened part.
constexpr int64_t kSegment = kDenseTokens * (kDenseTokens < 4 ? 32 : kDenseTokens < 8 ? 16 : 8);
constexpr int64_t kPart = 128;  // elements along K of a widened part, which stays in the first-level cache

// Fewer are a block for themselves, so that a step with drafts reads its weights once.
constexpr int kFewTokens = kDenseTokens < 8 ? kDenseTokens : 8;

// Tokens in the next block when `left` remain; never a matter of results.
inline int dense_tokens(int64_t left) {
  if (left >= kDenseTokens) return kDenseTokens;
  return left > kFewTokens ? kFewTokens : int(left);
}

// A block of `count` tokens from a row of x each.
inline void place_tokens(const float* const* rows, int64_t features, int count, float* block) {
  constexpr int64_t step = 64;  // so that what is written by columns stays in the first-level cache
  for (int64_t first = 0; first < features; first += step) {
    const int64_t last = first + step < features ? first + step : features;
    for (int t = 0; t < count; ++t) {
      const float* x = rows[t];
      for (int64_t k = first; k < last; ++k) block[k * count + t] = x[k];
    }
  }
  for (int t = 0; features % 2 != 0 && t < count; ++t) block[features * count + t] = 0.0f;
}

// Two elements along K of kLanes rows from `lane`.
template <class Element>
SLIPSTREAM_INLINE Floats load_first_of(const Element* pair, int lane) { return load(pair + lane); }
template <class Element>
SLIPSTREAM_INLINE Floats load_second_of(const Element* pair, int lane) { return load(pair + kTile + lane); }
SLIPSTREAM_INLINE Floats load_first_of(const BFloat16* pair, int lane) { return load_firsts(pair + 2 * lane); }
SLIPSTREAM_INLINE Floats load_second_of(const BFloat16* pair, int lane) { return load_seconds(pair + 2 * lane); }

// Adds the products of `depth` elements along K to sums [tiles, tokens, 16].
template <class Element, int tokens, int tiles>
void add_products(const uint8_t* data, int64_t stride, int64_t depth, const float* x, float* sums) {
  constexpr int vectors = tiles * kVectors;
  const Element* rows[tiles];
  Floats sum[tokens * vectors];
#pragma GCC unroll 2
  for (int p = 0; p < tiles; ++p) rows[p] = reinterpret_cast<const Element*>(data + p * stride);
#pragma GCC unroll 32
  for (int i = 0; i < tokens * vectors; ++i) {
    sum[i] = load(sums + (i % vectors / kVectors * tokens + i / vectors) * kTile + i % kVectors * kLanes);
  }
  // Into the next pair of tiles where that is near: they are a stream each.
  const int64_t ahead = 2 * stride < (1 << 14) ? 2 * stride : 1 << 14;
  for (int64_t k = 0; k < depth; k += 2) {
    Floats weight[vectors];
    if constexpr (tokens <= kFewTokens) {
#pragma GCC unroll 2
      for (int p = 0; p < tiles; ++p) {
        const char* next = reinterpret_cast<const char*>(rows[p] + k * kTile) + ahead;
        __builtin_prefetch(next, 0, 2);
        if constexpr (sizeof(Element) == 4) __builtin_prefetch(next + 64, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) weight[v] = load_first_of(rows[v / kVectors] + k * kTile, v % kVectors * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) {
      const Floats number = splat(x[t]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[t * vectors + v] = fma(number, weight[v], sum[t * vectors + v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) weight[v] = load_second_of(rows[v / kVectors] + k * kTile, v % kVectors * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) {
      const Floats number = splat(x[tokens + t]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[t * vectors + v] = fma(number, weight[v], sum[t * vectors + v]);
    }
    x += 2 * tokens;
  }
#pragma GCC unroll 32
  for (int i = 0; i < tokens * vectors; ++i) {
    store(sums + (i % vectors / kVectors * tokens + i / vectors) * kTile + i % kVectors * kLanes, sum[i]);
  }
}

template <class Element, int tokens>
void add_products(const uint8_t* data, int64_t stride, int tiles, int64_t depth, const float* x, float* sums) {
  if (tiles == 1) {
    add_products<Element, tokens, 1>(data, stride, depth, x, sums);
  } else if constexpr (2 * kVectors * (tokens + 1) < kRegisters) {  // sums, weights and one number of x
    add_products<Element, tokens, 2>(data, stride, depth, x, sums);
  } else {
    add_products<Element, tokens, 1>(data, stride, depth, x, sums);
    add_products<Element, tokens, 1>(data + stride, stride, depth, x, sums + tokens * kTile);
  }
}

template <class Element, int few>
void add_few(const uint8_t* data, int64_t stride, int tiles, int64_t depth, const float* x, int tokens, float* sums) {
  if (tokens == few) return add_products<Element, few>(data, stride, tiles, depth, x, sums);
  if constexpr (few > 1) add_few<Element, few - 1>(data, stride, tiles, depth, x, tokens, sums);
}

template <class Element>
void add_products(const uint8_t* data, int64_t stride, int tiles, int64_t depth, const float* x, int tokens,
                  float* sums) {
  if (tokens == kDenseTokens) return add_products<Element, kDenseTokens>(data, stride, tiles, depth, x, sums);
  add_few<Element, kFewTokens>(data, stride, tiles, depth, x, tokens, sums);
}

// A part of tiles as float32 [tiles, depth, 16].
template <class Element>
void widen(const uint8_t* data, int64_t stride, int tiles, int64_t depth, float* out) {
  for (int p = 0; p < tiles; ++p) {
    const Element* pair = reinterpret_cast<const Element*>(data + p * stride);
    for (int64_t k = 0; k < depth; k += 2, pair += 2 * kTile, out += 2 * kTile) {
      for (int lane = 0; lane < kTile; lane += kLanes) {
        store(out + lane, load_first_of(pair, lane));
        store(out + kTile + lane, load_second_of(pair, lane));
      }
    }
  }
}

// Products of at most kSegment tokens with one or two tiles, which `finish` gets token by token: its number, its 16 sums
// of the first tile, and how many floats behind them those of the second are.
template <class Element, class Finish>
void multiply_segment(const uint8_t* data, int64_t stride, int tiles, int64_t depth, const float* x, int64_t tokens,
                      const Finish& finish) {
  alignas(64) float sums[2 * kSegment * kTile];
  alignas(64) float widened[2 * kPart * kTile];
  __builtin_memset(sums, 0, sizeof(float) * tiles * tokens * kTile);
  const int64_t part = tokens > kDenseTokens ? kPart : depth;
  for (int64_t k = 0; k < depth; k += part) {
    const int64_t length = depth - k < part ? depth - k : part;
    const uint8_t* rows = data + k * kTile * int64_t(sizeof(Element));
    const bool wide = sizeof(Element) == 4 || tokens <= kDenseTokens;
    if (!wide) widen<Element>(rows, stride, tiles, length, widened);
    for (int64_t token = 0; token < tokens;) {
      const int count = dense_tokens(tokens - token);
      const float* block = x + token * depth + k * count;
      float* out = sums + token * tiles * kTile;
      if (wide) {
        add_products<Element>(rows, stride, tiles, length, block, count, out);
      } else {
        const uint8_t* floats = reinterpret_cast<const uint8_t*>(widened);
        add_products<float>(floats, length * kTile * 4, tiles, length, block, count, out);
      }
      token += count;
    }
  }
  for (int64_t token = 0; token < tokens;) {
    const int count = dense_tokens(tokens - token);
    float* block = sums + token * tiles * kTile;
    for (int t = 0; t < count; ++t) finish(token + t, block + t * kTile, int64_t(count) * kTile);
    token += count;
  }
}

// The same for any number of tokens and tiles `tile` and perhaps the next of a blob.
template <class Finish>
void multiply_dense(const DenseWeight& weight, const uint8_t* blob, int64_t tile, int tiles, const float* x,
                    int64_t tokens, const Finish& finish) {
  const int64_t stride = weight.stride(), depth = weight.depth();
  const uint8_t* data = blob + tile * stride;
  for (int64_t first = 0; first < tokens; first += kSegment) {
    const int64_t count = tokens - first < kSegment ? tokens - first : kSegment;
    const auto after = [&](int64_t token, float* sums, int64_t next) { finish(first + token, sums, next); };
    const float* rows = x + first * depth;
    if (weight.type == kBFloat16Type) {
      multiply_segment<BFloat16>(data, stride, tiles, depth, rows, count, after);
    } else if (weight.type == kFloat16Type) {
      multiply_segment<Half>(data, stride, tiles, depth, rows, count, after);
    } else {
      multiply_segment<float>(data, stride, tiles, depth, rows, count, after);
    }
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
