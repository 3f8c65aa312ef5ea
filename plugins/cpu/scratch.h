// Memory for what a kernel makes on its way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace slipstream {
namespace SLIPSTREAM_ISA {

// Memory that a thread keeps between calls, aligned to cache lines.
class Scratch {
 public:
  ~Scratch() { release(); }

  template <class T>
  T* reserve(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T);
    if (bytes > capacity_) {
      release();
      data_ = ::operator new(bytes, std::align_val_t(64));
      capacity_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr;
    capacity_ = 0;
  }

  void* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
