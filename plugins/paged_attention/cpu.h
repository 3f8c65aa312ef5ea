// Attention over a paged KV cache on a CPU. The operator's spec in __init__.py says what it computes.
#pragma once

#include <cstdint>

#include "../cpu/parallel.h"

namespace slipstream {

// Element type of the pages.
enum class KVType : int32_t { f32 = 0, f16 = 1, i8 = 2, e4m3 = 3 };

// All arrays are dense and row-major, in the shapes of the operator's spec. native.py mirrors this struct.
struct PagedAttentionArgs {
  const float* qkv;             // [tokens, (num_heads + 2 num_kv_heads) head_dim]
  const float* cos;             // [tokens, rotary_half]
  const float* sin;             // [tokens, rotary_half]
  void* kv_cache;               // [layers, num_pages, 2, num_kv_heads, page_size head_dim]
  float* kv_scales;             // [layers, num_pages, 2, num_kv_heads, page_size], int8 pages only
  const int32_t* query_start;   // [sequences + 1]
  const int32_t* context_len;   // [sequences]
  const int32_t* page_table;    // [sequences, max_pages]
  const int32_t* slot_mapping;  // [tokens]
  const float* q_norm;          // [head_dim] or null
  const float* k_norm;          // [head_dim] or null
  const float* sinks;           // [num_heads] or null
  float* output;                // [tokens, num_heads head_dim]
  int64_t tokens;
  int64_t sequences;
  int64_t max_pages;       // columns of page_table
  int64_t num_pages;       // pages in the cache
  int64_t rotary_half;     // half the width of a head that is rotated
  int64_t layer;
  int64_t num_heads;
  int64_t num_kv_heads;    // divides num_heads
  int64_t head_dim;        // a multiple of 8, at most 256
  int64_t page_size;       // a multiple of 16
  int64_t sliding_window;  // keys a query sees, itself included; 0: all
  KVType kv_type;
  float scale;
  float soft_cap;  // 0: none
  float norm_eps;
  float k_scale;  // the unit of the codes in pages of e4m3; 1 with all others
  float v_scale;
};

}  // namespace slipstream
