// Linear on a CPU: int8 activations times packed integer codes, or float32 ones times dense weights (dense.h), in tiles
// of 16 weight rows.
//
// Of codes, the arithmetic of one output is the same whatever the batch, the block and the thread: along K, for every 32
// elements, an exact integer dot product and sum of weight codes, then fused multiply-adds into a float32 accumulator.
//
// With weights w = s*(c - z) + m and activations x = scale*q + centre, the sum of w*x over 32 elements is
//   s*scale*(sum of (c - z)*q) + centre*s*(sum of c - z) + m*(sum of x).
// The first sum is the dot product; the second belongs to the weight, and is cheaper to add up again for every block
// of tokens than to read from memory; the last belongs to the token.

#include <algorithm>

#include "cpu/parallel.h"
#include "dense.h"
#include "embedding.h"
#include "gate.h"
#include "tiles.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace {

struct Plan {
  const LinearArgs& args;
  PackedWeight weight;
  TileLayout layout;
  const uint8_t* activations;
  int parts;           // tiles of one unit of output: 2 when gated
  int64_t outputs;     // columns of y
  int64_t units;       // 16 columns of y each
  int64_t token_step;  // tokens and units of one task
  int64_t unit_step;

  int64_t block_offset(int64_t token) const { return token * (weight.in_features / kBlock) * kRecordBytes; }
};

// Bias, gate, residual: one token's 16 columns of y, of which `width` exist; the ups are `up` floats behind the gates.
inline __attribute__((always_inline)) void finish_row(const LinearArgs& args, int64_t outputs, float* sums, int64_t up,
                                                      int64_t token, int64_t column, int width) {
  const int64_t at = token * outputs + column;
  if (args.bias) {
    for (int p = 0; p <= args.gated; ++p) {
      for (int i = 0; i < width; ++i) sums[p * up + i] += args.bias[p * outputs + column + i];
    }
  }
  if (args.gated) gate_row(args.gate, sums, sums + up);
  if (args.residual) {
    for (int i = 0; i < width; ++i) sums[i] += args.residual[at + i];
  }
  __builtin_memcpy(args.y + at, sums, sizeof(float) * width);
}

inline void finish_columns(const LinearArgs& args, int64_t outputs, float* sums, int64_t up, int64_t token,
                           int64_t column) {
  if (outputs - column >= kTile) {
    finish_row(args, outputs, sums, up, token, column, kTile);
  } else {
    finish_row(args, outputs, sums, up, token, column, int(outputs - column));
  }
}

// The whole blocks of tokens, where there are enough of them; the first token that is left.
template <class E>
int64_t multiply_expanded_unit(const Plan& plan, int64_t unit, int64_t first_token, int64_t last_token) {
  if constexpr (E::any) {
    constexpr int64_t worth_expanding = 4;  // blocks
    const int64_t count = (last_token - first_token) / kMaxTokens;
    const PackedWeight& weight = plan.weight;
    if (weight.bits != 4 || count < worth_expanding) return first_token;
    static thread_local Scratch scratch;
    alignas(64) float sums[2 * kMaxTokens * kTile];
    const int64_t blocks = weight.in_features / kBlock, bytes = blocks * E::block_bytes;
    uint8_t* tiles = scratch.reserve<uint8_t>(plan.parts * bytes);
    const auto kernels = E::kernels(weight.zero);
    for (int p = 0; p < plan.parts; ++p)
      kernels.expand(tile_at(weight, plan.layout, weight.data, unit * plan.parts + p), tiles + p * bytes);
    for (; last_token - first_token >= kMaxTokens; first_token += kMaxTokens) {
      for (int p = 0; p < plan.parts; ++p)
        kernels.multiply(tiles + p * bytes, blocks, plan.activations + plan.block_offset(first_token),
                         sums + p * kMaxTokens * kTile);
      for (int t = 0; t < kMaxTokens; ++t)
        finish_columns(plan.args, plan.outputs, sums + t * kTile, kMaxTokens * kTile, first_token + t, unit * kTile);
    }
  }
  return first_token;
}

