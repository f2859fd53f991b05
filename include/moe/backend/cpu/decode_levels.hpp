// SPDX-License-Identifier: Apache-2.0
/// Decoding at the level in use, whatever the compiler's flags: its kernels are chosen at run time.
#pragma once

#include "moe/backend/cpu/compiled.hpp"
#include "moe/backend/cpu/decode_avx2.hpp"
#include "moe/backend/cpu/decode_bytes_avx512.hpp"
#include "moe/backend/cpu/decode_neon.hpp"

namespace moe::arch {

template <class T>
decode_kernels kernels_of(compiled, cache_of<T>) noexcept;

#if !defined(MOE_SEPARATE_KERNELS)

template <class T>
decode_kernels decode_kernels_in_use() noexcept {
  return at_level_in_use([](auto level) { return kernels_of(level, cache_of<T>{}); });
}

template <class Set>
struct simd;
template <class Set, class T>
decode_kernels kernels_of(simd<Set>, cache_of<T>) noexcept {
  return decode_kernels_in_use<T>();
}

#endif
#if defined(MOE_DEFINE_KERNELS)

template <class T>
decode_kernels kernels_of(compiled, cache_of<T>) noexcept {
  return decode_kernels_in_use<T>();
}
template decode_kernels kernels_of(compiled, cache_of<float>) noexcept;
template decode_kernels kernels_of(compiled, cache_of<bf16>) noexcept;
template decode_kernels kernels_of(compiled, cache_of<f16>) noexcept;
template decode_kernels kernels_of(compiled, cache_of<std::int8_t>) noexcept;

#endif

}  // namespace moe::arch
