// Products with the weights of experts: rows are grouped by expert, then each group is a Linear of its own.
//
// The arithmetic of one output is that of Linear (linear/cpu/kernel.cpp), the same whatever else is in the batch:
// groups and blocks of tokens change who computes a row, never how.

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "linear/cpu/activations.h"
#include "linear/cpu/dense.h"
#include "linear/cpu/gate.h"
#include "linear/cpu/tiles.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace {

struct Plan {
  const ExpertLinearArgs& args;
  PackedWeight weight;  // that of the first expert
  TileLayout layout;
  DenseWeight numbers;  // the same where it is dense
  bool dense;
  int parts;            // tiles of one unit of output: 2 when gated
  int64_t outputs;      // columns of a product
  int64_t units;        // 16 columns of a product each
  int64_t expert_bytes;
  // A pair is a token and one of its experts, `token * top_k + slot`. Pairs are in the order of their experts; those of
  // expert e are places starts[e] to starts[e + 1].
  int64_t* order;
  int64_t* starts;
  int64_t* used;        // experts with pairs
  int64_t used_count;
  uint8_t* records;     // rows as the kernels read them, by place
  int64_t record_bytes;
  float* products;      // [pairs, outputs], by pair

  int64_t pairs() const { return args.tokens * args.top_k; }
  const float* row(int64_t pair) const { return args.x + (args.reduce ? pair : pair / args.top_k) * args.in_features; }
  uint8_t* record(int64_t place) const { return records + place * record_bytes; }
  float* floats(int64_t place) const { return reinterpret_cast<float*>(record(place)); }
};

void group_pairs(Plan& plan) {
  const ExpertLinearArgs& args = plan.args;
  for (int64_t e = 0; e <= args.experts; ++e) plan.starts[e] = 0;
  for (int64_t p = 0; p < plan.pairs(); ++p) ++plan.starts[args.expert_ids[p] + 1];
  plan.used_count = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    if (plan.starts[e + 1] > 0) plan.used[plan.used_count++] = e;
    plan.starts[e + 1] += plan.starts[e];
  }
  for (int64_t p = 0; p < plan.pairs(); ++p) plan.order[plan.starts[args.expert_ids[p]]++] = p;
  for (int64_t e = args.experts; e > 0; --e) plan.starts[e] = plan.starts[e - 1];
  plan.starts[0] = 0;
}

void quantize_expert(const Plan& plan, int64_t expert) {
  const int64_t end = plan.starts[expert + 1];
  for (int64_t place = plan.starts[expert]; place < end;) {
    const int count = block_tokens(end - place);
    for (int i = 0; i < count; ++i) {
      quantize_token(plan.weight, plan.row(plan.order[place + i]), count, i, plan.record(place));
    }
    place += count;
  }
}

void place_expert(const Plan& plan, int64_t expert) {
  const int64_t end = plan.starts[expert + 1];
  for (int64_t place = plan.starts[expert]; place < end;) {
    const int count = dense_tokens(end - place);
    const float* rows[kDenseTokens];
    for (int i = 0; i < count; ++i) rows[i] = plan.row(plan.order[place + i]);
    place_tokens(rows, plan.args.in_features, count, plan.floats(place));
    place += count;
  }
}

// Bias and gate of one pair's 16 columns, of which `width` exist; the ups are `up` floats behind the gates.
void finish_row(const Plan& plan, float* sums, int64_t up, int64_t expert, int64_t pair, int64_t column, int width) {
  const ExpertLinearArgs& args = plan.args;
  if (args.bias) {
    const float* bias = args.bias + expert * args.out_features + column;
    for (int p = 0; p < plan.parts; ++p) {
      for (int i = 0; i < width; ++i) sums[p * up + i] += bias[p * plan.outputs + i];
    }
  }
  if (plan.parts == 2) gate_row(args.gate, sums, sums + up);
  __builtin_memcpy(plan.products + pair * plan.outputs + column, sums, sizeof(float) * width);
}

void multiply_unit(const Plan& plan, int64_t expert, int64_t unit) {
  alignas(64) float sums[2 * kMaxTokens * kTile];
  const PackedWeight& weight = plan.weight;
  const int64_t column = unit * kTile, end = plan.starts[expert + 1];
  const int width = int(plan.outputs - column < kTile ? plan.outputs - column : kTile);
  for (int64_t place = plan.starts[expert]; place < end;) {
    const int count = block_tokens(end - place);
    const TileKernel kernel = kernel_for(weight, count);
    for (int p = 0; p < plan.parts; ++p) {
      const uint8_t* blob = weight.data + expert * plan.expert_bytes;
      const TileArgs tile = tile_at(weight, plan.layout, blob, unit * plan.parts + p);
      kernel(tile, plan.record(place), sums + p * count * kTile);
    }
    for (int t = 0; t < count; ++t) {
      finish_row(plan, sums + t * kTile, count * kTile, expert, plan.order[place + t], column, width);
    }
    place += count;
  }
}

