// SPDX-License-Identifier: Apache-2.0
/// The one header that knows xsimd, in its versions 8.1 to 14, and the level that the compiler's flags choose.
#pragma once

#include <array>
#include <type_traits>

#include "moe/backend/cpu/blocks_avx2.hpp"
#include "moe/backend/cpu/blocks_avx512.hpp"
#include "moe/backend/cpu/level.hpp"
#include "moe/backend/scalar.hpp"

#if !defined(MOE_SEPARATE_KERNELS)

#include <xsimd/xsimd.hpp>

namespace moe::arch {

/// Kernels on the vectors of an instruction set of xsimd. The set is part of the name of every function that depends on it,
/// so files of one program compiled for different processors share none of them.
template <class Set>
struct simd : scalar {
  /// Throws level_error where MOE_CPU_LEVEL cannot be had: products with packed weights run at that level.
  static void check() { check_cpu_level(); }
};

/// The level of the build: the widest vectors that the compiler's flags allow, or plain loops where xsimd has none.
#if defined(XSIMD_NO_SUPPORTED_ARCHITECTURE)
using native = scalar;
#else
using native = simd<xsimd::default_arch>;
#endif

namespace detail {

/// The vectors of an instruction set, as the blocks of products use them.
template <class Set>
struct simd_lanes {
  using vector = xsimd::batch<float, Set>;
  static constexpr int width = static_cast<int>(vector::size);
  static constexpr bool many_registers = width >= 16 || std::is_base_of_v<xsimd::neon64, Set>;

  static vector all(float v) noexcept { return vector(v); }
  static vector load(const float* p) noexcept { return vector::load_unaligned(p); }
  /// The first n < width floats at p, then zeros.
  static vector load(const float* p, dim n) noexcept {
    float lane[width];
    for (int l = 0; l < width; ++l) lane[l] = l < n ? p[l] : 0.f;
    return load(lane);
  }
  /// The last n < width floats of the row of k at p, and zeros.
  static vector load_last(const float* p, dim k, dim n) noexcept {
    if (k < width) return load(p, n);
    const auto before = load(numbers.data()) < all(static_cast<float>(width - n));
    return xsimd::select(before, all(0), load(p + k - width));
  }
  static void store(float* p, vector v) noexcept { v.store_unaligned(p); }
  static void store(float* p, vector v, dim n) noexcept {
    float lane[width];
    store(lane, v);
    for (dim l = 0; l < n; ++l) p[l] = lane[l];
  }
  static vector multiply_add(vector x, vector y, vector z) noexcept {
    if constexpr (width == 16)
      return multiply_add_512(x, y, z);
    else
      return xsimd::fma(x, y, z);
  }
  /// s[0 .. 4] = the sums of the lanes of a, b, c and d, each in the same order.
  static void sum_four(vector a, vector b, vector c, vector d, float* s) noexcept {
    if constexpr (width == 16) {
      sum_four_512(a, b, c, d, s);
    } else {
      vector rows[vector::size] = {a, b, c, d};
      for (int i = 4; i < width; ++i) rows[i] = all(0);
      store(s, xsimd::haddp(rows), 4);
    }
  }

 private:
  static constexpr auto numbers = [] {
    std::array<float, vector::size> number{};
    for (std::size_t l = 0; l < vector::size; ++l) number[l] = static_cast<float>(l);
    return number;
  }();
#if defined(__AVX512F__)
  // Here fma of xsimd 8 is a product and a sum, and haddp of 8 to 14 returns its sums in another order than its rows.
  static __m512 multiply_add_512(__m512 x, __m512 y, __m512 z) noexcept { return _mm512_fmadd_ps(x, y, z); }
  static void sum_four_512(__m512 a, __m512 b, __m512 c, __m512 d, float* s) noexcept {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(abcd), high);
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
#endif
};

/// The blocks of the level of the build.
template <class Set>
struct simd_blocks {
  using type = lane_blocks<simd_lanes<Set>>;
};
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
template <class Set>
  requires(xsimd::batch<float, Set>::size == 16)
struct simd_blocks<Set> {
  using type = blocks_avx512<moe::detail::build_level>;
};
#elif defined(__AVX2__) && defined(__FMA__)
template <class Set>
  requires(xsimd::batch<float, Set>::size == 8)
struct simd_blocks<Set> {
  using type = blocks_avx2<moe::detail::build_level>;
};
#endif

}  // namespace detail

/// The lane of elementwise rules: up to a whole vector of floats. Rules see the same vector type for a row's last, shorter
/// part, so an element's result does not depend on where in the row it stands.
template <class Set>
struct simd_lane {
  using lanes = detail::simd_lanes<Set>;
  using value = typename lanes::vector;
  dim count;

  value load(const float* p) const noexcept { return whole() ? lanes::load(p) : lanes::load(p, count); }
  void store(float* p, value v) const noexcept { whole() ? lanes::store(p, v) : lanes::store(p, v, count); }
  float sum(value v) const noexcept {
    float lane[lanes::width], total[4];
    lanes::store(lane, v);
    lanes::sum_four(whole() ? v : lanes::load(lane, count), lanes::all(0), lanes::all(0), lanes::all(0), total);
    return total[0];
  }

 private:
  bool whole() const noexcept { return count == lanes::width; }
};

}  // namespace moe::arch

#endif
