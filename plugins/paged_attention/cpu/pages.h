// How a page lies in the cache: the keys of all its heads, transposed, then their values.
#pragma once

#include <cstdint>

#include "operators.h"
#include "panels.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

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

constexpr int64_t kKeys = 0, kValues = 1;  // the third axis of the scales

// [page_size]
inline float* page_scales(const PagedAttentionArgs& args, int64_t page, int64_t which, int64_t head) {
  const int64_t block = ((args.layer * args.num_pages + page) * 2 + which) * args.num_kv_heads + head;
  return args.kv_scales + block * args.page_size;
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