void multiply_unit(const Plan& plan, int64_t unit, int64_t first_token, int64_t last_token) {
  alignas(64) float sums[2 * kMaxTokens * kTile];
  const PackedWeight& weight = plan.weight;
  first_token = multiply_expanded_unit<Expansion>(plan, unit, first_token, last_token);
  for (int64_t token = first_token; token < last_token;) {
    const int tokens = block_tokens(last_token - token);
    const TileKernel kernel = kernel_for(weight, tokens);
    for (int p = 0; p < plan.parts; ++p) {
      const TileArgs tile = tile_at(weight, plan.layout, weight.data, unit * plan.parts + p);
      kernel(tile, plan.activations + plan.block_offset(token), sums + p * tokens * kTile);
    }
    for (int t = 0; t < tokens; ++t) {
      finish_columns(plan.args, plan.outputs, sums + t * kTile, tokens * kTile, token + t, unit * kTile);
    }
    token += tokens;
  }
}

// Cuts the work so that a task's activations stay in the second-level cache and every thread gets several tasks: more of
// them where they are long, as threads that others disturb end together only if what is left to take is little.
void choose_steps(Plan& plan, int threads) {
  constexpr int64_t cache_bytes = 384 << 10;
  constexpr int64_t many_tokens = 64;
  const int64_t tokens = plan.args.tokens, tasks_per_thread = tokens < many_tokens ? 2 : 8;
  const int64_t fitting = std::max<int64_t>(1, cache_bytes / plan.block_offset(1) / kMaxTokens) * kMaxTokens;
  const int64_t token_tasks = (tokens + fitting - 1) / fitting;
  plan.token_step = ((tokens + token_tasks - 1) / token_tasks + kMaxTokens - 1) / kMaxTokens * kMaxTokens;
  const int64_t unit_tasks = (threads * tasks_per_thread + token_tasks - 1) / token_tasks;
  plan.unit_step = std::max<int64_t>(1, plan.units / unit_tasks);
}

void quantize_all(const LinearArgs& args, const Plan& plan, uint8_t* out, Parallel& parallel) {
  constexpr int64_t worth_threads = 1 << 15;  // elements: about 5 microseconds of one thread
  const int64_t tokens = args.tokens;
  const int64_t step = tokens * args.in_features < worth_threads ? tokens : kMaxTokens;
  const auto quantize = [&](int64_t task) {
    const int64_t end = (task + 1) * step < tokens ? (task + 1) * step : tokens;
    for (int64_t token = task * step; token < end;) {
      const int count = block_tokens(end - token);
      quantize_tokens(args, plan.weight, token, count, out + plan.block_offset(token));
      token += count;
    }
  };
  if (step == tokens) {
    quantize(0);
  } else {
    parallel.for_each((tokens + step - 1) / step, [&](int64_t task) { quantize(task); });
  }
}

// x in blocks of tokens, normalised.
void place_all(const LinearArgs& args, int64_t depth, float* out, Parallel& parallel) {
  const int64_t columns = args.in_features;
  parallel.for_each((args.tokens + kDenseTokens - 1) / kDenseTokens, [&](int64_t task) {
    static thread_local Scratch scratch;
    float* normal = args.norm_weight ? scratch.reserve<float>(columns * kDenseTokens) : nullptr;
    const float* rows[kDenseTokens];
    const int64_t end = (task + 1) * kDenseTokens < args.tokens ? (task + 1) * kDenseTokens : args.tokens;
    for (int64_t token = task * kDenseTokens; token < end;) {
      const int count = dense_tokens(end - token);
      for (int i = 0; i < count; ++i) {
        const float* x = args.x + (token + i) * columns;
        rows[i] = normal ? normal + i * columns : x;
        if (normal) normalise(x, args.norm_weight, args.norm_eps, columns, normal + i * columns);
      }
      place_tokens(rows, columns, count, out + token * depth);
      token += count;
    }
  });
}

