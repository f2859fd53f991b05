// SPDX-License-Identifier: Apache-2.0
/// Loops that keep the units of the processor as busy as they can be.
#pragma once

namespace bench {

/// Does multiply-adds for about 2 ns a turn, or less, and returns their operations, two each.
using unit_loop = double (*)(int turns);

/// Those that the machine has, at the level that MOE_CPU_LEVEL allows; null where there is none.
struct unit_loops {
  unit_loop fma_f32, vnni_int8 = nullptr, avx512_bf16 = nullptr, amx_bf16 = nullptr, amx_int8 = nullptr;
};
unit_loops loops_in_use();

}  // namespace bench
