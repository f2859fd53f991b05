// SPDX-License-Identifier: Apache-2.0
/// The lowest rung of the ladder: every kernel in plain C++, without third-party headers. The reference the other rungs are
/// tested against and the fallback they stand on.
///
/// A kernel is one tile of work on one thread, over views and values. Products add to c and read the rows of a `gathered`
/// operand unweighted; floats accumulate in float.
#pragma once

#include <cstring>

#include "moe/backend/host.hpp"
#include "moe/backend/host_products.hpp"

namespace moe {

namespace arch {

/// Level is a part of the name of every function that depends on the compiler's flags, so files of one program that are
/// compiled for different processors share none of them.
template <int Level>
struct basic_scalar {};
using scalar = basic_scalar<moe::detail::build_level>;

namespace detail {

/// Floats side by side, as wide as the compiler makes them fast.
template <int Level>
struct plain_lanes {
  using vector = moe::detail::float_group;
  static constexpr int width = sizeof(vector) / sizeof(float);
  static constexpr bool many_registers = Level >= 3;

  static vector all(float v) noexcept { return vector{} + v; }
  static vector load(const float* p) noexcept {
    vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  /// The first n < width floats at p, then zeros.
  static vector load(const float* p, dim n) noexcept {
    float lane[width];
    for (int l = 0; l < width; ++l) lane[l] = l < n ? p[l] : 0.f;
    return load(lane);
  }
  static vector load(const bf16* p) noexcept { return load(p, width); }
  static vector load(const bf16* p, dim n) noexcept {
    float lane[width];
    for (int l = 0; l < width; ++l) lane[l] = l < n ? static_cast<float>(p[l]) : 0.f;
    return load(lane);
  }
  /// The last n < width elements of the row of k at p, and zeros.
  template <class T>
  static vector load_last(const T* p, dim k, dim n) noexcept {
    return load(p + k - n, n);
  }
  static void store(float* p, vector v) noexcept { std::memcpy(p, &v, sizeof v); }
  static void store(float* p, vector v, dim n) noexcept {
    for (dim l = 0; l < n; ++l) p[l] = v[l];
  }
  static vector multiply_add(vector x, vector y, vector z) noexcept { return x * y + z; }
  /// s[0 .. 4] = the sums of the lanes of a, b, c and d.
  static void sum_four(vector a, vector b, vector c, vector d, float* s) noexcept {
    s[0] = sum(a);
    s[1] = sum(b);
    s[2] = sum(c);
    s[3] = sum(d);
  }

 private:
  static float sum(vector v) noexcept {
    float lane[4];
    MOE_UNROLL
    for (int l = 0; l < 4; ++l) lane[l] = width > 4 ? v[l] + v[width - 4 + l] : v[l];
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }
};

}  // namespace detail

/// c[m,n] += a[m,k] b[n,k]^T
template <int Level>
void gemm_nt(basic_scalar<Level>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::product_nt<detail::lane_blocks<detail::plain_lanes<Level>>>(a, b, c);
}
/// The same for many rows, with weights that are packed on the way.
template <int Level>
void gemm_nt_packed(basic_scalar<Level>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::product_nt_packed<detail::lane_blocks<detail::plain_lanes<Level>>>(a, b, c);
}
/// c[m,n] += a[m,k] b[k,n]
template <int Level>
void gemm_nn(basic_scalar<Level>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::product_nn<detail::lane_blocks<detail::plain_lanes<Level>>>(a, b, c);
}
/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
template <int Level>
void gemm_tn(basic_scalar<Level>, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  detail::product_tn<detail::lane_blocks<detail::plain_lanes<Level>>>(a, b, depth, c);
}
/// Products with weights of bf16, widened to floats.
template <int Level>
mixed_kernels mixed_kernels_of(basic_scalar<Level>) noexcept {
  return detail::mixed_from_blocks<detail::lane_blocks<detail::plain_lanes<Level>>>;
}
/// y[j] += w x[j]. This one and the next are plain loops: function objects that a device runs as well call them.
template <int Level>
MOE_HD void axpy(basic_scalar<Level>, float w, const float* x, float* y, dim n) noexcept {
  for (dim j = 0; j < n; ++j) y[j] += w * x[j];
}
/// sum of x[j] y[j]
template <int Level>
MOE_HD float dot(basic_scalar<Level>, const float* x, const float* y, dim n) noexcept {
  float sum[8] = {};
  dim j = 0;
  for (; j + 8 <= n; j += 8) {
    MOE_UNROLL
    for (int l = 0; l < 8; ++l) sum[l] += x[j + l] * y[j + l];
  }
  for (; j < n; ++j) sum[j % 8] += x[j] * y[j];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}
/// f(j, lane) for j in 0 .. n in steps of the lane's width: how an elementwise rule runs at the level of the build.
template <int Level, class F>
void for_each_lane(basic_scalar<Level>, dim n, F f) noexcept {
  for (dim j = 0; j < n; ++j) f(j, scalar_lane{});
}

}  // namespace arch

/// The scalar backend.
template <class Ex = default_executor>
using scalar = host_backend<arch::scalar, Ex>;

}  // namespace moe
