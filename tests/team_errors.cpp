// An exception of a helper thread of the kernels' team arrives in the caller, and the team works on, in a shared loop and in a
// walk whose other threads wait at a barrier: built and run by test_inference_kernels.py. Ends with 0 where that holds.

#include <new>

#include "../runtime/src/castlm_runtime/kernels/team.h"

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
    for (int64_t failing = 0; failing < 4; ++failing) {
      arrived = false;
      const auto fail = [&](castlm::Walkers& team, int64_t rank) {
        for (int step = 0; step < 100; ++step) {
          if (rank == failing && step == 50) throw std::bad_alloc();
          team.barrier();
        }
      };
      try {
        castlm::Team::of_process().walk(4, fail);
      } catch (const std::bad_alloc&) {
        arrived = true;
      }
      if (!arrived) return 2;
    }
    std::atomic<int64_t> sum{0};
    const auto add = [&](castlm::Walkers& team, int64_t rank) {
      for (int64_t step = 0; step < 1000; ++step) {
        sum += rank;
        team.barrier();
        if (sum != (step + 1) * 6) throw std::exception();
        team.barrier();
      }
    };
    if (castlm::Team::of_process().walk(4, add) != 2000 || sum != 6000) return 3;
  }
  return 0;
}
