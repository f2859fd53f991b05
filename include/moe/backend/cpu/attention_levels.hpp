// SPDX-License-Identifier: Apache-2.0
/// Attention at the level in use, whatever the compiler's flags: its kernels are chosen at run time.
#pragma once

#include "moe/backend/attention_kernels.hpp"
#include "moe/backend/cpu/attention_amx_gathered.hpp"
#include "moe/backend/cpu/attention_avx2.hpp"
#include "moe/backend/cpu/attention_avx512.hpp"
#include "moe/backend/cpu/attention_neon.hpp"
#include "moe/backend/cpu/compiled.hpp"
#include "moe/backend/cpu/level.hpp"

namespace moe::arch {

attention_kernels attention_kernels_of(compiled) noexcept;

#if !defined(MOE_SEPARATE_KERNELS)

template <int Build>
attention_kernels attention_kernels_in_use() noexcept {
#if defined(MOE_X86)
  const cpu_level level = cpu_level_in_use();
  if (includes(level, cpu_level::avx512_bf16)) return detail::attention_on_tiles<Build, detail::tiles_in_use<Build>>();
  if (includes(level, cpu_level::avx512)) return detail::attention_of<detail::attention_avx512<Build>>;
  if (includes(level, cpu_level::avx2)) return detail::attention_of<detail::attention_avx2<Build>>;
#elif defined(__aarch64__)
  if (cpu_level_in_use() == cpu_level::neon) return detail::attention_of<detail::attention_neon<Build>>;
#endif
  return attention_kernels_of(basic_scalar<Build>{});
}

template <class Set>
attention_kernels attention_kernels_of(simd<Set>) noexcept {
  return attention_kernels_in_use<moe::detail::build_level>();
}

#endif
#if defined(MOE_DEFINE_KERNELS)
attention_kernels attention_kernels_of(compiled) noexcept { return attention_kernels_of(native{}); }
#endif

}  // namespace moe::arch
