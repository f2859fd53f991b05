// SPDX-License-Identifier: Apache-2.0
/// Products with four-bit weights on 512-bit vectors. A few rows take the halves of bytes as they come from memory, a scale
/// for every group; for more rows a panel is widened to bytes once, with one scale a row of it, and multiplied as such.
#pragma once

#include "moe/backend/cpu/packed_avx512.hpp"

#if defined(MOE_X86)

namespace moe::arch::detail {

inline constexpr int rows_of_groups = 4;

template <class Scale>
MOE_TARGET(MOE_AVX512_VNNI)
inline __m512 load_scales(const std::byte* s) noexcept {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s));
  if constexpr (std::same_as<Scale, f16>)
    return _mm512_cvtph_ps(halves);
  else
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/// M rows against a panel, group by group.
template <int Build, class T, int M>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void multiply_block_groups(const block_work& w) noexcept {
  using rule = packing<T>;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 left[M], right[M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) left[m] = right[m] = _mm512_setzero_ps();
  const std::byte *a = w.a, *q = w.weights, *ahead = w.ahead;
  const float* sums = w.factors + 2;
  for (dim l = 0; l < w.lines; l += 2, a += 2 * w.a_step, q += rule::step_bytes, sums += 4) {
    for (dim s = 0; s < rule::step_bytes && w.pace != 0; s += line_bytes, ahead += line_bytes)
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
    const std::byte* scales = q + 2048;
    MOE_NO_UNROLL
    for (int t = 0; t < 2; ++t) {
      __m512 sum[M];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) sum[m] = t ? right[m] : left[m];
      int_lanes lower[M], upper[M];
      MOE_NO_UNROLL
      for (int h = 0; h < 2; ++h) {
        if (T::group == 32 || h == 0) {
          MOE_UNROLL
          for (int m = 0; m < M; ++m) lower[m] = upper[m] = int_lanes{};
        }
        const std::byte *x = a + h * w.a_step, *lines = q + (2 * h + t) * 512;
        MOE_NO_UNROLL
        for (int i = 0; i < 8; ++i) {
          const __m512i v = _mm512_loadu_si512(lines + i * line_bytes);
          const __m512i u0 = _mm512_and_si512(v, low), u1 = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
          MOE_UNROLL
          for (int m = 0; m < M; ++m) {
            std::int32_t first, second;
            std::memcpy(&first, x + 64 * m + 4 * i, 4);
            std::memcpy(&second, x + 64 * m + 32 + 4 * i, 4);
            lower[m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)lower[m], u0, _mm512_set1_epi32(first));
            upper[m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)upper[m], u1, _mm512_set1_epi32(second));
          }
        }
        if constexpr (T::group == 32) {
          const __m512 s0 = load_scales<typename T::scale>(scales + 2 * h * 64 + t * 32);
          const __m512 s1 = load_scales<typename T::scale>(scales + (2 * h + 1) * 64 + t * 32);
          MOE_UNROLL
          for (int m = 0; m < M; ++m) {
            const float* f = sums + m * w.factor_count + 2 * h;
            sum[m] =
                _mm512_fmadd_ps(s0, _mm512_sub_ps(_mm512_cvtepi32_ps((__m512i)lower[m]), _mm512_set1_ps(8 * f[0])), sum[m]);
            sum[m] =
                _mm512_fmadd_ps(s1, _mm512_sub_ps(_mm512_cvtepi32_ps((__m512i)upper[m]), _mm512_set1_ps(8 * f[1])), sum[m]);
          }
        }
      }
      if constexpr (T::group == 128) {
        const __m512 s = load_scales<typename T::scale>(scales + t * 32);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          const float* f = sums + m * w.factor_count;
          const __m512i both = _mm512_add_epi32((__m512i)lower[m], (__m512i)upper[m]);
          sum[m] = _mm512_fmadd_ps(
              s, _mm512_sub_ps(_mm512_cvtepi32_ps(both), _mm512_set1_ps(8 * (f[0] + f[1] + f[2] + f[3]))), sum[m]);
        }
      }
      MOE_UNROLL
      for (int m = 0; m < M; ++m) (t ? right[m] : left[m]) = sum[m];
    }
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    const __m512 unit = _mm512_set1_ps(w.factors[m * w.factor_count]);
    _mm512_storeu_ps(w.c + m * w.ld, _mm512_mul_ps(unit, left[m]));
    _mm512_storeu_ps(w.c + m * w.ld + 16, _mm512_mul_ps(unit, right[m]));
  }
}

