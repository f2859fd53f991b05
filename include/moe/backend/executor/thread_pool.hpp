// SPDX-License-Identifier: Apache-2.0
/// Threads of one's own, for a program that is not compiled with OpenMP or wants to say how many it uses.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "moe/core/config.hpp"
#include "moe/core/error.hpp"
#include "moe/core/executor.hpp"

namespace moe {

/// A fixed number of threads, the caller among them, that take the ranges of a for_each from one counter. Models Executor;
/// a backend holds a `pool_executor`.
///
/// A thread without work spins for a while before it sleeps, so for_each after for_each costs well under a microsecond.
/// (A pool of more threads than the machine has sleeps at once.) for_each allocates nothing. Inside a task it runs
/// serially; called from several threads it serves one after the other. A task that throws ends the program.
class thread_pool {
 public:
  explicit thread_pool(int threads = hardware_threads()) : spins_(threads <= hardware_threads()) {
    if (threads < 1) throw shape_error("thread_pool: threads is " + std::to_string(threads) + ", expected at least 1");
    workers_.reserve(static_cast<std::size_t>(threads - 1));
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;
  ~thread_pool() { stop(); }

  int concurrency() const noexcept { return static_cast<int>(workers_.size()) + 1; }

  template <class F>
  void for_each(dim n, dim grain, F&& f) const noexcept {
    MOE_ASSERT(n >= 0 && grain > 0);
    const dim ranges = n / grain + (n % grain != 0);
    if (ranges < 2 || workers_.empty() || inside_task()) return serial{}.for_each(n, grain, f);
    auto task = [&f](dim first, dim last) { f(first, last); };
    run({n, grain, ranges, &task, [](void* t, dim first, dim last) { (*static_cast<decltype(task)*>(t))(first, last); }});
  }

 private:
  struct job {
    dim n = 0, grain = 0, ranges = 0;
    void* task = nullptr;
    void (*call)(void* task, dim first, dim last) = nullptr;
  };

  static int hardware_threads() noexcept {
    const unsigned n = std::thread::hardware_concurrency();
    return n > 0 ? static_cast<int>(n) : 1;
  }
  static bool& inside_task() noexcept {
    static thread_local bool inside = false;
    return inside;
  }

  void run(const job& j) const noexcept {
    const std::lock_guard turn(turn_);
    inside_task() = true;
    job_ = j;
    unfinished_.store(j.ranges, std::memory_order_relaxed);
    untaken_.store(j.ranges);  // publishes the job
    if (sleepers_.load() > 0) wake();
    finish(take_ranges());
    await();
    inside_task() = false;
  }

  // Who takes a range may read the job: it is not replaced before that range is reported as finished. The counter may
  // fall below zero; only a positive value is a range.
  dim take_ranges() const noexcept {
    dim taken = 0;
    for (dim left; (left = untaken_.fetch_sub(1)) > 0; ++taken) {
      const dim first = (job_.ranges - left) * job_.grain, last = first + job_.grain;
      job_.call(job_.task, first, last < job_.n ? last : job_.n);
    }
    return taken;
  }

  void finish(dim ranges) const noexcept {
    if (ranges == 0 || unfinished_.fetch_sub(ranges) != ranges || !caller_sleeps_.load()) return;
    { const std::lock_guard lock(mutex_); }  // the caller is now either before its test or in its wait
    done_.notify_one();
  }

  void await() const noexcept {
    const auto done = [this] { return unfinished_.load() == 0; };
    if (spin_until(done)) return;
    std::unique_lock lock(mutex_);
    caller_sleeps_.store(true);
    done_.wait(lock, done);
    caller_sleeps_.store(false);
  }

  void work() const noexcept {
    inside_task() = true;
    for (;;) {
      if (spin_until([this] { return untaken_.load() > 0; })) finish(take_ranges());
      else if (!sleep()) return;
    }
  }

  // Until the next job. A sleeper counts itself before it looks for work, a caller publishes work before it looks for
  // sleepers, both in the one order of all sequentially consistent operations: one of them sees the other.
  bool sleep() const noexcept {
    std::unique_lock lock(mutex_);
    if (stopped_) return false;
    sleepers_.fetch_add(1);
    if (untaken_.load() > 0) {
      sleepers_.fetch_sub(1);
      return true;
    }
    const auto seen = wakes_;
    work_.wait(lock, [&] { return stopped_ || wakes_ != seen; });
    return !stopped_;
  }

  void wake() const noexcept {
    {
      const std::lock_guard lock(mutex_);
      ++wakes_;
      sleepers_.store(0);
    }
    work_.notify_all();
  }

  void stop() noexcept {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    work_.notify_all();
    for (auto& w : workers_) w.join();
  }

  template <class Ready>
  bool spin_until(Ready ready) const noexcept {
    if (ready()) return true;
    if (!spins_) return false;
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    do {
      for (int i = 0; i < 64; ++i) {
        if (ready()) return true;
        detail::spin_pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  // One line of the cache: what a worker polls and what it then needs.
  alignas(64) mutable std::atomic<dim> untaken_{0};
  mutable job job_;
  alignas(64) mutable std::atomic<dim> unfinished_{0};
  alignas(64) mutable std::atomic<int> sleepers_{0};
  mutable std::atomic<bool> caller_sleeps_{false};
  mutable unsigned wakes_ = 0;  // this and stopped_ under mutex_
  bool stopped_ = false;
  const bool spins_;
  mutable std::mutex turn_, mutex_;
  mutable std::condition_variable work_, done_;
  std::vector<std::thread> workers_;
};

/// A thread_pool as a backend holds it: by value. The pool outlives it.
class pool_executor {
 public:
  pool_executor(const thread_pool& pool) noexcept : pool_(&pool) {}
  pool_executor(const thread_pool&&) = delete;

  int concurrency() const noexcept { return pool_->concurrency(); }
  template <class F>
  void for_each(dim n, dim grain, F&& f) const noexcept {
    pool_->for_each(n, grain, f);
  }

 private:
  const thread_pool* pool_;
};

}  // namespace moe
