// SPDX-License-Identifier: Apache-2.0
/// Products with packed weights at the level in use, whatever the compiler's flags: their kernels are chosen at run time.
#pragma once

#include "moe/backend/cpu/compiled.hpp"
#include "moe/backend/cpu/packed_amx.hpp"
#include "moe/backend/cpu/packed_avx2.hpp"
#include "moe/backend/cpu/packed_neon.hpp"

namespace moe::arch {

template <class T>
packed_kernels kernels_of(compiled, weights_of<T>) noexcept;

#if !defined(MOE_SEPARATE_KERNELS)

template <class T>
packed_kernels kernels_in_use() noexcept {
  return at_level_in_use([](auto level) { return kernels_of(level, weights_of<T>{}); });
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
template packed_kernels kernels_of(compiled, weights_of<ternary>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<int4_groups<32, f16>>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<int4_groups<32, bf16>>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<int4_groups<128, f16>>) noexcept;
template packed_kernels kernels_of(compiled, weights_of<int4_groups<128, bf16>>) noexcept;

#endif

}  // namespace moe::arch
