// SPDX-License-Identifier: Apache-2.0
/// A progress bar on a terminal, a line now and then anywhere else.
#pragma once

#include <chrono>
#include <cstdio>
#include <string>
#include <utility>

#include <unistd.h>

namespace demo {

/// Shows how far a run of `total` steps is, with its loss and its speed in bytes of text (tokens) a second.
class progress {
 public:
  progress(std::string name, long total, long tokens_per_step)
      : name_(std::move(name)), total_(total), tokens_(tokens_per_step), start_(clock::now()) {}

  /// After step `done`, counted from 1. `loss` in bits per byte.
  void step(long done, double loss) {
    const double seconds = elapsed();
    const bool last = done == total_;
    if (!last && seconds - shown_ < (terminal() ? 0.2 : 10.0)) return;
    shown_ = seconds;
    const double speed = static_cast<double>(done * tokens_) / (seconds > 0 ? seconds : 1);
    const double left = seconds / static_cast<double>(done) * static_cast<double>(total_ - done);
    if (terminal()) {
      constexpr int width = 30;
      const int filled = static_cast<int>(width * done / total_);
      std::string bar;
      for (int i = 0; i < width; ++i) bar += i < filled ? "█" : "░";
      std::printf("\r%-8s %s %3ld %%  %.3f bits per byte  %6.0f tokens/s  %3.0f s %s\033[K%s", name_.c_str(), bar.c_str(),
                  100 * done / total_, loss, speed, last ? seconds : left, last ? "in all" : "to go", last ? "\n" : "");
    } else {
      std::printf("%-8s %3ld %%  %.3f bits per byte  %6.0f tokens/s  %3.0f s\n", name_.c_str(), 100 * done / total_, loss, speed,
                  seconds);
    }
    std::fflush(stdout);
  }
  double elapsed() const { return std::chrono::duration<double>(clock::now() - start_).count(); }

 private:
  using clock = std::chrono::steady_clock;
  static bool terminal() {
    static const bool is = isatty(STDOUT_FILENO) != 0;
    return is;
  }

  std::string name_;
  long total_, tokens_;
  clock::time_point start_;
  double shown_ = 0;
};

}  // namespace demo
