// SPDX-License-Identifier: Apache-2.0
/// The elementwise part of attention on 512-bit vectors. As attention_loops.
#pragma once

#include "moe/backend/attention_rules.hpp"
#include "moe/backend/cpu/blocks_avx512.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// 2^x by exp2_terms: 0 below exp2_least; NaN stays.
MOE_TARGET(MOE_AVX512)
inline __m512 exp2_512(__m512 x) noexcept {
  constexpr __mmask16 all = 0xffff;  // without a mask GCC 12 warns of undefined registers in its own header
  x = _mm512_maskz_max_ps(all, _mm512_set1_ps(exp2_least), x);  // NaN stays, as the second operand
  const __m512 whole = _mm512_maskz_roundscale_ps(all, x, 0), part = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(exp2_terms[4]);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(exp2_terms[3]));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(exp2_terms[2]));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(exp2_terms[1]));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(exp2_terms[0]));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.f));
  return _mm512_maskz_scalef_ps(all, p, whole);
}

template <int Build>
struct attention_avx512 {
  using blocks = blocks_avx512<Build>;
  static constexpr dim width = 16;

  MOE_TARGET(MOE_AVX512)
  static void widen(const f16* from, float* to, dim n) noexcept {
    for (dim j = 0; j < n; j += width) {
      const __mmask16 some = lanes(0, n - j);
      _mm512_mask_storeu_ps(to + j, some, _mm512_maskz_cvtph_ps(some, _mm256_maskz_loadu_epi16(some, from + j)));
    }
  }
  MOE_TARGET(MOE_AVX512)
  static void scale(float* x, float w, dim n) noexcept {
    const __m512 weight = _mm512_set1_ps(w);
    for (dim j = 0; j < n; j += width) {
      const __mmask16 some = lanes(0, n - j);
      _mm512_mask_storeu_ps(x + j, some, _mm512_mul_ps(weight, _mm512_maskz_loadu_ps(some, x + j)));
    }
  }
  MOE_TARGET(MOE_AVX512)
  static void rank(const float* const* s, const idx* n, idx first, float* best, idx* which, dim room) noexcept {
    static_assert(rank_rows == width);
    const __m512i ends = _mm512_loadu_si512(n);
    float turned[width * width];
    for (dim p = 0, end = _mm512_reduce_max_epi32(ends); p < end; p += width) {
      blocks::template transpose<width>(s, p, turned);
      for (dim j = p; j < end && j < p + width; ++j) {
        const __mmask16 seen = _mm512_cmpgt_epi32_mask(ends, _mm512_set1_epi32(static_cast<int>(j)));
        const __m512 score = _mm512_mask_loadu_ps(_mm512_set1_ps(-moe::detail::infinity), seen, turned + (j - p) * width);
        insert(score, _mm512_set1_epi32(first + static_cast<idx>(j)), best, which, room);
      }
    }
  }
  MOE_TARGET(MOE_AVX512)
  static float softmax(float* s, dim lo, dim hi, float& largest, float& sum) noexcept {
    __m512 most = _mm512_set1_ps(largest);
    for (dim j = lo / width * width; j < hi; j += width)
      most = _mm512_mask_max_ps(most, lanes(lo - j, hi - j), most, _mm512_loadu_ps(s + j));
    const float found = _mm512_reduce_max_ps(most), base = found == -moe::detail::infinity ? 0.f : found;
    __m512 total = _mm512_setzero_ps();
    for (dim j = lo / width * width; j < hi; j += width) {
      const __mmask16 seen = lanes(lo - j, hi - j);
      const __m512 p = exp2_512(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(base)));
      _mm512_storeu_ps(s + j, p);
      total = _mm512_mask_add_ps(total, seen, total, p);
    }
    const float fade = _mm512_cvtss_f32(exp2_512(_mm512_set1_ps(largest - base)));
    largest = found;
    sum = sum * fade + _mm512_reduce_add_ps(total);
    return fade;
  }
  MOE_TARGET(MOE_AVX512)
  static void slopes(float* s, float* dp, dim lo, dim hi, dim n, float lse, float delta) noexcept {
    for (dim j = 0; j < n; j += width) {
      const __mmask16 seen = lanes(lo - j, hi - j);
      const __m512 p = _mm512_maskz_mov_ps(seen, exp2_512(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(lse))));
      _mm512_storeu_ps(s + j, p);
      _mm512_storeu_ps(dp + j, _mm512_maskz_mul_ps(seen, p, _mm512_sub_ps(_mm512_loadu_ps(dp + j), _mm512_set1_ps(delta))));
    }
  }

  /// Lanes lo .. hi of a vector.
  MOE_TARGET(MOE_AVX512)
  static __mmask16 lanes(dim lo, dim hi) noexcept {
    return static_cast<__mmask16>(first_lanes(hi) & ~first_lanes(lo));
  }
  /// Lanes lo .. hi of the floats at p, and zeros.
  MOE_TARGET(MOE_AVX512)
  static __m512 seen_floats(const float* p, dim lo, dim hi) noexcept { return _mm512_maskz_loadu_ps(lanes(lo, hi), p); }

  /// Into the best of each lane: what is below it moves on by one.
  MOE_TARGET(MOE_AVX512)
  static void insert(__m512 score, __m512i numbers, float* best, idx* which, dim room) noexcept {
    if (_mm512_cmp_ps_mask(score, _mm512_loadu_ps(best + (room - 1) * width), _CMP_GT_OQ) == 0) return;
    __mmask16 below = 0;
    for (dim at = 0; at < room * width; at += width) {
      const __m512 old = _mm512_loadu_ps(best + at);
      const __m512i old_numbers = _mm512_loadu_si512(which + at);
      below = static_cast<__mmask16>(below | _mm512_cmp_ps_mask(score, old, _CMP_GT_OQ));
      _mm512_storeu_ps(best + at, _mm512_mask_mov_ps(old, below, score));
      _mm512_storeu_si512(which + at, _mm512_mask_mov_epi32(old_numbers, below, numbers));
      score = _mm512_mask_mov_ps(score, below, old);
      numbers = _mm512_mask_mov_epi32(numbers, below, old_numbers);
    }
  }
};

}  // namespace moe::arch::detail

#endif
