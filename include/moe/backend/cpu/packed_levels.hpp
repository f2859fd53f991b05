// SPDX-License-Identifier: Apache-2.0
/// Products with packed weights at the level in use, whatever the compiler's flags: their kernels are chosen at run time.
#pragma once

#include "moe/backend/cpu/compiled.hpp"
#include "moe/backend/cpu/level.hpp"
#include "moe/backend/cpu/packed_amx.hpp"
#include "moe/backend/cpu/packed_avx2.hpp"
#include "moe/backend/cpu/packed_neon.hpp"

namespace moe::arch {

template <class T>
packed_kernels kernels_of(compiled, weights_of<T>) noexcept;

#if !defined(MOE_SEPARATE_KERNELS)

template <class T>
packed_kernels kernels_in_use() noexcept {
#if defined(MOE_X86)
  switch (cpu_level_in_use()) {
    case cpu_level::amx:
      return kernels_of(amx{}, weights_of<T>{});
    case cpu_level::avx512_vnni:
      return kernels_of(avx512_vnni{}, weights_of<T>{});
    case cpu_level::avx512:
      return kernels_of(avx512{}, weights_of<T>{});
    case cpu_level::avx2:
      return kernels_of(avx2{}, weights_of<T>{});
    default:
      break;
  }
#elif defined(__aarch64__)
  if (cpu_level_in_use() == cpu_level::neon) return kernels_of(neon{}, weights_of<T>{});
#endif
  return kernels_of(scalar{}, weights_of<T>{});
}

template <class Set>
struct simd;
template <class Set, class T>
packed_kernels kernels_of(simd<Set>, weights_of<T>) noexcept {
  return kernels_in_use<T>();
}

#endif
#if defined(MOE_DEFINE_KERNELS)

template <class T>
packed_kernels kernels_of(compiled, weights_of<T>) noexcept {
  return kernels_in_use<T>();
}
template packed_kernels kernels_of(compiled, weights_of<float>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<bf16>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<f16>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<std::int8_t>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<int4_groups<32, f16>>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<int4_groups<32, bf16>>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<int4_groups<128, f16>>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<int4_groups<128, bf16>>) noexcept;

#endif

}  // namespace moe::arch