void linear_dense(const LinearArgs& args, Parallel& parallel) {
  constexpr int64_t tasks_per_thread = 8;
  static thread_local Scratch scratch;
  const DenseWeight weight = dense_weight(args, args.gated != 0);
  const int64_t outputs = args.out_features / weight.parts();
  float* x = scratch.reserve<float>(args.tokens * weight.depth());
  place_all(args, weight.depth(), x, parallel);
  // A task is some pairs of tiles, a gate and an up or neighbours, and the tokens of a segment.
  const int64_t pairs = (weight.tiles() + 1) / 2, segments = (args.tokens + kSegment - 1) / kSegment;
  const int64_t wanted = (parallel.threads() * tasks_per_thread + segments - 1) / segments;
  const int64_t step = (pairs + wanted - 1) / wanted, steps = (pairs + step - 1) / step;
  parallel.for_each(steps * segments, [&](int64_t task) {
    const int64_t first = task / steps * kSegment, pair = task % steps * step;
    const int64_t tokens = args.tokens - first < kSegment ? args.tokens - first : kSegment;
    for (int64_t p = pair; p < pair + step && p < pairs; ++p) {
      const int tiles = 2 * p + 1 < weight.tiles() ? 2 : 1;
      multiply_dense(weight, weight.data, 2 * p, tiles, x + first * weight.depth(), tokens,
                     [&](int64_t token, float* sums, int64_t next) {
                       const int64_t column = (args.gated ? p : 2 * p) * kTile;
                       finish_columns(args, outputs, sums, next, first + token, column);
                       if (tiles == 2 && !args.gated)
                         finish_columns(args, outputs, sums + next, next, first + token, column + kTile);
                     });
    }
  });
}

}  // namespace

void linear(const LinearArgs& args, Parallel& parallel) {
  if (args.tokens == 0) return;
  if (is_dense(args.weight_type)) return linear_dense(args, parallel);
  static thread_local Scratch scratch;
  const PackedWeight weight = packed_weight(args, args.gated != 0);
  const int parts = weight.gated ? 2 : 1;
  const int64_t outputs = weight.out_features / parts;
  Plan plan{args, weight, TileLayout(weight), nullptr, parts, outputs, (outputs + kTile - 1) / kTile, 0, 0};
  uint8_t* activations = scratch.reserve<uint8_t>(plan.block_offset(args.tokens));
  plan.activations = activations;
  quantize_all(args, plan, activations, parallel);
  choose_steps(plan, parallel.threads());
  const int64_t unit_tasks = (plan.units + plan.unit_step - 1) / plan.unit_step;
  const int64_t token_tasks = (args.tokens + plan.token_step - 1) / plan.token_step;
  parallel.for_each(unit_tasks * token_tasks, [&](int64_t task) {
    const int64_t token = task / unit_tasks * plan.token_step;
    const int64_t unit = task % unit_tasks * plan.unit_step;
    const int64_t last_token = token + plan.token_step < args.tokens ? token + plan.token_step : args.tokens;
    const int64_t last_unit = unit + plan.unit_step < plan.units ? unit + plan.unit_step : plan.units;
    for (int64_t u = unit; u < last_unit; ++u) multiply_unit(plan, u, token, last_token);
  });
}

void embedding(const EmbeddingArgs& args, Parallel& parallel) {
  constexpr int64_t step = 4;
  const PackedWeight packed = packed_weight(args, false);
  const DenseWeight dense = dense_weight(args, false);
  parallel.for_each((args.tokens + step - 1) / step, [&](int64_t task) {
    const int64_t last = (task + 1) * step < args.tokens ? (task + 1) * step : args.tokens;
    for (int64_t t = task * step; t < last; ++t) {
      float* y = args.y + t * args.in_features;
      is_dense(args.weight_type) ? decode_row(dense, args.token_ids[t], y) : decode_row(packed, args.token_ids[t], y);
    }
  });
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
