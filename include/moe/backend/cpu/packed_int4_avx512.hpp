// SPDX-License-Identifier: Apache-2.0
/// Products with four-bit weights on 512-bit vectors. A block of rows takes the halves of bytes as they come from memory,
/// adds up each group of weights as integers and scales the sum. Many rows widen a panel to bytes once, with one scale a row
/// of it, as tiles do, which add up whole rows.
#pragma once

#include "moe/backend/cpu/packed_avx512.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

template <class Scale>
MOE_TARGET(MOE_AVX512_VNNI)
inline __m512 load_scales(const std::byte* s) noexcept {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s));
  if constexpr (std::same_as<Scale, f16>)
    return _mm512_cvtph_ps(halves);
  else
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/// The rows from which a panel is widened.
template <class T>
inline constexpr dim rows_to_widen = T::group == 32 ? 40 : 96;

/// The q + 8 of a line, from the lower or the upper halves of its bytes.
template <bool Upper>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_INLINE __m512i load_halves(const std::byte* q) noexcept {
  const __m512i v = _mm512_loadu_si512(q);
  return _mm512_and_si512(Upper ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
}
/// left[m] and right[m] += weights times x over 32 k: 8 lines of either half of a panel. Asks for as many lines from the
/// second cache, `Step` bytes on, and for 8 paces of weights from memory.
template <bool Upper, dim Step, int M>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_INLINE void add_lines(const std::byte* q, const std::byte* x, const std::byte*& ahead, dim pace, int_lanes* left,
                          int_lanes* right) noexcept {
  MOE_UNROLL
  for (int i = 0; i < 8; ++i, ahead += pace) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(q + Step + (8 * Upper + i) * line_bytes), _MM_HINT_T0);
    const __m512i u = load_halves<Upper>(q + i * line_bytes), v = load_halves<Upper>(q + (8 + i) * line_bytes);
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      std::int32_t four;
      std::memcpy(&four, x + 64 * m + 4 * i, 4);
      const __m512i b = _mm512_set1_epi32(four);
      left[m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)left[m], u, b);
      right[m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)right[m], v, b);
    }
  }
}

/// M rows against a panel. The sum of a group starts with the row's factor for it, since weights are q + 8.
template <int Build, class T, int M>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void multiply_block_groups(const block_work& w) noexcept {
  using rule = packing<T>;
  constexpr bool fine = T::group == 32;
  int_lanes left[M], right[M];
  __m512 left_total[M], right_total[M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) left_total[m] = right_total[m] = _mm512_setzero_ps();
  const std::byte *x = w.a, *q = w.weights, *scales = q + 2048, *ahead = w.ahead;
  const dim pace = (w.pace + 1) / 2;  // for each line read here
  const float* start = w.factors + 2;
  for (dim l = 0; l < w.lines; ++l, x += w.a_step, q += tile_bytes) {
    MOE_UNROLL
    for (int part = 0; part < 2; ++part) {  // 32 k each
      if (fine || (part == 0 && l % 2 == 0)) {
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          std::int32_t sum;
          std::memcpy(&sum, start + m * w.factor_count, 4);
          left[m] = right[m] = (int_lanes)_mm512_set1_epi32(sum);
        }
        ++start;
      }
      if (part == 0)
        add_lines<false, rule::step_bytes, M>(q, x, ahead, pace, left, right);
      else
        add_lines<true, rule::step_bytes, M>(q, x + 32, ahead, pace, left, right);
      if (fine || (part == 1 && l % 2 == 1)) {
        const __m512 s = load_scales<typename T::scale>(scales), t = load_scales<typename T::scale>(scales + panel_rows);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          left_total[m] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps((__m512i)left[m]), left_total[m]);
          right_total[m] = _mm512_fmadd_ps(t, _mm512_cvtepi32_ps((__m512i)right[m]), right_total[m]);
        }
        scales += 2 * panel_rows;
      }
    }
    if (l % 2 == 0) continue;
    for (dim s = 0; s < rule::scale_bytes; s += line_bytes, ahead += pace) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(scales + rule::step_bytes - rule::scale_bytes + s), _MM_HINT_T0);
    }
    scales += rule::step_bytes - rule::scale_bytes;
    q += rule::scale_bytes;
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    const __m512 unit = _mm512_set1_ps(w.factors[m * w.factor_count]);
    _mm512_storeu_ps(w.c + m * w.ld, _mm512_mul_ps(unit, left_total[m]));
    _mm512_storeu_ps(w.c + m * w.ld + 16, _mm512_mul_ps(unit, right_total[m]));
  }
}

