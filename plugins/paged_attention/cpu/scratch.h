// Memory that a thread keeps between calls, so that a step allocates nothing once it has grown.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Makes room for `bytes` in all and forgets what was taken before.
  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + bytes / 2 + kAlign - 1) / kAlign * kAlign;
    data_ = static_cast<char*>(std::aligned_alloc(kAlign, static_cast<size_t>(size_)));
    if (data_ == nullptr) std::abort();
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
  static constexpr int64_t kAlign = 64;
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
