// SPDX-License-Identifier: Apache-2.0
/// Timing on a machine that others use too.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace bench {

/// Seconds of a contestant's turn, where a call takes less.
inline constexpr double turn = 0.1;

/// How many threads the library and Eigen have.
inline void use_threads([[maybe_unused]] int n) {
#if defined(_OPENMP)
  omp_set_num_threads(n);
#endif
}

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
inline double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

/// Runs f(thread) on `threads` threads, which all start at once; returns the seconds until the last is done.
inline double together(int threads, const std::function<void(int)>& f) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  const auto wait_and_run = [&](int thread) {
    ++ready;
    while (!go) {
    }
    f(thread);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(wait_and_run, i);
  while (ready < threads - 1) {
  }
  const double start = seconds();
  go = true;
  f(0);
  for (auto& t : others) t.join();
  return seconds() - start;
}

/// The share of its threads that a program is given at the moment: every thread watches the clock for a tenth of a second,
/// and what passes between two looks longer than a few microseconds was somebody else's.
inline double availability(int threads) {
  constexpr double span = 0.1, gap = 20e-6;
  std::vector<double> own(static_cast<std::size_t>(threads));
  together(threads, [&](int thread) {
    const double start = seconds();
    double mine = 0;
    for (double last = start, now; last - start < span; last = now) {
      now = seconds();
      if (now - last < gap) mine += now - last;
    }
    own[static_cast<std::size_t>(thread)] = mine;
  });
  double sum = 0;
  for (const double mine : own) sum += mine;
  return sum / (span * threads);
}

/// Waits, but not for ever, until the threads are there; false where they never were.
inline bool wait_for_quiet(int threads, int tries) {
  for (; tries > 0; --tries)
    if (availability(threads) >= 0.93) return true;
  return false;
}

}  // namespace bench
