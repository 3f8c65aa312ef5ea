// How a kernel runs its tasks: on ONNX Runtime's own pool inside a session, on std::thread without one.
#pragma once

#include <cstdint>
#include <type_traits>

namespace slipstream {

struct Parallel {
  // Calls fn(ctx, i) for every i in [0, n), in any order and on any thread; returns when all are done.
  virtual void run(int64_t n, void (*fn)(void* ctx, int64_t i), void* ctx) = 0;
  // Threads that may run tasks at the same time; a hint for splitting work, never for results.
  virtual int threads() const = 0;

  template <class F>
  void for_each(int64_t n, F&& f) {
    using Task = std::remove_reference_t<F>;
    run(n, [](void* ctx, int64_t i) { (*static_cast<Task*>(ctx))(i); }, const_cast<void*>(static_cast<const void*>(&f)));
  }

 protected:
  ~Parallel() = default;
};

}  // namespace slipstream
