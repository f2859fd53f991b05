// SPDX-License-Identifier: Apache-2.0
/// Products in the vectors of xsimd.
#pragma once

#include "moe/backend/cpu/simd.hpp"
#include "moe/backend/host_blocks.hpp"

#if !defined(MOE_SEPARATE_KERNELS)

namespace moe::arch {

/// c[m,n] += a[m,k] b[n,k]^T
template <class Set>
void gemm_nt(simd<Set>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::product_nt<detail::simd_lanes<Set>>(a, b, c);
}
/// c[m,n] += a[m,k] b[k,n]
template <class Set>
void gemm_nn(simd<Set>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::product_nn<detail::simd_lanes<Set>>(a, b, c);
}
/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
template <class Set>
void gemm_tn(simd<Set>, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  detail::product_tn<detail::simd_lanes<Set>>(a, b, depth, c);
}

}  // namespace moe::arch

#endif
