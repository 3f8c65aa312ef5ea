#include "cpu/pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <thread>

namespace slipstream {

namespace {

constexpr size_t kMostSeen = 4096;       // streams of a step; of more none is expected
constexpr uintptr_t kPiece = 512;       // bytes that a waiting thread fetches before it looks for a task again
constexpr int kPausesAPiece = 2;
constexpr int kPausesBetweenLooks = 64;  // at the clock, and for others that want this core
constexpr auto kAwake = std::chrono::milliseconds(4);  // longer than a decode loop needs between two steps

std::atomic<Pool*> process_pool{nullptr};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A quarter of the last cache: what waits there must not push out what is in use.
int64_t cache_share() {
  long bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes / 4 : 1 << 20;
}

}  // namespace

Pool& Pool::shared() {
  Pool* pool = process_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  static std::mutex making;
  const std::lock_guard<std::mutex> lock(making);
  pool = process_pool.load(std::memory_order_acquire);
  if (pool == nullptr) {
    // Never freed: its threads outlive everything. A child has none of them.
    static const int once = pthread_atfork(nullptr, nullptr, [] { process_pool.store(nullptr); });
    (void)once;
    pool = new Pool;
    process_pool.store(pool, std::memory_order_release);
  }
  return *pool;
}

Pool::Pool() : most_ahead_(cache_share()) {}

bool Pool::run(int threads, int64_t n, void (*fn)(void*, int64_t), void* ctx, Stream stream) {
  if (n > int64_t(kTasks) || busy_.test_and_set(std::memory_order_acquire)) return false;
  if (stream.bytes > 0) expect(stream);
  grow(threads);
  fn_ = fn;
  ctx_ = ctx;
  tasks_ = n;
  threads_.store(threads, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  const uint64_t number = (ticket_.load(std::memory_order_relaxed) | kTasks) + 1;
  ticket_.store(number | uint64_t(n));
  if (asleep_.load() > 0) wake();
  int64_t finished = 0, left = 0;
  for (; claim(&left); ++finished) fn(ctx, n - left);
  done_.fetch_add(finished, std::memory_order_acq_rel);
  for (int turns = 0; done_.load(std::memory_order_acquire) < n; ++turns) {
    pause();
    if (turns % 1024 == 1023) sched_yield();  // who has the last task may wait for this core
  }
  busy_.clear(std::memory_order_release);
  return true;
}

// Of the tasks of this moment's run, how many were left with this one.
bool Pool::claim(int64_t* left) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while ((ticket & kTasks) != 0) {
    if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      *left = int64_t(ticket & kTasks);
      return true;
    }
  }
  return false;
}

void Pool::grow(int threads) {
  for (; workers_ < threads - 1; ++workers_) {
    try {
      std::thread([this, index = workers_] { work(index); }).detach();
    } catch (const std::system_error&) {
      return;  // as many as there can be; the tasks are done without it
    }
  }
}

void Pool::wake() {
  { const std::lock_guard<std::mutex> lock(mutex_); }  // whoever is about to sleep has seen the ticket or sleeps
  awake_.notify_all();
}

void Pool::work(int index) {
  using Clock = std::chrono::steady_clock;
  const auto wanted = [&] {
    return (ticket_.load() & kTasks) != 0 && index < threads_.load(std::memory_order_relaxed) - 1;
  };
  Clock::time_point since = Clock::now();
  for (int turn = 1;; ++turn) {
    if (wanted()) {
      int64_t left = 0;
      while (claim(&left)) {
        fn_(ctx_, tasks_ - left);
        done_.fetch_add(1, std::memory_order_acq_rel);
      }
      since = Clock::now();
      turn = 0;
    }
    if (fetch_ahead()) continue;
    pause();
    if (turn % kPausesBetweenLooks != 0) continue;
    if (Clock::now() - since < kAwake) {
      sched_yield();
      continue;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    awake_.wait(lock, wanted);
    asleep_.fetch_sub(1);
  }
}

// Learns that a run reads `stream`, and lets waiting threads fetch what was read after it the last time.
void Pool::expect(Stream stream) {
  const auto same = [&](const Stream& other) { return other.data == stream.data; };
  if (next_ >= seen_.size() || !same(seen_[next_])) {
    next_ = size_t(std::find_if(seen_.begin(), seen_.end(), same) - seen_.begin());
    if (next_ == seen_.size()) {
      if (seen_.size() == kMostSeen) seen_.clear(), next_ = 0;
      seen_.push_back(stream);
    }
  }
  seen_[next_].bytes = stream.bytes;
  next_ = (next_ + 1) % seen_.size();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(seen_[next_].data);
  uintptr_t end = begin;
  for (size_t i = next_; i < seen_.size() && reinterpret_cast<uintptr_t>(seen_[i].data) == end; ++i) {
    end += uintptr_t(seen_[i].bytes);
    if (int64_t(end - begin) >= most_ahead_) break;
  }
  end = std::min(end, begin + uintptr_t(most_ahead_));
  const uintptr_t fetched = ahead_.load(std::memory_order_relaxed);
  ahead_end_.store(end, std::memory_order_relaxed);
  if (fetched < begin || fetched > end + kPiece) ahead_.store(begin, std::memory_order_relaxed);
}

// Fetches a piece, if there is one.
bool Pool::fetch_ahead() {
  const uintptr_t end = ahead_end_.load(std::memory_order_relaxed);
  if (ahead_.load(std::memory_order_relaxed) >= end) return false;
  const uintptr_t piece = ahead_.fetch_add(kPiece, std::memory_order_relaxed);
  for (uintptr_t line = piece; line < piece + kPiece && line < end; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
  // A processor that has many on their way drops others.
  for (int i = 0; i < kPausesAPiece; ++i) pause();
  return true;
}

}  // namespace slipstream