// Tile by tile, or where there is a gate two by two.
void multiply_dense_unit(const Plan& plan, int64_t expert, int64_t unit) {
  const int64_t column = unit * kTile, start = plan.starts[expert], count = plan.starts[expert + 1] - start;
  const int width = int(plan.outputs - column < kTile ? plan.outputs - column : kTile);
  const uint8_t* blob = plan.numbers.data + expert * plan.expert_bytes;
  multiply_dense(plan.numbers, blob, unit * plan.parts, plan.parts, plan.floats(start), count,
                 [&](int64_t token, float* sums, int64_t next) {
                   finish_row(plan, sums, next, expert, plan.order[start + token], column, width);
                 });
}

// Several tasks a thread, so that a popular expert does not leave the others waiting.
int64_t units_of_a_task(const Plan& plan, int threads) {
  constexpr int64_t tasks_per_thread = 4;
  const int64_t wanted = (threads * tasks_per_thread + plan.used_count - 1) / plan.used_count;
  const int64_t step = (plan.units + wanted - 1) / wanted;
  return step < 1 ? 1 : step;
}

void multiply(const Plan& plan, Parallel& parallel) {
  parallel.for_each(plan.used_count, [&](int64_t i) {
    plan.dense ? place_expert(plan, plan.used[i]) : quantize_expert(plan, plan.used[i]);
  });
  const int64_t step = units_of_a_task(plan, parallel.threads());
  const int64_t tasks = (plan.units + step - 1) / step;
  parallel.for_each(plan.used_count * tasks, [&](int64_t task) {
    const int64_t expert = plan.used[task / tasks], first = task % tasks * step;
    const int64_t last = first + step < plan.units ? first + step : plan.units;
    for (int64_t unit = first; unit < last; ++unit) {
      plan.dense ? multiply_dense_unit(plan, expert, unit) : multiply_unit(plan, expert, unit);
    }
  });
}

// y of a token: its products times their weights, in the order of its experts, plus the residual.
void add_up(const Plan& plan, int64_t token) {
  const ExpertLinearArgs& args = plan.args;
  const float* products = plan.products + token * args.top_k * plan.outputs;
  const float* weights = args.expert_weights + token * args.top_k;
  float* y = args.y + token * plan.outputs;
  for (int64_t i = 0; i < plan.outputs; ++i) {
    float sum = 0.0f;
    for (int64_t k = 0; k < args.top_k; ++k) sum += weights[k] * products[k * plan.outputs + i];
    y[i] = args.residual ? sum + args.residual[token * plan.outputs + i] : sum;
  }
}

}  // namespace

void expert_linear(const ExpertLinearArgs& args, Parallel& parallel) {
  if (args.tokens == 0) return;
  static thread_local Scratch places, records, products;
  const bool dense = is_dense(args.weight_type);
  const int parts = args.gated ? 2 : 1;
  const PackedWeight weight = packed_weight(args, args.gated != 0);
  const DenseWeight numbers = dense_weight(args, args.gated != 0);
  const int64_t outputs = args.out_features / parts, pairs = args.tokens * args.top_k;
  Plan plan{args, weight, dense ? TileLayout() : TileLayout(weight), numbers, dense, parts, outputs,
            (outputs + kTile - 1) / kTile, blob_bytes(args, args.gated != 0), nullptr, nullptr, nullptr, 0, nullptr,
            dense ? numbers.depth() * int64_t(sizeof(float)) : args.in_features / kBlock * kRecordBytes, args.y};
  plan.order = places.reserve<int64_t>(pairs + 2 * args.experts + 1);
  plan.starts = plan.order + pairs;
  plan.used = plan.starts + args.experts + 1;
  plan.records = records.reserve<uint8_t>(pairs * plan.record_bytes);
  if (args.reduce) plan.products = products.reserve<float>(pairs * outputs);
  group_pairs(plan);
  multiply(plan, parallel);
  if (args.reduce) parallel.for_each(args.tokens, [&](int64_t token) { add_up(plan, token); });
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
