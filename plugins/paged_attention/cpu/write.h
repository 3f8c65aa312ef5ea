// The first phase: norm and rotary embedding of q and k, and this step's k and v into their pages.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"
#include "multiply.h"
#include "operators.h"
#include "softmax.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

using simd::kLanes;
using simd::Floats;

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kWriteTokens = 32;  // tokens of one writing task

constexpr int64_t kKeys = 0, kValues = 1;  // the third axis of the cache

// Number of (page, k or v, head) blocks before this one.
inline int64_t block_index(const PagedAttentionArgs& args, int64_t page, int64_t which, int64_t head) {
  return ((args.layer * args.num_pages + page) * 2 + which) * args.num_kv_heads + head;
}

// What the heads of a page hold: elements of keys and of values, and what these are multiplied by. Integers are in
// units of a scale a token and head.
template <class K, class V = K>
struct Format {
  using Key = K;
  using Value = V;
  using Query = Left<K>;
  static constexpr int64_t kPack = attention::kPack<K>;
  static constexpr bool kScaled = kPack == 2;
};

// A page has the keys of all its heads, then their values.
template <class F>
char* page_of(const PagedAttentionArgs& args, int64_t page) {
  const int64_t elements = args.num_kv_heads * args.page_size * args.head_dim / F::kPack;
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(typename F::Key) + sizeof(typename F::Value));
  return static_cast<char*>(args.kv_cache) + (args.layer * args.num_pages + page) * bytes;
}

// [head_dim, page_size], or [head_dim / 2, page_size] pairs
template <class F>
typename F::Key* page_keys(const PagedAttentionArgs& args, int64_t page, int64_t head) {
  using K = typename F::Key;
  K* keys = reinterpret_cast<K*>(page_of<F>(args, page));
  return keys + head * args.page_size * args.head_dim / F::kPack;
}

// [page_size, head_dim], or [page_size / 2, head_dim] pairs
template <class F>
typename F::Value* page_values(const PagedAttentionArgs& args, int64_t page, int64_t head) {
  using V = typename F::Value;
  V* values = reinterpret_cast<V*>(page_keys<F>(args, page, args.num_kv_heads));
  return values + head * args.page_size * args.head_dim / F::kPack;
}

inline float* page_scales(const PagedAttentionArgs& args, int64_t page, int64_t which, int64_t head) {
  return args.kv_scales + block_index(args, page, which, head) * args.page_size;
}

inline int lanes_left(int64_t i, int64_t n) { return n - i < kLanes ? static_cast<int>(n - i) : kLanes; }

// What brings one head to a root mean square of 1.
inline float rms_scale(const PagedAttentionArgs& args, const float* x) {
  Floats squares = simd::splat(0.0f);
  for (int64_t i = 0; i < args.head_dim; i += kLanes) {
    const Floats v = simd::load_first(x + i, lanes_left(i, args.head_dim));
    squares = simd::fma(v, v, squares);
  }
  const float mean = simd::reduce_add(squares) / static_cast<float>(args.head_dim);
  return 1.0f / std::sqrt(mean + args.norm_eps);
}

// out = rotated(norm(x)) * factor, for one head of one token; `norm` may be null.
inline void rotate(const PagedAttentionArgs& args, int64_t token, const float* x, const float* norm, float factor,
                   float* __restrict out) {
  const int64_t dim = args.head_dim, half = args.rotary_half;
  if (norm != nullptr) {
    const float scale = rms_scale(args, x);
    for (int64_t i = 0; i < dim; ++i) out[i] = x[i] * scale * norm[i];
  } else {
    std::memcpy(out, x, static_cast<size_t>(dim) * sizeof(float));
  }
  const float* __restrict cos = args.cos + token * half;
  const float* __restrict sin = args.sin + token * half;
  float* __restrict second = out + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = out[i], b = second[i];
    out[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
  if (factor != 1.0f)
    for (int64_t i = 0; i < dim; ++i) out[i] *= factor;
}

inline void encode(float* out, const float* x, int64_t dim, float*) {
  std::memcpy(out, x, static_cast<size_t>(dim) * sizeof(float));
}

inline void encode(Half* out, const float* x, int64_t dim, float*) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int n = lanes_left(i, dim);
    simd::store_first(out + i, simd::load_first(x + i, n), n);
  }
}

// Symmetric: x is about out * scale, out at most `most`. One number that is none spoils the scale, and so what is
// computed with it.
template <class Code>
void encode_integers(Code* out, const float* x, int64_t dim, float most, float* scale) {
  Floats largest = simd::splat(0.0f), nothing = simd::splat(0.0f);
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Floats lanes = simd::load_first(x + i, lanes_left(i, dim));
    largest = simd::max(largest, simd::abs(lanes));
    nothing = simd::fma(lanes, simd::splat(0.0f), nothing);  // or NaN
  }
  const float amax = simd::reduce_max(largest);
  *scale = (amax + simd::reduce_add(nothing)) / most;
  const Floats inverse = simd::splat(amax > kLeast ? most / amax : 0.0f);
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int n = lanes_left(i, dim);
    simd::store_first(out + i, simd::load_first(x + i, n) * inverse, n);
  }
}