/// The same for one row or two, tile after tile.
template <int Build, class T, int M>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void multiply_tiles_groups(const block_work& w) noexcept {
  using rule = packing<T>;
  using scale = typename T::scale;
  constexpr bool fine = T::group == 32;
  __m512 total[2][M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) total[0][m] = total[1][m] = _mm512_setzero_ps();
  const std::byte *x = w.a, *q = w.weights, *ahead = w.ahead;
  const dim pace = (w.pace + 1) / 2;  // for each line read here
  const float* start = w.factors + 2;
  for (dim l = 0; l < w.lines; l += 2, x += 2 * w.a_step, q += rule::scale_bytes, start += fine ? 4 : 1) {
    const std::byte* scales = q + 2048;
    int_lanes block[2][M];  // of groups of 128
    MOE_UNROLL
    for (int tile = 0; tile < 4; ++tile) {  // both halves of 64 k, then of the next
      const int h = tile % 2, groups = tile / 2 * 2;
      const std::byte* row = x + tile / 2 * w.a_step;
      int_lanes lower[M], upper[M];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        std::int32_t sums[2] = {};
        if (fine)
          std::memcpy(sums, start + m * w.factor_count + groups, 8);
        else if (tile < 2)
          std::memcpy(sums, start + m * w.factor_count, 4);
        lower[m] = fine || tile < 2 ? (int_lanes)_mm512_set1_epi32(sums[0]) : block[h][m];
        upper[m] = (int_lanes)_mm512_set1_epi32(sums[1]);
      }
      MOE_NO_UNROLL
      for (int i = 0; i < 8; ++i, q += line_bytes, ahead += pace) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(q + from_second), _MM_HINT_T0);
        const __m512i u = load_halves<false>(q), v = load_halves<true>(q);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          std::int32_t four[2];
          std::memcpy(&four[0], row + 64 * m + 4 * i, 4);
          std::memcpy(&four[1], row + 64 * m + 32 + 4 * i, 4);
          lower[m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)lower[m], u, _mm512_set1_epi32(four[0]));
          upper[m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)upper[m], v, _mm512_set1_epi32(four[1]));
        }
      }
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        if constexpr (fine) {
          const std::byte* of = scales + groups * 64 + h * 32;
          total[h][m] = _mm512_fmadd_ps(load_scales<scale>(of), _mm512_cvtepi32_ps((__m512i)lower[m]), total[h][m]);
          total[h][m] = _mm512_fmadd_ps(load_scales<scale>(of + 64), _mm512_cvtepi32_ps((__m512i)upper[m]), total[h][m]);
        } else {
          block[h][m] = (int_lanes)_mm512_add_epi32((__m512i)lower[m], (__m512i)upper[m]);
          if (tile >= 2)
            total[h][m] =
                _mm512_fmadd_ps(load_scales<scale>(scales + h * 32), _mm512_cvtepi32_ps((__m512i)block[h][m]), total[h][m]);
        }
      }
    }
    for (dim s = 0; s < rule::scale_bytes; s += line_bytes, ahead += pace)
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    const __m512 unit = _mm512_set1_ps(w.factors[m * w.factor_count]);
    MOE_UNROLL
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(w.c + m * w.ld + 16 * h, _mm512_mul_ps(unit, total[h][m]));
  }
}

/// Codes of a panel as bytes p + 128, w ~ scale p, scale as packed for each row. With r the ratio of a group's scale to its
/// row's, 256 (r q + 128.5) is a word whose upper byte is the rounded one; all of it is exact modulo 2^16 but r, which is
/// rounded to 1/256.
template <int Build, class T>
class int4_codes {
 public:
  static constexpr dim step_bytes = packing<T>::step_bytes / 2;  ///< of 64 k

