// SPDX-License-Identifier: Apache-2.0
/// Timing on a machine that others use too.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <iterator>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace bench {

/// Seconds of a contestant's turn, where a call takes less: neighbours come and go within milliseconds.
inline constexpr double turn = 0.01;

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

/// Keeps the compiler from leaving out what nobody reads.
template <class T>
void keep(const T& value) {
#if defined(__GNUC__)
  __asm__ volatile("" : : "m"(value) : "memory");
#else
  static volatile unsigned char sink;
  sink = *reinterpret_cast<const volatile unsigned char*>(&value);
#endif
}

/// Runs f(thread) on `threads` threads, which all start at once; returns the seconds until the last is done. They are those
/// of OpenMP where there are such: these wait for their next work in a loop, in which new ones would disturb them.
inline double together(int threads, const std::function<void(int)>& f) {
  double start = 0;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
#pragma omp barrier
#pragma omp master
    start = seconds();
    f(omp_get_thread_num());
  }
#else
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i)
    others.emplace_back([&, i] {
      ++ready;
      while (!go) {
      }
      f(i);
    });
  while (ready < threads - 1) {
  }
  start = seconds();
  go = true;
  f(0);
  for (auto& t : others) t.join();
#endif
  return seconds() - start;
}

/// Whether nobody disturbs the threads at this moment: together they come to 90 % of the most operations a second that they
/// ever came to. Who runs on the other hyperthread of a core takes half of its speed, or more, and no clock shows it.
bool undisturbed(int threads);

/// The turns of one contestant. It wants `rounds` undisturbed ones, but not for ever.
class turn_record {
 public:
  explicit turn_record(int rounds) : rounds_(rounds) {}

  bool complete() const {
    return std::ssize(undisturbed_) >= rounds_ || (std::ssize(all_) >= few() && spent_ >= patience * rounds_);
  }
  /// Takes a turn, `f()`, which returns the seconds of a call, as soon as the threads are undisturbed. `elsewhere`: it runs
  /// in another process; what waits for work in a loop, here or there, gets time to fall asleep.
  template <class F>
  void take(int threads, bool elsewhere, F f) {
    const double start = seconds();
    bool quiet = undisturbed(threads);
    while (!quiet && seconds() - start < wait) quiet = undisturbed(threads);
    if (elsewhere) rest();
    all_.push_back(f());
    if (undisturbed(threads) && quiet) undisturbed_.push_back(all_.back());
    if (elsewhere) rest();
    spent_ += seconds() - start;
  }
  /// Enough turns were undisturbed.
  bool quiet() const { return std::ssize(undisturbed_) >= few(); }
  /// The median of those, or of all where they are too few.
  double time() const { return median(quiet() ? undisturbed_ : all_); }

 private:
  static constexpr double wait = 0.1, patience = 0.2;  // seconds before a turn, and of a round
  static void rest() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }
  int few() const { return std::min(3, rounds_); }

  int rounds_;
  std::vector<double> all_, undisturbed_;
  double spent_ = 0;
};

}  // namespace bench
