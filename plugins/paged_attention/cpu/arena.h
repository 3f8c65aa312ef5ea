// Room for the arrays of one call or task, in memory that a thread keeps: once it has grown, a step allocates nothing.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

class Arena {
 public:
  // Makes room for `bytes` in all and forgets what was taken before.
  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    data_ = memory_.reserve<char>(bytes + bytes / 2);
    size_ = bytes + bytes / 2;
  }

  // Room for `count` of T, on a cache line of its own; its contents are undefined.
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(data_ + used_);
    used_ += room<T>(count);
    return taken;
  }

  // Bytes that take<T>(count) uses.
  template <class T>
  static int64_t room(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }

 private:
  static constexpr int64_t kAlign = 64;  // that of Scratch
  Scratch memory_;
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
