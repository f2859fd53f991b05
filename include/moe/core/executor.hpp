// SPDX-License-Identifier: Apache-2.0
/// Who runs the tiles of a call. The grid of tiles follows from shapes and plan, never from the executor, so results do
/// not depend on it.
#pragma once

#include <concepts>

#include "moe/core/types.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace moe {

/// `for_each(n, grain, f)` calls f(first, last) for disjoint ranges of at most `grain` that cover 0 .. n, each once, in
/// any order and on any thread, and returns when all are done. `f` does not throw; it may wait for another range that has
/// begun.
template <class E>
concept Executor = requires(const E& ex, dim n, void (*f)(dim, dim)) {
  { ex.concurrency() } noexcept -> std::convertible_to<int>;
  ex.for_each(n, n, f);
};

/// The calling thread alone.
struct serial {
  static constexpr int concurrency() noexcept { return 1; }
  template <class F>
  void for_each(dim n, dim grain, F&& f) const {
    for (dim first = 0; first < n; first += grain) f(first, first + grain < n ? first + grain : n);
  }
};

#if defined(_OPENMP)
/// The threads of OpenMP, where the program is compiled with it.
struct openmp {
  static int concurrency() noexcept { return omp_get_max_threads(); }
  template <class F>
  void for_each(dim n, dim grain, F&& f) const {
    const dim chunks = (n + grain - 1) / grain;
    if (chunks < 2) return serial{}.for_each(n, grain, f);
#pragma omp parallel for schedule(dynamic, 1)
    for (dim c = 0; c < chunks; ++c) f(c * grain, (c + 1) * grain < n ? (c + 1) * grain : n);
  }
};
using default_executor = openmp;
#else
using default_executor = serial;
#endif

}  // namespace moe
