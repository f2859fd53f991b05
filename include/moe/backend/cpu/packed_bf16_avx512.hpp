// SPDX-License-Identifier: Apache-2.0
/// Products of halves on 512-bit vectors: rows are rounded to bf16, an instruction multiplies pairs of halves into floats.
#pragma once

#include "moe/backend/cpu/packed_avx512.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// Bits of v rounded to bf16, in the upper half of each lane; a NaN stays one. The lower halves hold anything.
MOE_TARGET(MOE_AVX512)
inline __m512i rounded_halves(__m512 v) noexcept {
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_or_epi32(near, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
}
/// to[j] = from[j], rounded. `to` may be where `from` is, but not with `Past`, which writes whole lines past the caches.
template <int Build, bool Past = false>
MOE_TARGET(MOE_AVX512)
void round_floats(const float* from, bf16* to, dim n) noexcept {
  alignas(64) static constexpr std::uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                          33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const bool past = Past && reinterpret_cast<std::uintptr_t>(to) % line_bytes == 0;
  dim j = 0;
  for (const __m512i order = _mm512_load_si512(upper); j + 32 <= n; j += 32) {
    const __m512i low = rounded_halves(_mm512_loadu_ps(from + j)), high = rounded_halves(_mm512_loadu_ps(from + j + 16));
    const __m512i halves = _mm512_permutex2var_epi16(low, order, high);
    if (past)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + j), halves);
    else
      _mm512_storeu_si512(to + j, halves);
  }
  for (; j < n; j += 16) {
    const __mmask16 some = static_cast<__mmask16>(n - j < 16 ? (1u << (n - j)) - 1 : 0xffff);
    const __m512i halves = _mm512_srli_epi32(rounded_halves(_mm512_maskz_loadu_ps(some, from + j)), 16);
    _mm512_mask_cvtepi32_storeu_epi16(to + j, some, halves);
  }
}

/// Halves, the last line filled up with zeros.
template <int Build>
void prepare_bf16_512(const float* x, dim k, std::byte* to, float*, bool) noexcept {
  const dim padded = moe::detail::round_up(k, 32);
  auto* halves = reinterpret_cast<bf16*>(to);
  round_floats<Build>(x, halves, k);
  std::memset(static_cast<void*>(halves + k), 0, static_cast<std::size_t>(padded - k) * sizeof(bf16));
}

/// v as the operand of products of halves.
MOE_TARGET(MOE_AVX512_BF16)
MOE_INLINE __m512bh pairs_of_halves(__m512i v) noexcept {
  __m512bh pairs;
  std::memcpy(&pairs, &v, sizeof pairs);
  return pairs;
}
/// sum[h][m] += x W^T over one line of a row of x: a tile of weights from q on, of H halves of a panel.
template <int M, int H>
MOE_TARGET(MOE_AVX512_BF16)
MOE_INLINE
    void add_pairs(const std::byte* a, const std::byte*& q, const std::byte*& ahead, dim pace, __m512 (*sum)[M]) noexcept {
  MOE_NO_UNROLL
  for (int i = 0; i < 16; ++i, q += line_bytes) {
    ask_ahead<H>(ahead, pace, q);
    __m512i w[H];
    MOE_UNROLL
    for (int h = 0; h < H; ++h) w[h] = _mm512_loadu_si512(q + h * tile_bytes);
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      std::int32_t two;
      std::memcpy(&two, a + 64 * m + 4 * i, 4);
      const __m512bh x = pairs_of_halves(_mm512_set1_epi32(two));
      MOE_UNROLL
      for (int h = 0; h < H; ++h) sum[h][m] = _mm512_dpbf16_ps(sum[h][m], pairs_of_halves(w[h]), x);
    }
  }
}
template <int Build, int M>
MOE_TARGET(MOE_AVX512_BF16)
MOE_NO_INLINE void multiply_block_pairs(const block_work& w) noexcept {
  constexpr int H = halves_at_once<M>;
  __m512 sum[2][M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) sum[0][m] = sum[1][m] = _mm512_setzero_ps();
  const std::byte *a = w.a, *q = w.weights, *ahead = w.ahead;
  for (dim l = 0; l < w.lines; ++l, a += w.a_step) {
    MOE_UNROLL
    for (int h = 0; h < 2; h += H) add_pairs<M, H>(a, q, ahead, w.pace, sum + h);
    if (H == 2) q += tile_bytes;
  }
  store_sums<M>(w, sum);
}
template <int Build>
void multiply_pairs_512(const prepared_rows& a, const panel_product& p) noexcept {
  for_each_panel_block(a, p, [](dim height, const block_work& w) {
    with_constant<rows_512>(height, [&](auto m) { multiply_block_pairs<Build, m>(w); });
  });
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build>
packed_kernels kernels_of(basic_avx512_bf16<Build>, weights_of<bf16>) noexcept {
  return {operand::bf16,
          detail::rows_512,
          16 * detail::rows_512,
          false,
          0,
          detail::prepare_bf16_512<Build>,
          detail::multiply_pairs_512<Build>};
}

}  // namespace moe::arch

#endif
