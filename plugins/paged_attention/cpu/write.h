// The first phase: q and k through norm and rotary embedding, and this step's k and v into their pages.
#pragma once

#include <cstdint>

#include "codes.h"
#include "operators.h"
#include "pages.h"
#include "rotary.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kWriteTokens = 32;  // tokens of one writing task

// The v head of one token into its slot of a page.
template <class F>
void write_value(const PagedAttentionArgs& args, const float* value, int64_t offset, typename F::Value* values,
                 float* scale) {
  using Code = typename Coded<typename F::Value>::Code;
  const int64_t dim = args.head_dim;
  float normed[kMaxHeadDim];
  if (args.v_norm != 0) {
    const float factor = rms_scale(args, value);
    for (int64_t i = 0; i < dim; ++i) normed[i] = value[i] * factor;
    value = normed;
  }
  if constexpr (F::kPack == 2) {
    Code codes[kMaxHeadDim];
    encode(codes, value, dim, scale);
    Code* out = reinterpret_cast<Code*>(values + offset / 2 * dim) + offset % 2;
    for (int64_t i = 0; i < dim; ++i) out[2 * i] = codes[i];
  } else {
    encode(values + offset * dim, value, dim, scale);
  }
}

// Tokens [begin, end), at most kWriteTokens, of one kv head: its query heads go to `queries` (rotated and times
// `factor`, one row of head_dim a token and head), its k and v, if there are any, into their pages.
template <class F>
void write_tokens(const PagedAttentionArgs& args, int64_t begin, int64_t end, int64_t head, float factor,
                  typename F::Query* queries, float* units) {
  using Code = typename Coded<typename F::Key>::Code;
  constexpr int64_t pack = F::kPack;
  const int64_t dim = args.head_dim, group = args.num_heads / args.num_kv_heads;
  const int64_t width = (args.num_heads + args.kv_parts * args.num_kv_heads) * dim;
  Code keys[kWriteTokens][kMaxHeadDim];
  Code* columns[kWriteTokens];
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
    columns[t - begin] = reinterpret_cast<Code*>(page_keys<F>(args, page, head) + offset);
    // With one part, it is both k and v.
    const float* value = token + (args.num_heads + (args.kv_parts - 1) * args.num_kv_heads + head) * dim;
    write_value<F>(args, value, offset, page_values<F>(args, page, head), v_scale);
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