/// A panel of bytes q + 128 with w ~ scale q, scale as packed for each row: 2048 times the ratio of a group's scale to its
/// row's is multiplied with the weight at the top of a word, which leaves the rounded q in the upper byte.
template <int Build, class T>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void widen_panel(const std::byte* panel, dim k, const float* row_scale, std::byte* to) noexcept {
  using rule = packing<T>;
  const __m512i eights = _mm512_set1_epi8(static_cast<char>(0x88)), top = _mm512_set1_epi16(static_cast<short>(0xf000));
  const __m512i middle = _mm512_set1_epi16(static_cast<short>(0x8080)),
                upper = _mm512_set1_epi16(static_cast<short>(0xff00));
  for (int t = 0; t < 2; ++t) {
    const __m512 s = _mm512_loadu_ps(row_scale + 16 * t);
    const __m512 per = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(s, _mm512_set1_ps(1e-30f), _CMP_GT_OQ), _mm512_set1_ps(2048), s);
    for (dim b = 0; b < k / 128; ++b)
      for (int h = 0; h < 4; ++h) {  // 32 k each
        const std::byte* block = panel + b * rule::step_bytes;
        const __m512 ratio =
            _mm512_mul_ps(per, load_scales<typename T::scale>(block + 2048 + h * 32 / T::group * 64 + t * 32));
        const __m512i one = _mm512_min_epi32(_mm512_cvtps_epi32(ratio), _mm512_set1_epi32(32767));
        const __m512i factor = _mm512_or_si512(_mm512_slli_epi32(one, 16), _mm512_and_si512(one, _mm512_set1_epi32(0xffff)));
        const std::byte* lines = block + (h / 2 * 2 + t) * 512;
        std::byte* out = to + (2 * b + h / 2) * 2 * tile_bytes + t * tile_bytes + h % 2 * 512;
        MOE_NO_UNROLL
        for (int i = 0; i < 8; ++i) {
          __m512i v = _mm512_loadu_si512(lines + i * line_bytes);
          v = _mm512_xor_si512(h % 2 ? _mm512_srli_epi16(v, 4) : v, eights);
          const __m512i even = _mm512_mulhrs_epi16(_mm512_and_si512(_mm512_slli_epi16(v, 12), top), factor);
          const __m512i odd = _mm512_mulhrs_epi16(_mm512_and_si512(_mm512_slli_epi16(v, 4), top), factor);
          const __m512i e = _mm512_srli_epi16(_mm512_add_epi16(even, middle), 8),
                        o = _mm512_and_si512(_mm512_add_epi16(odd, middle), upper);
          _mm512_storeu_si512(out + i * line_bytes, _mm512_or_si512(e, o));
        }
      }
  }
}

template <int Build, class T>
void multiply_int4_512(const prepared_rows& a, const panel_product& p) noexcept {
  if (a.rows <= 2 * rows_of_groups) {
    for_each_panel_block(a, p, [](dim height, block_work w) {
      for (; height > 0; height -= rows_of_groups) {
        with_constant<rows_of_groups>(height < rows_of_groups ? height : rows_of_groups,
                                      [&](auto m) { multiply_block_groups<Build, T, m>(w); });
        w.a += rows_of_groups * line_bytes;
        w.factors += rows_of_groups * w.factor_count;
        w.c += rows_of_groups * w.ld;
        w.pace = 0;  // the panel is near now
      }
    });
    return;
  }
  const dim k = a.lines * 64;
  for (dim j = 0; j < p.panels; ++j) {
    const float* scale = p.scale + j * panel_rows;
    widen_panel<Build, T>(p.weights + j * p.panel_bytes, k, scale, p.scratch);
    multiply_512<Build, std::int8_t>(
        a, {p.scratch, panel_rows * k, 1, scale, nullptr, p.c.columns(j * panel_rows, panel_rows)});
  }
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, int Group, class Scale>
packed_kernels kernels_of(basic_avx512_vnni<Build>, weights_of<int4_groups<Group, Scale>>) noexcept {
  return {operand::i8,
          detail::rows_512,
          16 * detail::rows_512,
          true,
          32,
          detail::prepare_i8_512<Build>,
          detail::multiply_int4_512<Build, int4_groups<Group, Scale>>};
}

}  // namespace moe::arch

#endif
