// SPDX-License-Identifier: Apache-2.0
/// The one header that knows xsimd, in its versions 8.1 to 14, and the level that the compiler's flags choose.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "moe/backend/scalar.hpp"

#if !defined(MOE_SEPARATE_KERNELS)

#include <xsimd/xsimd.hpp>

namespace moe::arch {

/// Kernels on the vectors of an instruction set of xsimd. The set is part of the name of every function that depends on it,
/// so files of one program compiled for different processors share none of them.
template <class Set>
struct simd : scalar {
  using vector = xsimd::batch<float, Set>;
};

/// The level of the build: the widest vectors that the compiler's flags allow, or plain loops where xsimd has none.
#if defined(XSIMD_NO_SUPPORTED_ARCHITECTURE)
using native = scalar;
#else
using native = simd<xsimd::default_arch>;
#endif

namespace detail {

template <class V>
inline constexpr int width = static_cast<int>(V::size);

/// Vector registers: what a block of sums may use of them decides its size.
template <class V>
inline constexpr int registers =
    width<V> >= 16 || std::is_base_of_v<xsimd::neon64, typename V::arch_type> ? 32 : 16;

template <class V>
V load_vector(const float* p) noexcept { return V::load_unaligned(p); }
/// The first n < width floats at p, and zeros.
template <class V>
V load_vector(const float* p, dim n) noexcept {
  float lane[V::size] = {};
  for (dim l = 0; l < n; ++l) lane[l] = p[l];
  return load_vector<V>(lane);
}
template <class V>
void store_vector(float* p, V v) noexcept { v.store_unaligned(p); }
template <class V>
void store_vector(float* p, V v, dim n) noexcept {
  float lane[V::size];
  store_vector(lane, v);
  for (dim l = 0; l < n; ++l) p[l] = lane[l];
}
/// The last n < width floats of the row of k at p, each in the lane it would have in a vector that ends there, and zeros.
template <class V>
V load_last(const float* p, dim k, dim n) noexcept {
  static constexpr auto lanes = [] {
    std::array<float, V::size> number{};
    for (std::size_t l = 0; l < V::size; ++l) number[l] = static_cast<float>(l);
    return number;
  }();
  if (k < width<V>) return load_vector<V>(p, n);
  const auto old = load_vector<V>(lanes.data()) < V(static_cast<float>(width<V> - n));
  return xsimd::select(old, V(0.f), load_vector<V>(p + k - width<V>));
}
template <class V>
V multiply_add(V x, V y, V z) noexcept { return xsimd::fma(x, y, z); }

/// The sum of v's first n lanes, in halves.
template <class V>
float sum_lanes(V v, dim n = width<V>) noexcept {
  float lane[V::size];
  store_vector(lane, v);
  for (dim l = n; l < width<V>; ++l) lane[l] = 0;
  for (int half = width<V> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}
/// s[0 .. 4] = the sums of the lanes of a, b, c and d, each in the same order.
template <class V>
void sum_four(V a, V b, V c, V d, float* s) noexcept {
  V rows[V::size] = {a, b, c, d};
  for (int i = 4; i < width<V>; ++i) rows[i] = V(0.f);
  store_vector(s, xsimd::haddp(rows), 4);
}
#if defined(__AVX512F__)
/// (xsimd's own confuses the rows: issue 1.)
template <class Set>
  requires(xsimd::batch<float, Set>::size == 16)
void sum_four(xsimd::batch<float, Set> a, xsimd::batch<float, Set> b, xsimd::batch<float, Set> c, xsimd::batch<float, Set> d,
              float* s) noexcept {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1)));
  _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
#endif

/// f(n) with n as a constant of 1 .. N: the block that is as high as what is left. Nothing for other n.
template <int N, class F>
void with_constant(dim n, F f) noexcept {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((n == I + 1 ? (f(std::integral_constant<int, I + 1>{}), true) : false) || ...);
  }(std::make_integer_sequence<int, N>{});
}

}  // namespace detail

/// The lane of elementwise rules: up to a whole vector of floats. Rules see the same vector type for a row's last, shorter
/// part, so an element's result does not depend on where in the row it stands.
template <class V>
struct simd_lane {
  using value = V;
  dim count;

  V load(const float* p) const noexcept { return whole() ? detail::load_vector<V>(p) : detail::load_vector<V>(p, count); }
  void store(float* p, V v) const noexcept { whole() ? detail::store_vector(p, v) : detail::store_vector(p, v, count); }
  float sum(V v) const noexcept { return detail::sum_lanes(v, count); }

 private:
  bool whole() const noexcept { return count == detail::width<V>; }
};

}  // namespace moe::arch

#endif
