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
  static void rank(float* s, dim n, idx first, float* best, idx* which, dim room) noexcept {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (const __m512 least = _mm512_set1_ps(-moe::detail::infinity);;) {  // takes the largest, one after the other
      __m512 most = least;
      __m512i at = lane;
      for (dim j = 0; j < n; j += width) {
        const __m512 v = _mm512_mask_loadu_ps(least, lanes(0, n - j), s + j);
        const __mmask16 better = _mm512_cmp_ps_mask(v, most, _CMP_GT_OQ);
        most = _mm512_mask_mov_ps(most, better, v);
        at = _mm512_mask_add_epi32(at, better, lane, _mm512_set1_epi32(static_cast<int>(j)));
      }
      const float value = _mm512_reduce_max_ps(most);
      if (!(value > best[room - 1])) return;
      const __mmask16 equal = _mm512_cmp_ps_mask(most, _mm512_set1_ps(value), _CMP_EQ_OQ);
      const idx j = _mm512_mask_reduce_min_epi32(equal, at);
      s[j] = -moe::detail::infinity;
      attention_loops<blocks>::insert(value, first + j, best, which, room);
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

  /// Lanes lo .. hi of the floats at p, and zeros.
  MOE_TARGET(MOE_AVX512)
  static __m512 seen_floats(const float* p, dim lo, dim hi) noexcept { return _mm512_maskz_loadu_ps(lanes(lo, hi), p); }

 private:
  /// Lanes lo .. hi of a vector.
  MOE_TARGET(MOE_AVX512)
  static __mmask16 lanes(dim lo, dim hi) noexcept {
    const unsigned below_hi = hi < width ? (hi > 0 ? (1u << hi) - 1 : 0u) : 0xffffu;
    const unsigned below_lo = lo > 0 ? (lo < width ? (1u << lo) - 1 : 0xffffu) : 0u;
    return static_cast<__mmask16>(below_hi & ~below_lo);
  }
};

}  // namespace moe::arch::detail

#endif