inline void encode(int8_t* out, const float* x, int64_t dim, float* scale) {
  encode_integers(out, x, dim, 127.0f, scale);
}

// Queries and keys of 16 bits: sums of their products fit 32.
inline float most_of(int64_t dim) { return std::floor(std::sqrt(2147483647.0f / static_cast<float>(dim)) - 0.01f); }

inline void encode(int16_t* out, const float* x, int64_t dim, float* scale) {
  encode_integers(out, x, dim, most_of(dim), scale);
}

// In units of *scale, saturated.
inline void encode(Float8* out, const float* x, int64_t dim, float* scale) {
  const Floats unit = simd::splat(*scale);
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int n = lanes_left(i, dim);
    simd::store_first(out + i, simd::load_first(x + i, n) / unit, n);
  }
}

template <class T>
struct Coded {
  using Element = T;
};
template <>
struct Coded<Pair8> {
  using Element = int8_t;
};
template <>
struct Coded<Pair16> {
  using Element = int16_t;
};

// Tokens [begin, end), at most kWriteTokens, of one kv head: its query heads go to `queries` (rotated and times
// `factor`, one row of head_dim a token and head), its k and v, if there are any, into their pages.
template <class F>
void write_tokens(const PagedAttentionArgs& args, int64_t begin, int64_t end, int64_t head, float factor,
                  typename F::Query* queries, float* units) {
  using K = typename Coded<typename F::Key>::Element;
  using V = typename Coded<typename F::Value>::Element;
  constexpr int64_t pack = F::kPack;
  const int64_t dim = args.head_dim, group = args.num_heads / args.num_kv_heads;
  const int64_t width = (args.num_heads + args.kv_parts * args.num_kv_heads) * dim;
  K keys[kWriteTokens][kMaxHeadDim];
  K* columns[kWriteTokens];
  V codes[kMaxHeadDim];
  float rotated[kMaxHeadDim];
  for (int64_t t = begin; t < end; ++t) {
    const float* token = args.qkv + t * width;
    for (int64_t g = 0; g < group; ++g, queries += dim / pack) {
      const float* query = token + (head * group + g) * dim;
      if constexpr (F::kScaled) {
        rotate(args, t, query, args.q_norm, 1.0f, rotated);
        encode(reinterpret_cast<int16_t*>(queries), rotated, dim, units);
        *units++ *= factor;
      } else {
        rotate(args, t, query, args.q_norm, factor, queries);
      }
    }
    if (args.kv_parts == 0) continue;
    const int64_t page = args.slot_mapping[t] / args.page_size, offset = args.slot_mapping[t] % args.page_size;
    float k_unit = args.k_scale, v_unit = args.v_scale, *k_scale = &k_unit, *v_scale = &v_unit;
    if (F::kScaled) {
      k_scale = page_scales(args, page, kKeys, head) + offset;
      v_scale = page_scales(args, page, kValues, head) + offset;
    }
    rotate(args, t, token + (args.num_heads + head) * dim, args.k_norm, 1.0f, rotated);
    encode(keys[t - begin], rotated, dim, k_scale);
    columns[t - begin] = reinterpret_cast<K*>(page_keys<F>(args, page, head) + offset);
    // With one part, it is both k and v.
    const float* value = token + (args.num_heads + (args.kv_parts - 1) * args.num_kv_heads + head) * dim;
    if (args.v_norm != 0) {
      const float scale = rms_scale(args, value);
      for (int64_t i = 0; i < dim; ++i) rotated[i] = value[i] * scale;
      value = rotated;
    }
    V* values = reinterpret_cast<V*>(page_values<F>(args, page, head));
    if constexpr (pack == 2) {
      encode(codes, value, dim, v_scale);
      values += offset / 2 * 2 * dim + offset % 2;
      for (int64_t i = 0; i < dim; ++i) values[2 * i] = codes[i];
    } else {
      encode(values + offset * dim, value, dim, v_scale);
    }
  }
  if (args.kv_parts == 0) return;
  // Neighbouring tokens share cache lines of a transposed page, so the token loop is the inner one.
  for (int64_t i = 0; i < dim; i += pack)
    for (int64_t t = 0; t < end - begin; ++t)
      for (int64_t p = 0; p < pack; ++p) columns[t][i * args.page_size + p] = keys[t][i + p];
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
