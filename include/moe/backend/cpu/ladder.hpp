// SPDX-License-Identifier: Apache-2.0
/// The tags of the levels of moe::cpu_level. Overloads for a tag need the machine to have its level; what a level lacks falls
/// back to the one it stands on. `Build` names the compiler's flags, as in arch::scalar: features of a function's target come
/// on top of them.
#pragma once

#include "moe/backend/cpu/level.hpp"
#include "moe/backend/scalar.hpp"

/// Where kernels of the levels are compiled: not in files that take them from moe::kernels (cpu/compiled.hpp).
#if defined(MOE_X86) && !defined(MOE_SEPARATE_KERNELS)
#define MOE_X86_KERNELS 1

// GCC 12 takes the registers that its AVX-512 intrinsics leave undefined for a mistake of whoever calls them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif

namespace moe::arch {

template <int Build>
struct basic_avx2 : basic_scalar<Build> {};
template <int Build>
struct basic_avx512 : basic_avx2<Build> {};
template <int Build>
struct basic_avx512_vnni : basic_avx512<Build> {};
template <int Build>
struct basic_avx512_bf16 : basic_avx512_vnni<Build> {};
template <int Build>
struct basic_amx : basic_avx512_bf16<Build> {};
template <int Build>
struct basic_neon : basic_scalar<Build> {};

using avx2 = basic_avx2<moe::detail::build_level>;
using avx512 = basic_avx512<moe::detail::build_level>;
using avx512_vnni = basic_avx512_vnni<moe::detail::build_level>;
using avx512_bf16 = basic_avx512_bf16<moe::detail::build_level>;
using amx = basic_amx<moe::detail::build_level>;
using neon = basic_neon<moe::detail::build_level>;

/// f(tag) for the tag of the level in use.
template <class F>
auto at_level_in_use(F f) noexcept {
#if defined(MOE_X86)
  switch (cpu_level_in_use()) {
    case cpu_level::amx:
      return f(amx{});
    case cpu_level::avx512_bf16:
      return f(avx512_bf16{});
    case cpu_level::avx512_vnni:
      return f(avx512_vnni{});
    case cpu_level::avx512:
      return f(avx512{});
    case cpu_level::avx2:
      return f(avx2{});
    default:
      break;
  }
#elif defined(__aarch64__)
  if (cpu_level_in_use() == cpu_level::neon) return f(neon{});
#endif
  return f(scalar{});
}

}  // namespace moe::arch
