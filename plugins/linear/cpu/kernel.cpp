// Quantized Linear on a CPU: int8 activations times packed integer codes, tiles of 16 weight rows.
//
// The arithmetic of one output is the same whatever the batch, the block and the thread: along K, for every 32
// elements, an exact integer dot product and sum of weight codes, then fused multiply-adds into a float32 accumulator.
//
// With weights w = s*(c - z) + m and activations x = scale*q + centre, the sum of w*x over 32 elements is
//   s*scale*(sum of (c - z)*q) + centre*s*(sum of c - z) + m*(sum of x).
// The first sum is the dot product; the second belongs to the weight, and is cheaper to add up again for every block
// of tokens than to read from memory; the last belongs to the token.

#include "cpu/parallel.h"
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

// Bias, gate, residual: one token's 16 columns, of which `width` exist.
inline __attribute__((always_inline)) void finish_row(const Plan& plan, float* sums, int64_t up, int64_t token,
                                                      int64_t column, int width) {
  const LinearArgs& args = plan.args;
  const int64_t at = token * plan.outputs + column;
  if (args.bias) {
    for (int p = 0; p < plan.parts; ++p) {
      for (int i = 0; i < width; ++i) sums[p * up + i] += args.bias[p * plan.outputs + column + i];
    }
  }
  if (plan.parts == 2) gate_row(args.gate, sums, sums + up);
  if (args.residual) {
    for (int i = 0; i < width; ++i) sums[i] += args.residual[at + i];
  }
  __builtin_memcpy(args.y + at, sums, sizeof(float) * width);
}

void multiply_unit(const Plan& plan, int64_t unit, int64_t first_token, int64_t last_token) {
  alignas(64) float sums[2 * kMaxTokens * kTile];
  const PackedWeight& weight = plan.weight;
  const int64_t column = unit * kTile;
  const int width = int(plan.outputs - column < kTile ? plan.outputs - column : kTile);
  for (int64_t token = first_token; token < last_token;) {
    const int tokens = block_tokens(last_token - token);
    const TileKernel kernel = kernel_for(weight, tokens);
    for (int p = 0; p < plan.parts; ++p) {
      const TileArgs tile = tile_at(weight, plan.layout, weight.data, unit * plan.parts + p);
      kernel(tile, plan.activations + plan.block_offset(token), sums + p * tokens * kTile);
    }
    for (int t = 0; t < tokens; ++t) {
      float* row = sums + t * kTile;
      if (width == kTile) {
        finish_row(plan, row, tokens * kTile, token + t, column, kTile);
      } else {
        finish_row(plan, row, tokens * kTile, token + t, column, width);
      }
    }
    token += tokens;
  }
}

// Cuts the work so that a task's activations stay in the second-level cache and every thread gets several tasks.
void choose_steps(Plan& plan, int threads) {
  constexpr int64_t cache_bytes = 384 << 10;
  constexpr int64_t tasks_per_thread = 2;
  const int64_t tokens = plan.args.tokens;
  const int64_t fitting = cache_bytes / plan.block_offset(1) / kMaxTokens * kMaxTokens;
  plan.token_step = fitting < kMaxTokens ? kMaxTokens : fitting;
  const int64_t token_tasks = (tokens + plan.token_step - 1) / plan.token_step;
  const int64_t unit_tasks = (threads * tasks_per_thread + token_tasks - 1) / token_tasks;
  plan.unit_step = plan.units / unit_tasks;
  if (plan.unit_step < 1) plan.unit_step = 1;
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

}  // namespace

void linear(const LinearArgs& args, Parallel& parallel) {
  if (args.tokens == 0) return;
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
  const PackedWeight weight = packed_weight(args, false);
  parallel.for_each((args.tokens + step - 1) / step, [&](int64_t task) {
    const int64_t last = (task + 1) * step < args.tokens ? (task + 1) * step : args.tokens;
    for (int64_t t = task * step; t < last; ++t) {
      decode_row(weight, args.token_ids[t], args.y + t * weight.in_features);
    }
  });
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