  MOE_TARGET(MOE_AVX512_VNNI)
  int4_codes(const std::byte* panel, const float* row_scale) noexcept : panel_(panel) {
    for (int i = 0; i < panel_rows; i += 16) {
      const __m512 s = _mm512_loadu_ps(row_scale + i);
      const __mmask16 some = _mm512_cmp_ps_mask(s, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
      _mm512_storeu_ps(per_ + i, _mm512_maskz_div_ps(some, _mm512_set1_ps(256), s));
    }
  }
  /// Half h of the panel, a step's rows 0 .. 15 or 16 .. 31, as a tile.
  MOE_TARGET(MOE_AVX512_VNNI)
  MOE_INLINE void widen(dim h, std::byte* to) const noexcept {
    const dim step = h / 2, side = h % 2;
    const std::byte* block = panel_ + step / 2 * packing<T>::step_bytes;
    const std::byte *lines = block + (step % 2 * 2 + side) * 512, *scales = block + 2048 + side * 32;
    const __m512 per = _mm512_loadu_ps(per_ + side * 16);
    const dim group = step % 2 * 64 / T::group * 64;
    const __m512i lower = ratio(scales + group, per), upper = T::group == 32 ? ratio(scales + group + 64, per) : lower;
    const __m512i lower_start = start(lower), upper_start = start(upper), code = _mm512_set1_epi16(15);
    MOE_UNROLL
    for (int i = 0; i < 8; ++i, to += line_bytes) {
      const __m512i v = _mm512_loadu_si512(lines + i * line_bytes);
      _mm512_storeu_si512(
          to, bytes(_mm512_and_si512(v, code), _mm512_and_si512(_mm512_srli_epi16(v, 8), code), lower, lower_start));
      _mm512_storeu_si512(to + tile_bytes / 2, bytes(_mm512_and_si512(_mm512_srli_epi16(v, 4), code),
                                                     _mm512_srli_epi16(v, 12), upper, upper_start));
    }
  }

 private:
  /// 256 r in both words of each row.
  MOE_TARGET(MOE_AVX512_VNNI)
  MOE_INLINE static __m512i ratio(const std::byte* scales, __m512 per) noexcept {
    const __m512i r = _mm512_cvtps_epi32(_mm512_mul_ps(per, load_scales<typename T::scale>(scales)));
    return _mm512_or_si512(_mm512_slli_epi32(r, 16), _mm512_and_si512(r, _mm512_set1_epi32(0xffff)));
  }
  /// What makes 256 r (q + 8) the word that is wanted.
  MOE_TARGET(MOE_AVX512_VNNI)
  MOE_INLINE static __m512i start(__m512i ratio) noexcept {
    return _mm512_sub_epi16(_mm512_set1_epi16(static_cast<short>(0x8080)), _mm512_slli_epi16(ratio, 3));
  }
  /// From words with the codes of even and of odd bytes.
  MOE_TARGET(MOE_AVX512_VNNI)
  MOE_INLINE static __m512i bytes(__m512i even, __m512i odd, __m512i ratio, __m512i start) noexcept {
    even = _mm512_add_epi16(_mm512_mullo_epi16(even, ratio), start);
    odd = _mm512_add_epi16(_mm512_mullo_epi16(odd, ratio), start);
    const __m512i next = _mm512_set4_epi32(0x0f0f0d0d, 0x0b0b0909, 0x07070505, 0x03030101);
    return _mm512_mask_shuffle_epi8(odd, 0x5555555555555555u, even, next);
  }

  const std::byte* panel_;
  alignas(64) float per_[panel_rows];
};

template <int Build, class T>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void widen_panel(const std::byte* panel, dim steps, const float* row_scale, std::byte* to) noexcept {
  const int4_codes<Build, T> codes(panel, row_scale);
  for (dim h = 0; h < 2 * steps; ++h) codes.widen(h, to + h * tile_bytes);
}

template <int Build, class T>
void multiply_int4_512(const prepared_rows& a, const panel_product& p) noexcept {
  if (a.rows < rows_to_widen<T>) {
    for_each_panel_block(a, p, [](dim height, const block_work& w) {
      with_constant<rows_512>(height, [&](auto m) {
        if constexpr (halves_at_once<m> == 1)
          multiply_tiles_groups<Build, T, m>(w);
        else
          multiply_block_groups<Build, T, m>(w);
      });
    });
    return;
  }
  const dim k = a.lines * 64;
  for (dim j = 0; j < p.panels; ++j) {
    const float* scale = p.scale + j * panel_rows;
    const std::byte* panel = p.weights + j * p.panel_bytes;
    widen_panel<Build, T>(panel, a.lines, scale, p.scratch);
    for_each_panel_block(a, {p.scratch, panel_rows * k, 1, scale, nullptr, p.c.columns(j * panel_rows, panel_rows)},
                         multiply_rows_512<Build, std::int8_t>, panel + p.panel_bytes, p.panel_bytes);
  }
}

/// The same as prepare_i8, but that a group's factor is the integer that its sum starts with, since weights are q + 8.
template <int Build, int Group>
MOE_TARGET(MOE_AVX512_VNNI)
void prepare_groups_512(const float* x, dim k, std::byte* to, float* factors, bool) noexcept {
  prepare_i8_512<Build>(x, k, to, factors, false);
  const dim end = moe::detail::round_up(k, 128);
  if (moe::detail::round_up(k, 64) < end) std::memset(to + end - 64, 0, 64);
  const __m512i eights = _mm512_set1_epi8(8);
  for (dim i = 0; i < end; i += Group, ++factors) {
    __m512i sum = _mm512_setzero_si512();
    for (dim j = i; j < i + Group; j += 64) {
      const __mmask64 some = Group == 32 ? (i % 64 ? 0xffffffff00000000u : 0xffffffffu) : ~__mmask64{0};
      sum = _mm512_dpbusd_epi32(sum, eights, _mm512_maskz_loadu_epi8(some, to + j / 64 * 64));
    }
    const std::int32_t shift = -_mm512_reduce_add_epi32(sum);
    std::memcpy(factors + 2, &shift, 4);
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
          detail::prepare_groups_512<Build, Group>,
          detail::multiply_int4_512<Build, int4_groups<Group, Scale>>};
}

}  // namespace moe::arch

#endif
