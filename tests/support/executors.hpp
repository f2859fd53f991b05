// SPDX-License-Identifier: Apache-2.0
/// Executors that make the most of what their contract leaves open, or count what they are asked for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "moe/core/executor.hpp"
#include "moe/core/rng.hpp"

namespace testing {

/// Ranges of random length, at most the grain, in random order; another cut and another order for each seed.
struct shuffling {
  std::uint64_t seed = 0;

  static constexpr int concurrency() noexcept { return 7; }
  template <class F>
  void for_each(moe::dim n, moe::dim grain, F&& f) const {
    const moe::rng random(seed);
    std::vector<std::pair<moe::dim, moe::dim>> ranges;
    for (moe::dim first = 0; first < n;) {
      const auto length = static_cast<moe::dim>(random(ranges.size()) % static_cast<std::uint64_t>(grain)) + 1;
      const moe::dim last = std::min(first + length, n);
      ranges.emplace_back(first, last);
      first = last;
    }
    const auto drawn = static_cast<std::uint64_t>(n);
    for (std::size_t i = ranges.size(); i > 1; --i) std::swap(ranges[i - 1], ranges[random(drawn + i) % i]);
    for (const auto& [first, last] : ranges) f(first, last);
  }
};

/// The calling thread, as one of two, and how often it was handed more than one unit: the joins of two threads.
struct counting {
  moe::dim* joins = nullptr;

  static constexpr int concurrency() noexcept { return 2; }
  template <class F>
  void for_each(moe::dim n, moe::dim grain, F&& f) const {
    *joins += n > grain;
    moe::serial{}.for_each(n, grain, f);
  }
};

}  // namespace testing
