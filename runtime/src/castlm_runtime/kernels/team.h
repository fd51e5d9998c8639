// The threads of this process that compute, in two ways.
//
// `in_parallel` shares out a loop: threads help if they come in time. The caller waits for parts that are being worked on, and
// never for a thread that has not started: on a machine that others use too, an OpenMP region waits until the last of its
// threads has been scheduled.
//
// `Team::walk` is one parallel region for a whole pass through a model. A token is some 150 steps, each of a few microseconds:
// to hand each of them to threads takes as long as the step. So every thread walks all steps and takes its own fixed share of
// each, with a barrier between steps; and a thread reads the same weights from token to token, which its cache may keep. A thread
// that waits at a barrier spins, and yields its core after a while, at once where there are more threads than cores.

#pragma once

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace castlm {

inline void pause_thread() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Cores that this process may use.
inline int64_t cores_here() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

// What the threads of one walk share.
class Walkers {
 public:
  Walkers(int64_t size, int64_t spins) : size_(size), spins_(spins) {}

  int64_t size() const { return size_; }
  int64_t barriers() const { return round_.load(std::memory_order_relaxed); }

  // Returns when all threads have come; what they wrote before is visible then.
  void barrier() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t i = 0; round_.load(std::memory_order_acquire) == round; ++i) {
      if (failed_.load(std::memory_order_relaxed)) throw Stopped();
      if (i < spins_) pause_thread();
      else std::this_thread::yield();
    }
  }

  // Runs a thread's part of the walk. After an exception the others leave at their next barrier.
  template <class Walk>
  void run(Walk& walk, int64_t rank) {
    try {
      walk(*this, rank);
    } catch (const Stopped&) {
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct Stopped {};
  const int64_t size_, spins_;
  // Each in a cache line of its own: a thread that arrives does not take away the line that others wait on.
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

class Team {
 public:
  // Calls `take` here and on up to `helpers` threads, until it has returned everywhere. `take` shares out the work.
  template <class Take>
  void run(int64_t helpers, Take& take) {
    const std::unique_lock<std::mutex> only(callers_, std::try_to_lock);
    if (helpers <= 0 || !only.owns_lock()) return take();  // another thread of Python's has the helpers
    post(&take, [](void* job, int64_t) { (*static_cast<Take*>(job))(); }, helpers, false);
    take();
    finish();
  }

  // Calls `walk(walkers, rank)` on `threads` threads, here with rank 0; a helper has the same rank each time. Fewer threads
  // walk where no more can be started, or where another thread of Python's has them. Throws what one of them threw.
  // Returns the number of barriers.
  template <class Walk>
  int64_t walk(int64_t threads, Walk& walk) {
    const std::unique_lock<std::mutex> only(callers_, std::try_to_lock);
    const int64_t helpers = only.owns_lock() ? start(threads - 1) : 0;
    Walkers walkers(helpers + 1, helpers < cores_ ? kBarrierSpins : 0);
    struct Job {
      Walkers& walkers;
      Walk& walk;
    } job{walkers, walk};
    if (helpers) {
      post(&job, [](void* at, int64_t rank) {
        auto& [walkers_of, walk_of] = *static_cast<Job*>(at);
        walkers_of.run(walk_of, rank);
      }, helpers, true);
    }
    walkers.run(walk, 0);
    if (helpers) {
      while (wanted_.load(std::memory_order_acquire) > 0) std::this_thread::yield();  // after an exception some may come late
      finish();
    }
    walkers.rethrow();
    return walkers.barriers();
  }

  // The team of this process; a child of fork has one of its own, for it has no threads but one.
  static Team& of_process() {
    static Team* team = [] {
      pthread_atfork(nullptr, nullptr, [] { current() = new Team; });
      return current() = new Team;
    }();
    (void)team;
    return *current();
  }

 private:
  static constexpr int64_t kMostHelpers = 255;
  static constexpr int64_t kBarrierSpins = 400;                   // some 10 microseconds
  static constexpr auto kSpin = std::chrono::microseconds(100);  // after a job, before a thread falls asleep

  static Team*& current() {
    static Team* team = nullptr;
    return team;
  }

  // Starts threads until there are `helpers`; returns how many of them there are.
  int64_t start(int64_t helpers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    helpers = std::min(helpers, kMostHelpers);
    try {
      for (; threads_ < helpers; ++threads_) std::thread([this, number = threads_] { help(number); }).detach();
    } catch (const std::exception&) {  // no more threads, or no memory for one: those that run share the work
    }
    return std::max<int64_t>(0, std::min(helpers, threads_));
  }

  // Offers a job to `helpers` threads: to those that come first, or (`all`) to the first ones, all of which must come.
  void post(void* job, void (*call)(void*, int64_t), int64_t helpers, bool all) {
    if (!all) start(helpers);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = job, call_ = call, all_ = all, size_ = helpers;
      wanted_.store(helpers, std::memory_order_relaxed);
      jobs_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load() > 0) wake_.notify_all();
  }

  void finish() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // who has not started will not
    }
    while (inside_.load(std::memory_order_acquire) > 0) pause_thread();
  }

  void help(int64_t number) {
    for (uint64_t seen = 0;;) {
      seen = next_job(seen);
      void* job;
      void (*call)(void*, int64_t);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!job_ || wanted_.load(std::memory_order_relaxed) == 0 || (all_ && number >= size_)) continue;
        wanted_.fetch_sub(1, std::memory_order_release);
        job = job_, call = call_;
        inside_.fetch_add(1);
      }
      call(job, number + 1);
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Waits for a job after number `seen`: spinning for a while, then asleep.
  uint64_t next_job(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        const uint64_t jobs = jobs_.load(std::memory_order_acquire);
        if (jobs != seen) return jobs;
        pause_thread();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return jobs_.load() != seen; });
    asleep_.fetch_sub(1);
    return jobs_.load();
  }

  const int64_t cores_ = cores_here();
  std::mutex callers_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> jobs_{0};
  std::atomic<int64_t> inside_{0}, asleep_{0}, wanted_{0};
  void* job_ = nullptr;
  void (*call_)(void*, int64_t) = nullptr;
  bool all_ = false;
  int64_t size_ = 0, threads_ = 0;
};

// `work(first, last)` for parts of [0, count), `part` long, on as many threads. The first exception in any of them arrives
// here, when all have returned; parts that nobody has started are left out then.
template <class Work>
void in_parallel(int64_t count, int64_t part, int64_t threads, Work work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  auto take = [&] {
    try {
      for (int64_t first = next.fetch_add(part); first < count && !failed; first = next.fetch_add(part))
        work(first, std::min(first + part, count));
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  Team::of_process().run(std::min(threads, (count + part - 1) / part) - 1, take);
  if (error) std::rethrow_exception(error);
}

}  // namespace castlm
