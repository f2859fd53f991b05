// SPDX-License-Identifier: Apache-2.0
/// Products in the vectors of xsimd.
#pragma once

#include "moe/backend/cpu/simd.hpp"
#include "moe/backend/host_products.hpp"

#if !defined(MOE_SEPARATE_KERNELS)

namespace moe::arch {

/// c[m,n] += a[m,k] b[n,k]^T
template <class Set>
void gemm_nt(simd<Set>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::product_nt<typename detail::simd_blocks<Set>::type>(a, b, c);
}
/// The same for many rows, with weights that are packed on the way.
template <class Set>
void gemm_nt_packed(simd<Set>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::product_nt_packed<typename detail::simd_blocks<Set>::type>(a, b, c);
}
/// c[m,n] += a[m,k] b[k,n]
template <class Set>
void gemm_nn(simd<Set>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::product_nn<typename detail::simd_blocks<Set>::type>(a, b, c);
}
/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
template <class Set>
void gemm_tn(simd<Set>, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  detail::product_tn<typename detail::simd_blocks<Set>::type>(a, b, depth, c);
}

}  // namespace moe::arch

#endif
