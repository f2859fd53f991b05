// SPDX-License-Identifier: Apache-2.0
/// The blocks of products and rows of float32 on 256-bit vectors; weights are float or bf16.
#pragma once

#include "moe/backend/cpu/ladder.hpp"
#include "moe/backend/host_blocks.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// As lane_blocks.
template <int Build>
struct blocks_avx2 {
  static constexpr int width = 8, dot_rows = 3, strips = 2;
  static constexpr dim columns = strips * width;

  template <int M, int N, class W>
  MOE_TARGET(MOE_AVX2)
  MOE_NO_INLINE static void dot_block(gathered<float> a, dim i, dim first, dim k, const W* b, dim stride, prefetch_walk ahead,
                                      matrix_view<float> c, dim step) noexcept {
    const float* x[M];
    __m256 sum[M][N];
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      x[m] = a.row(i + m) + first;
      MOE_UNROLL
      for (int n = 0; n < N; ++n) sum[m][n] = _mm256_setzero_ps();
    }
    dim p = 0;
    for (; p + width <= k; p += width, ahead.at += ahead.pace) {
      __m256 v[M];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) v[m] = _mm256_loadu_ps(x[m] + p);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        moe::detail::prefetch(ahead.at + n * stride * dim{sizeof(W)});
        const __m256 w = load(b + n * stride + p);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) sum[m][n] = _mm256_fmadd_ps(v[m], w, sum[m][n]);
      }
    }
    if (p < k) {
      const __m256i some = first_lanes(k - p);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        const __m256 w = load(b + n * stride + p, k - p);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) sum[m][n] = _mm256_fmadd_ps(_mm256_maskload_ps(x[m] + p, some), w, sum[m][n]);
      }
    }
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      float total[4];
      if constexpr (N == 4)
        sum_four(sum[m][0], sum[m][1], sum[m][2], sum[m][3], total);
      else
        sum_four(sum[m][0], _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), total);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) c(i + m, n * step) += total[n];
    }
  }

  template <int M>
  MOE_TARGET(MOE_AVX2)
  MOE_NO_INLINE static void outer_block(gathered<float> a, dim i, dim first, const float* packed, dim depth,
                                        const prefetch_list& ahead, float* c, dim ld, const idx* at = nullptr) noexcept {
    const float* x[M];
    float* y[M];
    __m256 sum[M][strips];
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      x[m] = a.row(i + m) + first;
      y[m] = c + (at ? at[m] : m) * ld;
      MOE_UNROLL
      for (int n = 0; n < strips; ++n) sum[m][n] = _mm256_loadu_ps(y[m] + n * width);
    }
    for (dim p = 0; p < depth; ++p, packed += columns) {
      ahead.ask(p);
      const __m256 u = _mm256_loadu_ps(packed), v = _mm256_loadu_ps(packed + width);
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m256 w = _mm256_broadcast_ss(x[m] + p);
        sum[m][0] = _mm256_fmadd_ps(w, u, sum[m][0]);
        sum[m][1] = _mm256_fmadd_ps(w, v, sum[m][1]);
      }
    }
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      MOE_UNROLL
      for (int n = 0; n < strips; ++n) _mm256_storeu_ps(y[m] + n * width, sum[m][n]);
    }
  }

  template <dim Step = columns>
  MOE_TARGET(MOE_AVX2)
  MOE_NO_INLINE static void transpose(const float* const* row, dim first, float* to) noexcept {
    // A vector takes four floats of two rows that are four apart; then fours of four are transposed in place.
    for (int q = 0; q < 2; ++q, first += 4, to += 4 * Step) {
      __m256 v[4];
      MOE_UNROLL
      for (int j = 0; j < 4; ++j)
        v[j] = _mm256_set_m128(_mm_loadu_ps(row[j + 4] + first), _mm_loadu_ps(row[j] + first));
      const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
      const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
      _mm256_storeu_ps(to, _mm256_shuffle_ps(a, c, 0x44));
      _mm256_storeu_ps(to + Step, _mm256_shuffle_ps(a, c, 0xee));
      _mm256_storeu_ps(to + 2 * Step, _mm256_shuffle_ps(b, d, 0x44));
      _mm256_storeu_ps(to + 3 * Step, _mm256_shuffle_ps(b, d, 0xee));
    }
  }

  static void widen(const float* from, float* to, dim n) noexcept {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
  }
  MOE_TARGET(MOE_AVX2)
  static void widen(const bf16* from, float* to, dim n) noexcept {
    dim j = 0;
    for (; j + width <= n; j += width) _mm256_storeu_ps(to + j, load(from + j));
    for (; j < n; ++j) to[j] = static_cast<float>(from[j]);
  }

  MOE_TARGET(MOE_AVX2)
  static void add_scaled(float w, const float* x, float* y, dim n) noexcept {
    const __m256 weight = _mm256_set1_ps(w);
    dim j = 0;
    for (; j + width <= n; j += width)
      _mm256_storeu_ps(y + j, _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + j), _mm256_loadu_ps(y + j)));
    if (j == n) return;
    const __m256i some = first_lanes(n - j);
    _mm256_maskstore_ps(y + j, some,
                        _mm256_fmadd_ps(weight, _mm256_maskload_ps(x + j, some), _mm256_maskload_ps(y + j, some)));
  }

  MOE_TARGET(MOE_AVX2)
  static float dot_product(const float* x, const float* y, dim n) noexcept {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    dim j = 0;
    for (; j + 4 * width <= n; j += 4 * width) {
      MOE_UNROLL
      for (int i = 0; i < 4; ++i)
        sum[i] = _mm256_fmadd_ps(_mm256_loadu_ps(x + j + i * width), _mm256_loadu_ps(y + j + i * width), sum[i]);
    }
    for (; j < n; j += width) {
      const __m256i some = first_lanes(n - j);
      sum[0] = _mm256_fmadd_ps(_mm256_maskload_ps(x + j, some), _mm256_maskload_ps(y + j, some), sum[0]);
    }
    float total[4];
    sum_four(sum[0], sum[1], sum[2], sum[3], total);
    return (total[0] + total[1]) + (total[2] + total[3]);
  }

 private:
  MOE_TARGET(MOE_AVX2)
  static __m256i first_lanes(dim n) noexcept {
    const __m256i count = _mm256_set1_epi32(static_cast<int>(n < width ? n : width));
    return _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  /// The vector at p; its first n < width elements and zeros.
  MOE_TARGET(MOE_AVX2)
  static __m256 load(const float* p) noexcept { return _mm256_loadu_ps(p); }
  MOE_TARGET(MOE_AVX2)
  static __m256 load(const float* p, dim n) noexcept { return _mm256_maskload_ps(p, first_lanes(n)); }
  MOE_TARGET(MOE_AVX2)
  static __m256 load(const bf16* p) noexcept {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  MOE_TARGET(MOE_AVX2)
  static __m256 load(const bf16* p, dim n) noexcept {
    bf16 some[width] = {};
    for (dim j = 0; j < n; ++j) some[j] = p[j];
    return load(some);
  }

  /// s[0 .. 4] = the sums of the lanes of a, b, c and d, each in the same order.
  MOE_TARGET(MOE_AVX2)
  static void sum_four(__m256 a, __m256 b, __m256 c, __m256 d, float* s) noexcept {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
};

}  // namespace moe::arch::detail

#endif
