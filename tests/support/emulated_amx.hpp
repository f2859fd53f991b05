// SPDX-License-Identifier: Apache-2.0
/// A level for host_backend that multiplies on emulated tiles, so that whole layers run on them where the machine has none.
#pragma once

#include <concepts>

#include "moe/backend/cpu.hpp"
#include "support/emulated_tiles.hpp"

namespace testing {

/// Float32 is that of the level of the build; what has halves, bytes, groups or ternary weights runs on tiles, on one thread
/// only. Needs AVX-512, as AMX does.
struct emulated_amx : moe::arch::native {};
#if defined(MOE_X86)
inline moe::arch::mixed_kernels mixed_kernels_of(emulated_amx) noexcept {
  return mixed_kernels_of(moe::arch::amx{}, emulated_tiles{});
}
template <class T>
  requires(!std::same_as<T, float> && !std::same_as<T, moe::f16>)
moe::packed_kernels kernels_of(emulated_amx, moe::arch::weights_of<T> weights) noexcept {
  return kernels_of(moe::arch::amx{}, weights, emulated_tiles{});
}
#endif

}  // namespace testing
