// SPDX-License-Identifier: Apache-2.0
/// Tests of kernels that are chosen at run time.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "moe/backend/cpu/level.hpp"

namespace testing {

/// The highest level that tests use: of this machine, or what MOE_CPU_LEVEL caps it at.
inline moe::cpu_level highest_level() {
  static const moe::cpu_level highest = [] {
    moe::check_cpu_level();
    return moe::cpu_level_in_use();
  }();
  return highest;
}

/// f() at every level up to that, then as before.
template <class F>
void at_every_level(F f) {
  const moe::cpu_level highest = highest_level(), before = moe::cpu_level_in_use();
  for (const moe::cpu_level level : moe::every_cpu_level) {
    if (!moe::includes(highest, level)) continue;
    CAPTURE(std::string(moe::name(level)));
    moe::use_cpu_level(level);
    f();
  }
  moe::use_cpu_level(before);
}

/// Whether kernels of bf16 in use round the rows that they multiply, and weights of values, to bf16: those of tiles.
inline bool halves_in_use() { return moe::includes(moe::cpu_level_in_use(), moe::cpu_level::avx512_bf16); }

}  // namespace testing
