// SPDX-License-Identifier: Apache-2.0
/// The blocks of products and rows of float32 on 512-bit vectors; weights are float or bf16.
#pragma once

#include "moe/backend/cpu/ladder.hpp"
#include "moe/backend/host_blocks.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// The first n lanes of sixteen: none below 0, all from 16 on.
inline __mmask16 first_lanes(dim n) noexcept {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0);
}

/// As lane_blocks.
template <int Build>
struct blocks_avx512 {
  static constexpr int width = 16, dot_rows = 6, strips = 4;
  static constexpr dim columns = strips * width;

  template <int M, int N, class W>
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE static void dot_block(gathered<float> a, dim i, dim first, dim k, const W* b, dim stride, prefetch_walk ahead,
                                      matrix_view<float> c, dim step) noexcept {
    const float* x[M];
    __m512 sum[M][N];
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      x[m] = a.row(i + m) + first;
      MOE_UNROLL
      for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_ps();
    }
    dim p = 0;
    for (; p + width <= k; p += width, ahead.at += ahead.pace) {
      __m512 v[M];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) v[m] = _mm512_loadu_ps(x[m] + p);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        moe::detail::prefetch(ahead.at + n * stride * dim{sizeof(W)});
        const __m512 w = load(b + n * stride + p);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) sum[m][n] = _mm512_fmadd_ps(v[m], w, sum[m][n]);
      }
    }
    if (p < k) {
      const __mmask16 some = first_lanes(k - p);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        const __m512 w = load(b + n * stride + p, some);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) sum[m][n] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, x[m] + p), w, sum[m][n]);
      }
    }
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      float total[4];
      if constexpr (N == 4)
        sum_four(sum[m][0], sum[m][1], sum[m][2], sum[m][3], total);
      else
        sum_four(sum[m][0], _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), total);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) c(i + m, n * step) += total[n];
    }
  }

  template <int M>
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE static void outer_block(gathered<float> a, dim i, dim first, const float* packed, dim depth,
                                        const prefetch_list& ahead, float* c, dim ld, const idx* at = nullptr) noexcept {
    const float* x[M];
    float* y[M];
    __m512 sum[M][strips];
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      x[m] = a.row(i + m) + first;
      y[m] = c + (at ? at[m] : m) * ld;
      MOE_UNROLL
      for (int n = 0; n < strips; ++n) sum[m][n] = _mm512_loadu_ps(y[m] + n * width);
    }
    for (dim p = 0; p < depth; ++p, packed += columns) {
      ahead.ask(p);
      __m512 v[strips];
      MOE_UNROLL
      for (int n = 0; n < strips; ++n) v[n] = _mm512_loadu_ps(packed + n * width);
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m512 w = _mm512_set1_ps(x[m][p]);
        MOE_UNROLL
        for (int n = 0; n < strips; ++n) sum[m][n] = _mm512_fmadd_ps(w, v[n], sum[m][n]);
      }
    }
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      MOE_UNROLL
      for (int n = 0; n < strips; ++n) _mm512_storeu_ps(y[m] + n * width, sum[m][n]);
    }
  }

  template <dim Step = columns>
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE static void transpose(const float* const* row, dim first, float* to) noexcept {
    // A vector takes four floats of four rows that are four apart; then fours of four are transposed in place.
    for (int q = 0; q < 4; ++q, first += 4, to += 4 * Step) {
      __m512 v[4];
      MOE_UNROLL
      for (int j = 0; j < 4; ++j) {
        v[j] = _mm512_castps128_ps512(_mm_loadu_ps(row[j] + first));
        v[j] = _mm512_insertf32x4(v[j], _mm_loadu_ps(row[j + 4] + first), 1);
        v[j] = _mm512_insertf32x4(v[j], _mm_loadu_ps(row[j + 8] + first), 2);
        v[j] = _mm512_insertf32x4(v[j], _mm_loadu_ps(row[j + 12] + first), 3);
      }
      const __m512 a = _mm512_maskz_unpacklo_ps(all, v[0], v[1]), b = _mm512_maskz_unpackhi_ps(all, v[0], v[1]);
      const __m512 c = _mm512_maskz_unpacklo_ps(all, v[2], v[3]), d = _mm512_maskz_unpackhi_ps(all, v[2], v[3]);
      _mm512_storeu_ps(to, _mm512_shuffle_ps(a, c, 0x44));
      _mm512_storeu_ps(to + Step, _mm512_shuffle_ps(a, c, 0xee));
      _mm512_storeu_ps(to + 2 * Step, _mm512_shuffle_ps(b, d, 0x44));
      _mm512_storeu_ps(to + 3 * Step, _mm512_shuffle_ps(b, d, 0xee));
    }
  }

  static void widen(const float* from, float* to, dim n) noexcept {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
  }
  MOE_TARGET(MOE_AVX512)
  static void widen(const bf16* from, float* to, dim n) noexcept {
    dim j = 0;
    for (; j + width <= n; j += width) _mm512_storeu_ps(to + j, load(from + j));
    if (j < n) _mm512_mask_storeu_ps(to + j, first_lanes(n - j), load(from + j, first_lanes(n - j)));
  }

  MOE_TARGET(MOE_AVX512)
  static void add_scaled(float w, const float* x, float* y, dim n) noexcept {
    const __m512 weight = _mm512_set1_ps(w);
    dim j = 0;
    for (; j + width <= n; j += width)
      _mm512_storeu_ps(y + j, _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + j), _mm512_loadu_ps(y + j)));
    if (j == n) return;
    const __mmask16 some = first_lanes(n - j);
    const __m512 last = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(some, x + j), _mm512_maskz_loadu_ps(some, y + j));
    _mm512_mask_storeu_ps(y + j, some, last);
  }

  MOE_TARGET(MOE_AVX512)
  static float dot_product(const float* x, const float* y, dim n) noexcept {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    dim j = 0;
    for (; j + 4 * width <= n; j += 4 * width) {
      MOE_UNROLL
      for (int i = 0; i < 4; ++i)
        sum[i] = _mm512_fmadd_ps(_mm512_loadu_ps(x + j + i * width), _mm512_loadu_ps(y + j + i * width), sum[i]);
    }
    for (; j < n; j += width) {
      const __mmask16 some = first_lanes(n - j);
      sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, x + j), _mm512_maskz_loadu_ps(some, y + j), sum[0]);
    }
    float total[4];
    sum_four(sum[0], sum[1], sum[2], sum[3], total);
    return (total[0] + total[1]) + (total[2] + total[3]);
  }

 private:
  static constexpr __mmask16 all = 0xffff;  // without a mask GCC 12 warns of undefined registers in its own header

  /// The vector at p; the lanes of `some` and zeros.
  MOE_TARGET(MOE_AVX512)
  static __m512 load(const float* p) noexcept { return _mm512_loadu_ps(p); }
  MOE_TARGET(MOE_AVX512)
  static __m512 load(const float* p, __mmask16 some) noexcept { return _mm512_maskz_loadu_ps(some, p); }
  MOE_TARGET(MOE_AVX512)
  static __m512 load(const bf16* p) noexcept { return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  MOE_TARGET(MOE_AVX512)
  static __m512 load(const bf16* p, __mmask16 some) noexcept { return wide(_mm256_maskz_loadu_epi16(some, p)); }
  MOE_TARGET(MOE_AVX512)
  static __m512 wide(__m256i halves) noexcept {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  /// s[0 .. 4] = the sums of the lanes of a, b, c and d, each in the same order.
  MOE_TARGET(MOE_AVX512)
  static void sum_four(__m512 a, __m512 b, __m512 c, __m512 d, float* s) noexcept {
    const __m512 ab = _mm512_add_ps(_mm512_maskz_unpacklo_ps(all, a, b), _mm512_maskz_unpackhi_ps(all, a, b));
    const __m512 cd = _mm512_add_ps(_mm512_maskz_unpacklo_ps(all, c, d), _mm512_maskz_unpackhi_ps(all, c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 low = _mm512_maskz_extractf32x8_ps(0xff, abcd, 0), high = _mm512_maskz_extractf32x8_ps(0xff, abcd, 1);
    const __m256 halves = _mm256_add_ps(low, high);
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
};

}  // namespace moe::arch::detail

#endif
