// The experts of each token. A row of logits is short, so plain loops do; sums are in double.
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// The scores of a token, and by what it chooses.
void score(const RouterArgs& args, const float* logits, float* scores, float* chosen_by) {
  const int64_t n = args.experts;
  if (args.scoring == 1) {
    for (int64_t e = 0; e < n; ++e) scores[e] = float(1.0 / (1.0 + std::exp(-double(logits[e]))));
  } else {
    float top = kNever;
    for (int64_t e = 0; e < n; ++e) top = logits[e] > top ? logits[e] : top;
    double sum = 0.0;
    for (int64_t e = 0; e < n; ++e) sum += std::exp(double(logits[e]) - top);
    for (int64_t e = 0; e < n; ++e) scores[e] = float(std::exp(double(logits[e]) - top) / sum);
  }
  for (int64_t e = 0; e < n; ++e) chosen_by[e] = scores[e] + (args.correction ? args.correction[e] : 0.0f);
}

// The place of the largest value that is not taken, the first of equal ones; a NaN only where nothing else is left, so
// that every token has experts.
int64_t best(const float* values, const uint8_t* taken, int64_t n) {
  int64_t found = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (taken[i]) continue;
    const bool first = found < 0 || (values[found] != values[found] && values[i] == values[i]);
    if (first || values[i] > values[found]) found = i;
  }
  return found;
}

// Takes the experts of all groups but the best.
void leave_groups(const RouterArgs& args, const float* chosen_by, float* sums, uint8_t* left, uint8_t* taken) {
  const int64_t size = args.experts / args.groups;
  for (int64_t g = 0; g < args.groups; ++g) {
    float first = kNever, second = kNever;
    for (int64_t i = 0; i < size; ++i) {
      const float value = chosen_by[g * size + i];
      if (value > first) {
        second = first;
        first = value;
      } else if (value > second) {
        second = value;
      }
    }
    sums[g] = first + second;
    left[g] = 0;
  }
  for (int64_t i = 0; i < args.top_groups; ++i) left[best(sums, left, args.groups)] = 1;
  for (int64_t e = 0; e < args.experts; ++e) taken[e] = !left[e / size];
}

void route(const RouterArgs& args, int64_t token) {
  static thread_local Scratch numbers, marks;
  const int64_t n = args.experts;
  float* scores = numbers.reserve<float>(3 * n);
  float* chosen_by = scores + n;
  uint8_t* taken = marks.reserve<uint8_t>(2 * n);
  score(args, args.logits + token * n, scores, chosen_by);
  for (int64_t e = 0; e < n; ++e) taken[e] = 0;
  if (args.groups > 1) leave_groups(args, chosen_by, chosen_by + n, taken + n, taken);
  int32_t* ids = args.expert_ids + token * args.top_k;
  float* weights = args.expert_weights + token * args.top_k;
  double sum = 0.0;
  for (int64_t k = 0; k < args.top_k; ++k) {
    const int64_t expert = best(chosen_by, taken, n);
    taken[expert] = 1;
    ids[k] = int32_t(expert);
    weights[k] = scores[expert];
    sum += scores[expert];
  }
  const double factor = args.renormalize ? args.scale / (sum + 1e-20) : args.scale;
  for (int64_t k = 0; k < args.top_k; ++k) weights[k] = float(weights[k] * factor);
}

}  // namespace

void router(const RouterArgs& args, Parallel& parallel) {
  constexpr int64_t step = 16;  // tokens of a task: some microseconds
  parallel.for_each((args.tokens + step - 1) / step, [&](int64_t task) {
    const int64_t last = (task + 1) * step < args.tokens ? (task + 1) * step : args.tokens;
    for (int64_t token = task * step; token < last; ++token) route(args, token);
  });
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
