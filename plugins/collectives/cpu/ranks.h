// Ranks compute one step together. Each is a thread of a process of its own (tests have several in one), and what they
// give each other lies in memory that all of them map: a line of 64 bytes a rank, then two slots of floats a rank.
//
// A rank writes into one of its slots, says so in its line, and waits until all have: a turn. It writes into that slot
// again two turns later, which none can begin before all have read what lies there. So one meeting a turn is enough.
#pragma once

#include <atomic>
#include <cstdint>

namespace slipstream {

struct alignas(64) RankLine {
  std::atomic<uint32_t> turn;     // the last one that its rank has written for; whoever maps the memory may read it
  std::atomic<uint32_t> waiting;  // threads that sleep until it changes
};

class Ranks {
 public:
  Ranks(void* memory, int64_t bytes, int64_t rank, int64_t count);

  int64_t count() const { return count_; }
  int64_t capacity() const { return capacity_; }  // floats of a slot
  // The slot of a rank for the turn that comes next, or for the one that has come since this rank met the others.
  float* slot(int64_t rank) const;
  // Own slot has been written: wait until that of every rank has.
  void meet();
  // All that is wanted of the slots has been read.
  void part() { ++turn_; }
  float* own() const { return slot(rank_); }

 private:
  RankLine* lines_;
  float* slots_;
  int64_t rank_, count_, capacity_;
  uint32_t turn_;
};

// Those that the calling thread computes with; null for none.
Ranks* joined_ranks();

// Why a node for so many ranks cannot run in the calling thread; null if it can.
const char* check_ranks(int64_t count);

}  // namespace slipstream

// Makes the calling thread a rank of `count`, whose common memory of that size began as zeros; returns 0, or 1 where it
// holds no slots. A count of 0 makes it none again.
extern "C" int slipstream_join_ranks(void* memory, int64_t bytes, int64_t rank, int64_t count);
