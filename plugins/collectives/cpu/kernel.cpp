// Sums over ranks, and columns of all ranks side by side. x goes through the slots of the ranks piece by piece; every
// rank adds up all of it by itself, in the order of the ranks.
#include <algorithm>
#include <cstring>

#include "collectives/cpu/ranks.h"
#include "cpu/parallel.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // floats of a task

// Calls visit(start, count) for the pieces of x that fit a slot; between copying one there and the next, all ranks have
// written theirs and none has yet written another.
template <class Visit>
void exchange(const float* x, int64_t total, Parallel& parallel, Visit&& visit) {
  Ranks& ranks = *joined_ranks();
  for (int64_t start = 0; start < total; start += ranks.capacity()) {
    const int64_t count = std::min(ranks.capacity(), total - start);
    float* own = ranks.own();
    parallel.for_each((count + kBlock - 1) / kBlock, [&](int64_t block) {
      const int64_t first = block * kBlock;
      std::memcpy(own + first, x + start + first, std::min(kBlock, count - first) * sizeof(float));
    });
    ranks.meet();
    parallel.for_each((count + kBlock - 1) / kBlock, [&](int64_t block) {
      const int64_t first = block * kBlock;
      visit(ranks, start, first, std::min(kBlock, count - first));
    });
    ranks.part();
  }
}

}  // namespace

void all_reduce(const AllReduceArgs& args, Parallel& parallel) {
  exchange(args.x, args.rows * args.columns, parallel, [&](const Ranks& ranks, int64_t start, int64_t first, int64_t count) {
    float* y = args.y + start + first;
    std::memcpy(y, ranks.slot(0) + first, count * sizeof(float));
    for (int64_t rank = 1; rank < ranks.count(); ++rank) {
      const float* x = ranks.slot(rank) + first;
      for (int64_t i = 0; i < count; ++i) y[i] += x[i];
    }
  });
}

void all_gather(const AllGatherArgs& args, Parallel& parallel) {
  const int64_t columns = args.columns, width = args.ranks * columns;
  exchange(args.x, args.rows * columns, parallel, [&](const Ranks& ranks, int64_t start, int64_t first, int64_t count) {
    // What lies there are ends of rows and whole ones.
    for (int64_t at = start + first, end = at + count; at < end;) {
      const int64_t row = at / columns, column = at % columns, run = std::min(columns - column, end - at);
      for (int64_t rank = 0; rank < ranks.count(); ++rank)
        std::memcpy(args.y + row * width + rank * columns + column, ranks.slot(rank) + (at - start), run * sizeof(float));
      at += run;
    }
  });
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
