// What the C++ kernels for CPUs share: a loop over work items on XLA's threads, and a value in all lanes.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

// Calls work(item) for each item from 0 to total - 1, on this thread and on XLA's others as they are free; returns when
// all are done.
template <typename Work>
void parallel_for(xla::ffi::ThreadPool& threads, int64_t total, Work work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  // by value: a thread may come when all is done and the caller's frame is gone; then it reads `next` and `total` only
  auto help = [progress, total, work]() {
    int64_t item;
    while ((item = progress->next.fetch_add(1)) < total) {
      work(item);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), total) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    auto copy = help;
    threads.Schedule(std::move(copy));
  }
  help();
  while (progress->done.load(std::memory_order_acquire) < total) std::this_thread::yield();
}

// A vector of the compiler's own kind with `value` in each lane. Not `Vec{} + value`: that sum would be computed for
// each vector, since it is not the same for -0.
template <typename Vec, int... I>
inline Vec spread(float value, std::integer_sequence<int, I...>) {
  return Vec{(static_cast<void>(I), value)...};
}
