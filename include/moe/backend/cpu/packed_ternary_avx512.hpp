// SPDX-License-Identifier: Apache-2.0
/// Products with weights of two bits on 512-bit vectors: a line from memory is four lines of codes 0, 1, 2, two bits apart.
#pragma once

#include "moe/backend/cpu/packed_avx512.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// M rows against a panel. Few rows take the codes where they are, 4, 16 and 64 times their value, each kind into sums of
/// its own: what is left to do for a line is little while the next comes from memory.
template <int Build, int M>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void multiply_block_ternary(const block_work& w) noexcept {
  using rule = packing<ternary>;
  constexpr int kinds = M <= 2 ? 4 : 1;
  int_lanes left[M][kinds], right[M][kinds];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int n = 0; n < kinds; ++n) left[m][n] = right[m][n] = int_lanes{};
  }
  const std::byte *x = w.a, *q = w.weights, *ahead = w.ahead;
  for (dim l = 0; l < w.lines; ++l, x += w.a_step, q += rule::step_bytes) {
    MOE_NO_UNROLL
    for (int i = 0; i < 4; ++i) {
      const std::byte* at = q + i * line_bytes;
      ask_ahead<2>(ahead, w.pace, at, rule::half_bytes);
      __m512i u = _mm512_loadu_si512(at), v = _mm512_loadu_si512(at + rule::half_bytes);
      MOE_UNROLL
      for (int n = 0; n < 4; ++n) {
        const __m512i mask = _mm512_set1_epi8(static_cast<char>(kinds == 1 ? 3 : 3 << 2 * n));
        const __m512i low = _mm512_and_si512(u, mask), high = _mm512_and_si512(v, mask);
        if constexpr (kinds == 1) {
          u = _mm512_srli_epi16(u, 2);
          v = _mm512_srli_epi16(v, 2);
        }
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          std::int32_t four;
          std::memcpy(&four, x + 64 * m + 16 * n + 4 * i, 4);
          const __m512i b = _mm512_set1_epi32(four);
          left[m][n % kinds] = (int_lanes)_mm512_dpbusd_epi32((__m512i)left[m][n % kinds], low, b);
          right[m][n % kinds] = (int_lanes)_mm512_dpbusd_epi32((__m512i)right[m][n % kinds], high, b);
        }
      }
    }
  }
  const __m512 s = _mm512_loadu_ps(w.scale), t = _mm512_loadu_ps(w.scale + 16);
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int n = 1; n < kinds; ++n) {
      const __m512i places = _mm512_set1_epi32(2 * n);
      left[m][0] = (int_lanes)_mm512_add_epi32((__m512i)left[m][0], _mm512_srav_epi32((__m512i)left[m][n], places));
      right[m][0] = (int_lanes)_mm512_add_epi32((__m512i)right[m][0], _mm512_srav_epi32((__m512i)right[m][n], places));
    }
    const float* f = w.factors + m * w.factor_count;
    const __m512 unit = _mm512_set1_ps(f[0]), shift = _mm512_set1_ps(f[1]);
    const __m512 y = _mm512_sub_ps(_mm512_cvtepi32_ps((__m512i)left[m][0]), shift),
                 z = _mm512_sub_ps(_mm512_cvtepi32_ps((__m512i)right[m][0]), shift);
    _mm512_storeu_ps(w.c + m * w.ld, _mm512_mul_ps(_mm512_mul_ps(unit, s), y));
    _mm512_storeu_ps(w.c + m * w.ld + 16, _mm512_mul_ps(_mm512_mul_ps(unit, t), z));
  }
}
template <int Build>
void multiply_ternary_512(const prepared_rows& a, const panel_product& p) noexcept {
  for_each_panel_block(a, p, [](dim height, const block_work& w) {
    with_constant<rows_512>(height, [&](auto m) { multiply_block_ternary<Build, m>(w); });
  });
}

/// Codes of a panel as bytes.
template <int Build>
class ternary_codes {
 public:
  static constexpr dim step_bytes = packing<ternary>::step_bytes;

  explicit ternary_codes(const std::byte* panel, const float*) noexcept : panel_(panel) {}
  /// Half h of the panel, a step's rows 0 .. 15 or 16 .. 31, as a tile.
  MOE_TARGET(MOE_AVX512)
  MOE_INLINE void widen(dim h, std::byte* to) const noexcept {
    const std::byte* lines = panel_ + h * packing<ternary>::half_bytes;
    const __m512i mask = _mm512_set1_epi8(3);
    MOE_UNROLL
    for (int line = 0; line < 4; ++line) {
      __m512i v = _mm512_loadu_si512(lines + line * line_bytes);
      MOE_UNROLL
      for (int n = 0; n < 4; ++n) {
        _mm512_storeu_si512(to + (4 * n + line) * line_bytes, _mm512_and_si512(v, mask));
        v = _mm512_srli_epi16(v, 2);
      }
    }
  }

 private:
  const std::byte* panel_;
};

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build>
packed_kernels kernels_of(basic_avx512_vnni<Build>, weights_of<ternary>) noexcept {
  return {operand::i8,
          detail::rows_512,
          16 * detail::rows_512,
          false,
          0,
          detail::prepare_i8_512<Build, ternary>,
          detail::multiply_ternary_512<Build>};
}

}  // namespace moe::arch

#endif
