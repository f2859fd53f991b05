// SPDX-License-Identifier: Apache-2.0
/// The elementwise part of attention on 256-bit vectors. As attention_loops.
#pragma once

#include "moe/backend/attention_rules.hpp"
#include "moe/backend/cpu/blocks_avx2.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// 2^x by exp2_terms: 0 from -127 down; NaN stays.
MOE_TARGET(MOE_AVX2)
inline __m256 exp2_256(__m256 x) noexcept {
  x = _mm256_max_ps(_mm256_set1_ps(-127), x);  // whose power has no exponent bits: 0. NaN stays, as the second operand
  const __m256i whole = _mm256_cvtps_epi32(x);
  const __m256 part = _mm256_sub_ps(x, _mm256_cvtepi32_ps(whole));
  __m256 p = _mm256_set1_ps(exp2_terms[4]);
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(exp2_terms[3]));
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(exp2_terms[2]));
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(exp2_terms[1]));
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(exp2_terms[0]));
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(1.f));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23)));
}

template <int Build>
struct attention_avx2 : attention_loops<blocks_avx2<Build>> {
  static constexpr dim width = 8;

  MOE_TARGET(MOE_AVX2)
  static void widen(const f16* from, float* to, dim n) noexcept {
    dim j = 0;
    for (; j + width <= n; j += width)
      _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
    for (; j < n; ++j) to[j] = static_cast<float>(from[j]);
  }
  MOE_TARGET(MOE_AVX2)
  static void scale(float* x, float w, dim n) noexcept {
    dim j = 0;
    for (; j + width <= n; j += width) _mm256_storeu_ps(x + j, _mm256_mul_ps(_mm256_set1_ps(w), _mm256_loadu_ps(x + j)));
    for (; j < n; ++j) x[j] *= w;
  }
  MOE_TARGET(MOE_AVX2)
  static float softmax(float* s, dim lo, dim hi, float& largest, float& sum) noexcept {
    __m256 most = _mm256_set1_ps(largest);
    for (dim j = lo / width * width; j < hi; j += width)
      most = _mm256_max_ps(most, _mm256_blendv_ps(_mm256_set1_ps(-moe::detail::infinity), _mm256_loadu_ps(s + j), lanes(lo - j, hi - j)));
    float lane[width];
    _mm256_storeu_ps(lane, most);
    float found = lane[0];
    for (int l = 1; l < width; ++l) found = lane[l] > found ? lane[l] : found;
    const float base = found == -moe::detail::infinity ? 0.f : found;
    __m256 total = _mm256_setzero_ps();
    for (dim j = lo / width * width; j < hi; j += width) {
      const __m256 p = exp2_256(_mm256_sub_ps(_mm256_loadu_ps(s + j), _mm256_set1_ps(base)));
      _mm256_storeu_ps(s + j, p);
      total = _mm256_add_ps(total, _mm256_and_ps(p, lanes(lo - j, hi - j)));
    }
    const float fade = _mm256_cvtss_f32(exp2_256(_mm256_set1_ps(largest - base)));
    largest = found;
    _mm256_storeu_ps(lane, total);
    sum = sum * fade + (((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7])));
    return fade;
  }
  MOE_TARGET(MOE_AVX2)
  static void slopes(float* s, float* dp, dim lo, dim hi, dim n, float lse, float delta) noexcept {
    for (dim j = 0; j < n; j += width) {
      const __m256 seen = lanes(lo - j, hi - j);
      const __m256 p = _mm256_and_ps(seen, exp2_256(_mm256_sub_ps(_mm256_loadu_ps(s + j), _mm256_set1_ps(lse))));
      const __m256 slope = _mm256_mul_ps(p, _mm256_sub_ps(_mm256_loadu_ps(dp + j), _mm256_set1_ps(delta)));
      _mm256_storeu_ps(s + j, p);
      _mm256_storeu_ps(dp + j, _mm256_and_ps(seen, slope));
    }
  }

 private:
  /// All bits of lanes lo .. hi.
  MOE_TARGET(MOE_AVX2)
  static __m256 lanes(dim lo, dim hi) noexcept {
    const auto bound = [](dim n) { return static_cast<int>(n < 0 ? 0 : n < width ? n : width); };
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(bound(lo)), number),
                                                   _mm256_cmpgt_epi32(_mm256_set1_epi32(bound(hi)), number)));
  }
};

}  // namespace moe::arch::detail

#endif
