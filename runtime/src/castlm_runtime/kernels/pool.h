// Threads that help with a loop if they come in time. The caller waits for parts that are being worked on, and
// never for a thread that has not started: on a machine that others use too, an OpenMP region waits until the last of
// its threads has been scheduled, which takes longer than a token.

#pragma once

#include <pthread.h>

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

class Pool {
 public:
  // Calls `take` here and on up to `helpers` threads, until it has returned everywhere. `take` shares out the work.
  template <class Take>
  void run(int64_t helpers, Take& take) {
    const std::unique_lock<std::mutex> only(callers_, std::try_to_lock);
    if (helpers <= 0 || !only.owns_lock()) return take();  // another thread of Python's has the helpers
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start(helpers);
      job_ = &take;
      call_ = [](void* job) { (*static_cast<Take*>(job))(); };
      wanted_ = helpers;
      jobs_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load() > 0) wake_.notify_all();
    take();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // who has not started will not
    }
    while (inside_.load(std::memory_order_acquire) > 0) pause();
  }

  // The pool of this process; a child of fork has one of its own, for it has no threads but one.
  static Pool& of_process() {
    static Pool* pool = [] {
      pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
      return current() = new Pool;
    }();
    (void)pool;
    return *current();
  }

 private:
  static constexpr int64_t kMostHelpers = 255;
  static constexpr auto kSpin = std::chrono::microseconds(100);  // between the layers of a model

  static Pool*& current() {
    static Pool* pool = nullptr;
    return pool;
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  void start(int64_t helpers) {
    try {
      for (; threads_ < helpers && threads_ < kMostHelpers; ++threads_) std::thread([this] { help(); }).detach();
    } catch (const std::exception&) {  // no more threads, or no memory for one: those that run share the work
    }
  }

  void help() {
    for (uint64_t seen = 0;;) {
      seen = next_job(seen);
      void* job;
      void (*call)(void*);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!job_ || wanted_ == 0) continue;
        --wanted_;
        job = job_, call = call_;
        inside_.fetch_add(1);
      }
      call(job);
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
        pause();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return jobs_.load() != seen; });
    asleep_.fetch_sub(1);
    return jobs_.load();
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> jobs_{0};
  std::atomic<int64_t> inside_{0}, asleep_{0};
  void* job_ = nullptr;
  void (*call_)(void*) = nullptr;
  int64_t wanted_ = 0, threads_ = 0;
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
  Pool::of_process().run(std::min(threads, (count + part - 1) / part) - 1, take);
  if (error) std::rethrow_exception(error);
}

}  // namespace castlm
