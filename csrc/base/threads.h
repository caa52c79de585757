// Work shared out to threads that live for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace pgolf {

// Calls work(item, worker) once for every item in [0, count), each worker in a thread of its own taking the next item
// that nobody has. `worker` is below max(1, min(threads, count)); the calling thread is worker 0. `work` must not
// throw.
template <class Work>
void share_out(int64_t count, int threads, Work work) {
  std::atomic<int64_t> next{0};
  const auto serve = [&](int worker) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item, worker);
  };
  std::vector<std::thread> pool;
  const int helpers = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(threads, count) - 1));
  pool.reserve(helpers);
  for (int worker = 1; worker <= helpers; ++worker) {
    try {
      pool.emplace_back(serve, worker);
    } catch (const std::exception&) {  // no more threads, or no memory for one
      break;
    }
  }
  serve(0);
  for (std::thread& each : pool) each.join();
}

}  // namespace pgolf
