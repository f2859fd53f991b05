// SPDX-License-Identifier: Apache-2.0
/// Tests of kernels that are chosen at run time.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "moe/backend/cpu/level.hpp"

namespace testing {

/// f() at every level of this machine, then as before.
template <class F>
void at_every_level(F f) {
  const moe::cpu_level_report before = moe::report_cpu_level();
  for (const moe::cpu_level level : moe::every_cpu_level) {
    if (!moe::includes(before.machine, level)) continue;
    CAPTURE(std::string(moe::name(level)));
    moe::use_cpu_level(level);
    f();
  }
  moe::use_cpu_level(before.level);
}

}  // namespace testing
