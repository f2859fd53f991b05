// SPDX-License-Identifier: Apache-2.0
/// Timing on a machine that others use too.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace support {

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
inline double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

/// The share of its threads that a program is given at the moment: every thread watches the clock for a tenth of a second,
/// and what passes between two looks longer than a few microseconds was somebody else's.
inline double availability(int threads) {
  std::atomic<double> own{0};
  constexpr double span = 0.1, gap = 20e-6;
  const auto watch = [&] {
    const double start = seconds();
    double mine = 0;
    for (double last = start, now; last - start < span; last = now) {
      now = seconds();
      if (now - last < gap) mine += now - last;
    }
    own += mine;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(watch);
  watch();
  for (auto& t : others) t.join();
  return own / (span * threads);
}

/// Waits, but not for ever, until the threads are there; false where they never were.
inline bool wait_for_quiet(int threads, int tries) {
  for (; tries > 0; --tries)
    if (availability(threads) >= 0.93) return true;
  return false;
}

struct pair_of_times {
  double a, b;  ///< medians of one call, in seconds
  bool quiet;
};

/// Times f and g in turn, each long enough to be measured, `rounds` times. Both are called with a counter of calls.
template <class F, class G>
pair_of_times interleaved(int threads, int rounds, int tries, F f, G g) {
  int calls[2] = {0, 0};
  const auto time = [&](auto& h, int which, int n) {
    const double start = seconds();
    for (int i = 0; i < n; ++i) h(calls[which]++);
    return (seconds() - start) / n;
  };
  const double once = std::max(time(f, 0, 1), time(g, 1, 1));
  const int n = std::max(1, static_cast<int>(0.05 / once));
  std::vector<double> a, b;
  int noisy = 0;
  for (int r = 0; r < rounds; ++r) {
    noisy += !wait_for_quiet(threads, tries);
    a.push_back(time(f, 0, n));
    b.push_back(time(g, 1, n));
  }
  return {median(a), median(b), 2 * noisy < rounds};
}

}  // namespace support
