// The largest logit of each row. Threads share every row, each a run of columns: as the head's product was shared, so
// that a thread finds in its caches what it wrote.
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "cpu/scratch.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace {

struct Top {
  float logit;
  int32_t token;  // -1 where the logit is not finite
};

Top top_of(const float* x, int64_t first, int64_t end) {
  float largest = -INFINITY;
  int64_t block = 0;
  const float peak = find_peak(x + first, end - first, [&](int64_t b, float top) {
    if (top > largest) largest = top, block = b;
  });
  if (!std::isfinite(peak)) return {peak, -1};
  int64_t i = first + block * kBlock;
  while (x[i] != peak) ++i;
  return {peak, int32_t(i)};
}

// Of neighbours in the order of their tokens.
Top top_of(const Top* parts, int64_t count) {
  Top top{-INFINITY, -1};
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(parts[i].logit)) return parts[i];
    if (parts[i].logit > top.logit) top = parts[i];
  }
  return top;
}

}  // namespace

void top_token(const TopTokenArgs& args, Parallel& parallel) {
  constexpr int64_t worth_a_task = 1 << 15;  // logits: about as long as another thread takes to begin
  constexpr int64_t tasks_per_thread = 2;
  static thread_local Scratch scratch;
  const int64_t blocks = (args.vocab + kBlock - 1) / kBlock;
  const int64_t worth = args.rows * args.vocab / worth_a_task, most = parallel.threads() * tasks_per_thread;
  const int64_t wanted = std::min({std::max<int64_t>(worth, 1), most, blocks});
  const int64_t step = (blocks + wanted - 1) / wanted * kBlock, tasks = (args.vocab + step - 1) / step;
  Top* parts = scratch.reserve<Top>(args.rows * tasks);
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t first = task * step, end = std::min(first + step, args.vocab);
    for (int64_t row = 0; row < args.rows; ++row)
      parts[row * tasks + task] = top_of(args.logits + row * args.vocab, first, end);
  });
  for (int64_t row = 0; row < args.rows; ++row) {
    const Top top = top_of(parts + row * tasks, tasks);
    args.token[row] = top.token;
    args.logit[row] = top.logit;
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
