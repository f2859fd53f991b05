// SPDX-License-Identifier: Apache-2.0
/// Kernels over rows.
#pragma once

#include "moe/backend/cpu/simd.hpp"

#if !defined(MOE_SEPARATE_KERNELS)

namespace moe::arch {

/// y[j] += w x[j]
template <class Set>
void axpy(simd<Set>, float w, const float* x, float* y, dim n) noexcept {
  using V = typename simd<Set>::vector;
  constexpr dim W = detail::width<V>;
  const V weight(w);
  dim j = 0;
  for (; j + W <= n; j += W) detail::store_vector(y + j, detail::multiply_add(weight, detail::load_vector<V>(x + j), detail::load_vector<V>(y + j)));
  if (j == n) return;
  const V last = detail::multiply_add(weight, detail::load_vector<V>(x + j, n - j), detail::load_vector<V>(y + j, n - j));
  detail::store_vector(y + j, last, n - j);
}

/// sum of x[j] y[j]
template <class Set>
float dot(simd<Set>, const float* x, const float* y, dim n) noexcept {
  using V = typename simd<Set>::vector;
  constexpr dim W = detail::width<V>;
  V sum[4] = {V(0.f), V(0.f), V(0.f), V(0.f)};
  dim j = 0;
  for (; j + 4 * W <= n; j += 4 * W)
    MOE_UNROLL
    for (int i = 0; i < 4; ++i)
      sum[i] = detail::multiply_add(detail::load_vector<V>(x + j + i * W), detail::load_vector<V>(y + j + i * W), sum[i]);
  for (; j + W <= n; j += W) sum[0] = detail::multiply_add(detail::load_vector<V>(x + j), detail::load_vector<V>(y + j), sum[0]);
  if (j < n) sum[0] = detail::multiply_add(detail::load_vector<V>(x + j, n - j), detail::load_vector<V>(y + j, n - j), sum[0]);
  return detail::sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/// f(j, lane) for j in 0 .. n in steps of the lane's width.
template <class Set, class F>
void for_each_lane(simd<Set>, dim n, F f) noexcept {
  using V = typename simd<Set>::vector;
  for (dim j = 0; j < n; j += detail::width<V>)
    f(j, simd_lane<V>{n - j < detail::width<V> ? n - j : dim{detail::width<V>}});
}

}  // namespace moe::arch

#endif
