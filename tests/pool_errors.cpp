// An exception of a helper thread of the kernels' pool arrives in the caller, and the pool works on: built and run by
// test_inference_kernels.py. Ends with 0 where that holds.

#include <new>

#include "../src/castlm/core/pool.h"

int main() {
  const std::thread::id caller = std::this_thread::get_id();
  for (int round = 0; round < 3; ++round) {
    std::atomic<int> started{0};
    bool arrived = false;
    try {
      castlm::in_parallel(2, 1, 2, [&](int64_t, int64_t) {
        started++;
        while (started < 2) std::this_thread::yield();  // one part on each thread
        if (std::this_thread::get_id() != caller) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      arrived = true;
    }
    if (!arrived) return 1;
  }
  return 0;
}
