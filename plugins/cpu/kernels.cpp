// The table of instruction sets, and C entry points that run one kernel without a session: to sample, and for tests
// and benchmarks.
#include "cpu/kernels.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>

namespace slipstream {

#define SLIPSTREAM_KERNEL(Name, function) void function(const Name##Args&, Parallel&);
#define SLIPSTREAM_ASSIGN(Name, function) kernels.function = function;
#define SLIPSTREAM_TABLE(name)                \
  namespace name {                            \
  SLIPSTREAM_OPERATORS(SLIPSTREAM_KERNEL)     \
  static Kernels table() {                    \
    Kernels kernels{};                        \
    kernels.isa = #name;                      \
    SLIPSTREAM_OPERATORS(SLIPSTREAM_ASSIGN)   \
    return kernels;                           \
  }                                           \
  }

SLIPSTREAM_TABLE(generic)
#if defined(__x86_64__)
SLIPSTREAM_TABLE(avx2)
SLIPSTREAM_TABLE(avx512)
#endif

static std::vector<Kernels> usable_kernels() {
  std::vector<Kernels> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    kernels.push_back(avx512::table());
  if (avx2) kernels.push_back(avx2::table());
#endif
  kernels.push_back(generic::table());
  return kernels;
}

std::vector<Kernels>& all_kernels() {
  static std::vector<Kernels> kernels = usable_kernels();
  return kernels;
}

static const Kernels* find_kernels(const char* isa) {
  if (isa == nullptr) return &all_kernels().front();
  for (const Kernels& kernels : all_kernels())
    if (std::strcmp(kernels.isa, isa) == 0) return &kernels;
  return nullptr;
}

std::atomic<int> session_threads{1};

// Tasks on threads of their own, without a session.
class ThreadParallel final : public Parallel {
 public:
  explicit ThreadParallel(int threads) : threads_(threads) {}

  void run(int64_t n, void (*fn)(void*, int64_t), void* ctx) override {
    std::atomic<int64_t> next{0};
    auto work = [&] {
      for (int64_t i = next++; i < n; i = next++) fn(ctx, i);
    };
    std::vector<std::thread> pool;
    for (int t = 1; t < threads_; ++t) pool.emplace_back(work);
    work();
    for (std::thread& thread : pool) thread.join();
  }
  int threads() const override { return threads_; }

 private:
  int threads_;
};

}  // namespace slipstream

// How many threads sessions run on; a hint for splitting work.
SLIPSTREAM_EXPORT void slipstream_set_threads(int threads) { slipstream::session_threads = threads < 1 ? 1 : threads; }

// Comma-separated instruction sets this machine can run, the preferred one first, then best first. The text is the
// calling thread's until it asks again.
SLIPSTREAM_EXPORT const char* slipstream_isas() {
  static thread_local std::string names;
  names.clear();
  for (const auto& kernels : slipstream::all_kernels()) names += (names.empty() ? "" : ",") + std::string(kernels.isa);
  return names.c_str();
}

// Makes sessions run the kernels of the named instruction set and returns 0, or 1 for an unknown name. To be called
// before any kernel runs.
SLIPSTREAM_EXPORT int slipstream_prefer(const char* isa) {
  const auto* found = slipstream::find_kernels(isa);
  if (found == nullptr) return 1;
  const std::string name = found->isa;
  auto& kernels = slipstream::all_kernels();
  kernels = slipstream::usable_kernels();
  std::stable_partition(kernels.begin(), kernels.end(), [&](const auto& each) { return each.isa == name; });
  return 0;
}

// One a kernel: runs that of the named instruction set (null: the first) and returns 0, or 1 for an unknown name.
#define SLIPSTREAM_ENTRY(Name, function)                                                                         \
  SLIPSTREAM_EXPORT int slipstream_##function(const slipstream::Name##Args* args, const char* isa, int threads) { \
    const auto* kernels = slipstream::find_kernels(isa);                                                         \
    if (kernels == nullptr) return 1;                                                                            \
    slipstream::ThreadParallel parallel(threads);                                                                \
    kernels->function(*args, parallel);                                                                          \
    return 0;                                                                                                    \
  }
SLIPSTREAM_OPERATORS(SLIPSTREAM_ENTRY)
