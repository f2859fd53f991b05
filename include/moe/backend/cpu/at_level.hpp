// SPDX-License-Identifier: Apache-2.0
/// Plain code at the level in use, whatever the compiler's flags: compiled once for each level, on vectors of its width.
#pragma once

#include <type_traits>

#include "moe/backend/cpu/level.hpp"
#include "moe/backend/lanes.hpp"

namespace moe::arch {

namespace detail {

#if defined(MOE_X86) && defined(MOE_VECTORS)
template <int Build, class Work>
MOE_TARGET(MOE_AVX2)
MOE_FLATTEN MOE_NO_INLINE void run_avx2(const Work& work) noexcept {
  work(std::type_identity<lanes<8, Build>>{});
}
template <int Build, class Work>
MOE_TARGET(MOE_AVX512)
MOE_WHOLE_VECTORS MOE_FLATTEN MOE_NO_INLINE void run_avx512(const Work& work) noexcept {
  work(std::type_identity<lanes<16, Build>>{});
}
#endif

}  // namespace detail

/// work(std::type_identity<V>), where V is the lanes of the level in use, or of the build where that is higher. All that
/// `work` calls by MOE_INLINE runs at that level.
template <int Build, class Work>
MOE_INLINE void at_level_in_use(const Work& work) noexcept {
#if defined(MOE_X86) && defined(MOE_VECTORS)
  if constexpr (Build == 3) return detail::run_avx512<Build>(work);
  if (includes(cpu_level_in_use(), cpu_level::avx512)) return detail::run_avx512<Build>(work);
  if constexpr (Build == 2) return detail::run_avx2<Build>(work);
  if (includes(cpu_level_in_use(), cpu_level::avx2)) return detail::run_avx2<Build>(work);
#endif
  work(std::type_identity<lanes<Build == 1 ? 8 : 4, Build>>{});
}

}  // namespace moe::arch
