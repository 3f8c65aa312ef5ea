// Threads of our own for the tasks of sessions. Between two operators they wait where they run, and while they wait
// they fetch the weights that come next: a decode step is some hundred short products, and reading their weights is
// most of its time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

namespace slipstream {

// Memory that the tasks of a run read once, from front to back; may be empty.
struct Stream {
  const uint8_t* data = nullptr;
  int64_t bytes = 0;
};

class Pool {
 public:
  // The one of this process, which lives as long as that; a forked child has another.
  static Pool& shared();

  // Runs fn(ctx, i) for every i in [0, n) on this thread and up to threads - 1 others, and returns true when all are
  // done; false, with nothing done, while another thread uses the pool.
  bool run(int threads, int64_t n, void (*fn)(void*, int64_t), void* ctx, Stream stream);

  Pool();

 private:
  static constexpr uint64_t kTasks = 0xffffffff;  // the bits of ticket_ that count tasks

  void work(int index);
  bool claim(int64_t* left);
  void grow(int threads);
  void wake();
  void expect(Stream stream);
  bool fetch_ahead();

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;  // held by the thread whose run it is

  // What runs. A task is claimed by counting the lower half of the ticket down; the upper half numbers the runs, so a
  // thread that is late claims nothing of another run, and reads nothing of one that it has no task of.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  void (*fn_)(void*, int64_t) = nullptr;
  void* ctx_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int> threads_{1};
  alignas(64) std::atomic<int64_t> done_{0};

  // What to fetch: [ahead_, ahead_end_), of which threads take a piece each. Addresses, because nothing is read of them:
  // what lies there may be gone.
  alignas(64) std::atomic<uintptr_t> ahead_{0};
  std::atomic<uintptr_t> ahead_end_{0};

  // The streams of the runs of a step, in order, as they were seen last; the next is expected at next_.
  std::vector<Stream> seen_;
  size_t next_ = 0;
  const int64_t most_ahead_;  // bytes

  int workers_ = 0;
  alignas(64) std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
};

}  // namespace slipstream
