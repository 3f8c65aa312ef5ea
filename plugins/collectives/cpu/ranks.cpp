#include "collectives/cpu/ranks.h"

#include <climits>
#include <memory>
#include <thread>

#include "cpu/kernels.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slipstream {
namespace {

constexpr int kSpins = 2000;  // some tens of microseconds: what the others are usually behind

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Whether a line has come to a turn; numbers begin anew after 2^32.
bool reached(const RankLine& line, uint32_t turn) {
  return static_cast<int32_t>(line.turn.load(std::memory_order_seq_cst) - turn) >= 0;
}

void sleep_until_changed(RankLine& line, uint32_t seen) {
#if defined(__linux__)
  // Not private: the threads are of several processes. A change since `seen` was read ends it at once.
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&line.turn), FUTEX_WAIT, seen, nullptr, nullptr, 0);
#else
  (void)line, (void)seen;
  std::this_thread::yield();
#endif
}

void wake(RankLine& line) {
#if defined(__linux__)
  if (line.waiting.load(std::memory_order_seq_cst) != 0)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&line.turn), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)line;
#endif
}

void wait_for(RankLine& line, uint32_t turn) {
  for (int i = 0; i < kSpins; ++i) {
    if (reached(line, turn)) return;
    pause();
  }
  line.waiting.fetch_add(1, std::memory_order_seq_cst);
  for (uint32_t seen = line.turn.load(); !reached(line, turn); seen = line.turn.load()) sleep_until_changed(line, seen);
  line.waiting.fetch_sub(1, std::memory_order_seq_cst);
}

thread_local std::unique_ptr<Ranks> joined;

}  // namespace

Ranks::Ranks(void* memory, int64_t bytes, int64_t rank, int64_t count)
    : lines_(static_cast<RankLine*>(memory)),
      slots_(reinterpret_cast<float*>(lines_ + count)),
      rank_(rank),
      count_(count),
      capacity_((bytes - count * int64_t(sizeof(RankLine))) / (2 * count * int64_t(sizeof(float)))),
      turn_(lines_[rank].turn.load() + 1) {}

float* Ranks::slot(int64_t rank) const { return slots_ + ((turn_ & 1) * count_ + rank) * capacity_; }

void Ranks::meet() {
  lines_[rank_].turn.store(turn_, std::memory_order_seq_cst);
  wake(lines_[rank_]);
  for (int64_t rank = 0; rank < count_; ++rank)
    if (rank != rank_) wait_for(lines_[rank], turn_);
}

Ranks* joined_ranks() { return joined.get(); }

const char* check_ranks(int64_t count) {
  if (joined == nullptr) return "the thread that runs the session has joined no ranks";
  if (joined->count() != count) return "the graph is of another number of ranks than have been joined";
  return nullptr;
}

}  // namespace slipstream

SLIPSTREAM_EXPORT int slipstream_join_ranks(void* memory, int64_t bytes, int64_t rank, int64_t count) {
  slipstream::joined.reset();
  if (count == 0) return 0;
  auto ranks = std::make_unique<slipstream::Ranks>(memory, bytes, rank, count);
  if (ranks->capacity() < 1) return 1;
  slipstream::joined = std::move(ranks);
  return 0;
}
