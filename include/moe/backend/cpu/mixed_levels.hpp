// SPDX-License-Identifier: Apache-2.0
/// Products of float32 rows with bf16 weights at the level in use, whatever the compiler's flags: their kernels are chosen
/// at run time, on every `moe::cpu`.
#pragma once

#include "moe/backend/cpu/blocks_avx2.hpp"
#include "moe/backend/cpu/blocks_avx512.hpp"
#include "moe/backend/cpu/compiled.hpp"
#include "moe/backend/cpu/lanes_neon.hpp"
#include "moe/backend/cpu/level.hpp"
#include "moe/backend/cpu/mixed_amx.hpp"
#include "moe/backend/cpu/vector_tiles.hpp"

namespace moe::arch {

mixed_kernels mixed_kernels_of(compiled) noexcept;

#if defined(MOE_SEPARATE_KERNELS)

template <moe::detail::CheckedArch Arch>
mixed_kernels mixed_kernels_of(Arch) noexcept {
  return mixed_kernels_of(compiled{});
}

#else

#if defined(MOE_X86)
template <int Build>
mixed_kernels mixed_kernels_of(basic_avx2<Build>) noexcept {
  return detail::mixed_from_blocks<detail::blocks_avx2<Build>>;
}
template <int Build>
mixed_kernels mixed_kernels_of(basic_avx512<Build>) noexcept {
  return detail::mixed_from_blocks<detail::blocks_avx512<Build>>;
}
template <int Build>
mixed_kernels mixed_kernels_of(basic_avx512_bf16<Build>) noexcept {
  return mixed_kernels_of(basic_amx<Build>{}, detail::vector_tiles<Build>{});
}
#elif defined(__aarch64__)
template <int Build>
mixed_kernels mixed_kernels_of(basic_neon<Build>) noexcept {
  return detail::mixed_from_blocks<detail::blocks_neon<Build>>;
}
#endif

template <int Build>
mixed_kernels mixed_kernels_in_use() noexcept {
#if defined(MOE_X86)
  const cpu_level level = cpu_level_in_use();
  if (level == cpu_level::amx) return mixed_kernels_of(basic_amx<Build>{});
  if (includes(level, cpu_level::avx512_bf16)) return mixed_kernels_of(basic_avx512_bf16<Build>{});
  if (includes(level, cpu_level::avx512)) return mixed_kernels_of(basic_avx512<Build>{});
  if (includes(level, cpu_level::avx2)) return mixed_kernels_of(basic_avx2<Build>{});
#elif defined(__aarch64__)
  if (cpu_level_in_use() == cpu_level::neon) return mixed_kernels_of(basic_neon<Build>{});
#endif
  return mixed_kernels_of(basic_scalar<Build>{});
}

template <moe::detail::CheckedArch Arch>
mixed_kernels mixed_kernels_of(Arch) noexcept {
  return mixed_kernels_in_use<moe::detail::build_level>();
}

#endif
#if defined(MOE_DEFINE_KERNELS)
mixed_kernels mixed_kernels_of(compiled) noexcept { return mixed_kernels_of(native{}); }
#endif

}  // namespace moe::arch
