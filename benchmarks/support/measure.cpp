// SPDX-License-Identifier: Apache-2.0
#include "support/measure.hpp"

#include <map>

#include "support/units.hpp"

namespace bench {

bool undisturbed(int threads) {
  static const unit_loops loops = loops_in_use();
  static std::map<int, double> most;  // of so many threads
  const unit_loop work = loops.amx_bf16 ? loops.amx_bf16 : loops.fma_f32;
  const auto run = [&](int turns) { return together(threads, [&](int) { work(turns); }); };
  run(1 << 16);  // wakes the threads, and the unit
  const double rate = 1 / run(1 << 18);
  return rate >= 0.9 * (most[threads] = std::max(most[threads], rate));
}

}  // namespace bench
