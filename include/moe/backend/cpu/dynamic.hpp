// SPDX-License-Identifier: Apache-2.0
/// Float32 kernels at the level in use, whatever the compiler's flags: `cpu<arch::dynamic>`. Products and sums over rows go
/// through a table; elementwise rules, which may be the user's own code, are compiled once for each level.
#pragma once

#include "moe/backend/cpu/at_level.hpp"
#include "moe/backend/cpu/blocks_avx2.hpp"
#include "moe/backend/cpu/blocks_avx512.hpp"
#include "moe/backend/cpu/compiled.hpp"
#include "moe/backend/cpu/lanes_neon.hpp"
#include "moe/backend/cpu/level.hpp"
#include "moe/backend/cpu/simd.hpp"

namespace moe::arch {

template <int Build>
struct basic_dynamic : native {
  /// Throws level_error where MOE_CPU_LEVEL cannot be had; a backend calls it when it is made.
  static void check() { check_cpu_level(); }
};
using dynamic = basic_dynamic<moe::detail::build_level>;

namespace detail {

/// What a level computes products and rows with.
struct float_kernels {
  void (*gemm_nt)(gathered<float>, matrix_view<const float>, matrix_view<float>) noexcept;
  void (*gemm_nt_packed)(gathered<float>, matrix_view<const float>, matrix_view<float>) noexcept;
  void (*gemm_nn)(gathered<float>, matrix_view<const float>, matrix_view<float>) noexcept;
  void (*gemm_tn)(gathered<float>, gathered<float>, dim, matrix_view<float>) noexcept;
  void (*axpy)(float, const float*, float*, dim) noexcept;
  float (*dot)(const float*, const float*, dim) noexcept;
};
template <class K>
inline constexpr float_kernels kernels_from_blocks{&product_nt<K, float>, &product_nt_packed<K, float>, &product_nn<K, float>,
                                                   &product_tn<K>,        &K::add_scaled,               &K::dot_product};

const float_kernels& compiled_float_kernels() noexcept;

template <int Build>
const float_kernels& float_kernels_in_use() noexcept {
#if defined(MOE_SEPARATE_KERNELS)
  return compiled_float_kernels();
#else
#if defined(MOE_X86)
  const cpu_level level = cpu_level_in_use();
  if (includes(level, cpu_level::avx512)) return kernels_from_blocks<blocks_avx512<Build>>;
  if (includes(level, cpu_level::avx2)) return kernels_from_blocks<blocks_avx2<Build>>;
#elif defined(__aarch64__)
  if (cpu_level_in_use() == cpu_level::neon) return kernels_from_blocks<blocks_neon<Build>>;
#endif
  return kernels_from_blocks<lane_blocks<plain_lanes<Build>>>;
#endif
}
#if defined(MOE_DEFINE_KERNELS)
const float_kernels& compiled_float_kernels() noexcept { return float_kernels_in_use<moe::detail::build_level>(); }
#endif

}  // namespace detail

template <int Build>
void gemm_nt(basic_dynamic<Build>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::float_kernels_in_use<Build>().gemm_nt(a, b, c);
}
template <int Build>
void gemm_nt_packed(basic_dynamic<Build>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::float_kernels_in_use<Build>().gemm_nt_packed(a, b, c);
}
template <int Build>
void gemm_nn(basic_dynamic<Build>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::float_kernels_in_use<Build>().gemm_nn(a, b, c);
}
template <int Build>
void gemm_tn(basic_dynamic<Build>, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  detail::float_kernels_in_use<Build>().gemm_tn(a, b, depth, c);
}
template <int Build>
void axpy(basic_dynamic<Build>, float w, const float* x, float* y, dim n) noexcept {
  detail::float_kernels_in_use<Build>().axpy(w, x, y, n);
}
template <int Build>
float dot(basic_dynamic<Build>, const float* x, const float* y, dim n) noexcept {
  return detail::float_kernels_in_use<Build>().dot(x, y, n);
}
/// f(j, lane) for j in 0 .. n in steps of the lane's width.
template <int Build, class F>
void for_each_lane(basic_dynamic<Build>, dim n, F f) noexcept {
#if defined(MOE_VECTORS)
  at_level_in_use<Build>([&](auto level) {
    using V = typename decltype(level)::type;
    for (dim j = 0; j < n; j += V::width) f(j, lanes_of_row<V>{n - j});
  });
#else
  for_each_lane(native{}, n, f);
#endif
}

}  // namespace moe::arch
