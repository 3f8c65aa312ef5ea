// What PagedAttention checks of a call beyond its spec.
#include "operators.h"

namespace slipstream {

static const char* check_attributes(const PagedAttentionArgs& args) {
  if (args.k_row_major != 0) return "a CPU reads transposed keys: k_row_major must be 0";
  if (args.head_dim % 8 != 0) return "head_dim must be a multiple of 8";
  if (args.page_size % 16 != 0) return "page_size must be a multiple of 16";
  if (args.num_heads % args.num_kv_heads != 0) return "num_kv_heads must divide num_heads";
  if (args.layer >= args.layers) return "layer is outside kv_cache";
  if (args.rotary_half > args.head_dim / 2) return "more of a head is rotated than it has";
  const bool bytes = args.kv_cache_type == ElementType::uint8;  // 16-bit keys and 8-bit values
  if (args.planes != (bytes ? 3 : 2)) return "kv_cache must have 2 planes, or 3 of uint8";
  if ((bytes || args.kv_cache_type == ElementType::int8) && args.kv_scales == nullptr)
    return "pages of integers need kv_scales, one for each token and head";
  if (args.kv_cache_type == ElementType::float8e4m3fn && !(args.k_scale > 0 && args.v_scale > 0))
    return "k_scale and v_scale must be positive";
  return nullptr;
}

static const char* check_sequence(const PagedAttentionArgs& args, int64_t s) {
  const int64_t length = args.context_len[s], used = (length + args.page_size - 1) / args.page_size;
  const int64_t queries = int64_t{args.query_start[s + 1]} - args.query_start[s];
  if (queries < 0 || queries > length || used > args.max_pages)
    return "context_len does not fit its queries or page_table";
  for (int64_t p = 0; p < used; ++p) {
    const int32_t page = args.page_table[s * args.max_pages + p];
    if (page < 0 || page >= args.num_pages) return "page_table names a page outside kv_cache";
  }
  return nullptr;
}

// A wrong page would be read or written outside the cache, so every one that the step uses is checked.
const char* check(const PagedAttentionArgs& args) {
  if (const char* problem = check_attributes(args)) return problem;
  if (args.query_start[0] != 0 || args.query_start[args.sequences] != args.tokens)
    return "query_start does not cover the tokens";
  for (int64_t t = 0; t < args.tokens; ++t)
    if (args.slot_mapping[t] < 0 || args.slot_mapping[t] >= args.num_pages * args.page_size)
      return "a slot is outside kv_cache";
  for (int64_t s = 0; s < args.sequences; ++s)
    if (const char* problem = check_sequence(args, s)) return problem;
  return nullptr;
}

}  // namespace slipstream
