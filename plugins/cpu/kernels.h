// The kernels of one instruction set, and the choice among those this machine can run.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/parallel.h"
#include "operators.h"

#define SLIPSTREAM_EXPORT extern "C" __attribute__((visibility("default")))

namespace slipstream {

struct Kernels {
  const char* isa;
#define SLIPSTREAM_FIELD(Name, function) void (*function)(const Name##Args&, Parallel&);
  SLIPSTREAM_OPERATORS(SLIPSTREAM_FIELD)
#undef SLIPSTREAM_FIELD
};

// Those for this machine, best first unless one is preferred; never empty. Sessions run the first.
std::vector<Kernels>& all_kernels();

// How many threads sessions run on; a hint for splitting work.
extern std::atomic<int> session_threads;

}  // namespace slipstream
