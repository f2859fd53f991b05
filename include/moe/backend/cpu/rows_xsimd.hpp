// SPDX-License-Identifier: Apache-2.0
/// Rows in the vectors of xsimd.
#pragma once

#include "moe/backend/cpu/simd.hpp"
#include "moe/backend/host_blocks.hpp"

#if !defined(MOE_SEPARATE_KERNELS)

namespace moe::arch {

/// y[j] += w x[j]
template <class Set>
void axpy(simd<Set>, float w, const float* x, float* y, dim n) noexcept {
  detail::simd_blocks<Set>::type::add_scaled(w, x, y, n);
}
/// sum of x[j] y[j]
template <class Set>
float dot(simd<Set>, const float* x, const float* y, dim n) noexcept {
  return detail::simd_blocks<Set>::type::dot_product(x, y, n);
}
/// f(j, lane) for j in 0 .. n in steps of the lane's width.
template <class Set, class F>
void for_each_lane(simd<Set>, dim n, F f) noexcept {
  constexpr dim width = detail::simd_lanes<Set>::width;
  for (dim j = 0; j < n; j += width) f(j, simd_lane<Set>{n - j < width ? n - j : width});
}

}  // namespace moe::arch

#endif
