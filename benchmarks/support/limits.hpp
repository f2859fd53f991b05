// SPDX-License-Identifier: Apache-2.0
/// What the machine can do at most, measured in the run that compares with it.
#pragma once

#include "support/shapes.hpp"

namespace bench {

/// Rates with all of `threads` threads at once; 0 where the machine, or the level that MOE_CPU_LEVEL allows, has no such unit.
struct machine_limits {
  int threads = 1;
  double dram_read = 0;  ///< bytes per second
  /// Operations per second, two a multiply-add.
  double fma_f32 = 0, vnni_int8 = 0, avx512_bf16 = 0, amx_bf16 = 0, amx_int8 = 0;
  bool quiet = true;  ///< nobody else had the processor meanwhile

  /// The peak of a unit; where the machine lacks it, that of the next best one.
  double peak(unit u) const {
    const double own = u == unit::amx_bf16   ? (amx_bf16 > 0 ? amx_bf16 : avx512_bf16)
                       : u == unit::amx_int8 ? (amx_int8 > 0 ? amx_int8 : vnni_int8)
                                             : 0;
    return own > 0 ? own : fma_f32;
  }
};

/// The limit of a unit is the most that was seen in many tries, so that no share of it is flattered by a bad one; that of
/// memory is the median of undisturbed ones, since others of the host use it, too. Below usual_rounds it tries for less long.
machine_limits measure_limits(int threads, int rounds);

}  // namespace bench
