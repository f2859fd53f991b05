// SPDX-License-Identifier: Apache-2.0
/// Products with packed weights on 256-bit vectors: a block of up to 6 rows against half a panel or a quarter, or of 1 or 2
/// rows against a whole one, which is then read as it lies in memory.
#pragma once

#include "moe/backend/cpu/ladder.hpp"
#include "moe/backend/packed_kernels.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

inline constexpr int rows_256 = 6;

/// The even and the odd halves of 8 slots as floats.
template <class T>
MOE_TARGET(MOE_AVX2)
inline __m256 even_halves_256(__m256i v) noexcept {
  if constexpr (std::same_as<T, bf16>) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  } else {
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
  }
}
template <class T>
MOE_TARGET(MOE_AVX2)
inline __m256 odd_halves_256(__m256i v) noexcept {
  if constexpr (std::same_as<T, bf16>)
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  else
    return even_halves_256<T>(_mm256_srli_epi32(v, 16));
}

/// Eight weights, the first or second of each slot, as floats.
template <class T>
MOE_TARGET(MOE_AVX2)
inline __m256 eight_weights(const std::byte* q, int part) noexcept {
  if constexpr (std::same_as<T, float>) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(q));
  } else {
    const __m256i slots = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    return part ? odd_halves_256<T>(slots) : even_halves_256<T>(slots);
  }
}

/// M rows, floats times floats or halves, against a panel (V = 4) or half of it (V = 2) at q: 8 V weight rows. Asks for the
/// memory at `ahead`, as much as is read here, with `skip` bytes left out after each kilobyte.
template <int Build, class T, int M, int V>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE void multiply_block_256(const std::byte* a, dim a_step, dim lines, const std::byte* q, const std::byte* ahead,
                                      dim skip, float* c, dim ld) noexcept {
  constexpr int slot = 4 / sizeof(T);  // lines of a row for a tile
  __m256 sum[M][V];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) sum[m][v] = _mm256_setzero_ps();
  }
  for (dim l = 0; l < lines; l += slot, a += slot * a_step) {
    MOE_UNROLL
    for (int v = 0; v < V; v += 2) {
      for (int line = 0; line < slot; ++line) {
        const float* x = reinterpret_cast<const float*>(a + line * a_step);
        MOE_NO_UNROLL
        for (int i = 0; i < 16 / slot; ++i, q += line_bytes, ahead += line_bytes) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
          _mm_prefetch(reinterpret_cast<const char*>(q + from_second), _MM_HINT_T0);
          MOE_UNROLL
          for (int part = 0; part < slot; ++part) {  // few registers: weights are loaded again for their odd halves
            const __m256 first = eight_weights<T>(q, part), second = eight_weights<T>(q + 32, part);
            MOE_UNROLL
            for (int m = 0; m < M; ++m) {
              const __m256 b = _mm256_broadcast_ss(x + 16 * m + slot * i + part);
              sum[m][v] = _mm256_fmadd_ps(b, first, sum[m][v]);
              sum[m][v + 1] = _mm256_fmadd_ps(b, second, sum[m][v + 1]);
            }
          }
        }
      }
    }
    if constexpr (V == 2) {
      q += tile_bytes;
      ahead += skip;
    }
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) _mm256_storeu_ps(c + m * ld + 8 * v, sum[m][v]);
  }
}

template <int Build, class T>
void multiply_256(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim b = 0; b < a.blocks(); ++b) {
      const bool alone = a.blocks() == 1;
      const std::byte *w = p.weights + j * p.panel_bytes, *ahead = w + (alone ? from_memory : p.panel_bytes);
      const dim half = alone ? tile_bytes : p.panel_bytes / 2, skip = alone ? tile_bytes : 0;
      const dim step = a.height_of(b) * line_bytes;
      float* c = p.c.row(b * a.height) + j * panel_rows;
      with_constant<rows_256>(a.height_of(b), [&](auto m) {
        if constexpr (m <= 2) {
          multiply_block_256<Build, T, m, 4>(a.block(b), step, a.lines, w, ahead, 0, c, p.c.ld);
        } else {
          multiply_block_256<Build, T, m, 2>(a.block(b), step, a.lines, w, ahead, skip, c, p.c.ld);
          multiply_block_256<Build, T, m, 2>(a.block(b), step, a.lines, w + tile_bytes, ahead + half, skip, c + tile_rows,
                                             p.c.ld);
        }
      });
    }
}

#if defined(__GNUC__)
typedef int int_lanes_256 __attribute__((vector_size(32)));  // GCC 12 keeps an array of __m256i in memory
#else
using int_lanes_256 = __m256i;
#endif

/// M rows, bytes times bytes, against a panel (V = 4) or a quarter of it (V = 1) at q: 8 V weight rows. Magnitudes of
/// weights times rows with their signs: pairs of products of 127 by 127 fit a word.
template <int Build, int M, int V>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE
    void multiply_block_bytes_256(const std::byte* a, dim a_step, dim lines, const std::byte* q, const float* factors,
                                  dim factor_count, const float* scale, float* c, dim ld) noexcept {
  constexpr int of_line = V == 4 ? 2 : 1;
  const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8(static_cast<char>(0x80));
  int_lanes_256 sum[M][V];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) sum[m][v] = int_lanes_256{};
  }
  for (dim l = 0; l < lines; ++l, a += a_step) {
    MOE_UNROLL
    for (int tile = 0; tile < V; tile += of_line) {
      MOE_NO_UNROLL
      for (int i = 0; i < 16; ++i, q += line_bytes) {
        _mm_prefetch(reinterpret_cast<const char*>(q + from_memory), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(q + from_second), _MM_HINT_T0);
        MOE_UNROLL
        for (int v = 0; v < of_line; ++v) {
          const __m256i w = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32 * v)), middle);
          const __m256i size = _mm256_abs_epi8(w);
          MOE_UNROLL
          for (int m = 0; m < M; ++m) {
            std::int32_t four;
            std::memcpy(&four, a + 64 * m + 4 * i, 4);
            const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(four), w));
            int_lanes_256& to = sum[m][tile + v];
            to = (int_lanes_256)_mm256_add_epi32((__m256i)to, _mm256_madd_epi16(pairs, ones));
          }
        }
      }
    }
    if constexpr (V == 1) q += tile_bytes;
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v)
      _mm256_storeu_ps(c + m * ld + 8 * v, _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(factors[m * factor_count]),
                                                                       _mm256_loadu_ps(scale + 8 * v)),
                                                         _mm256_cvtepi32_ps((__m256i)sum[m][v])));
  }
}

template <int Build>
void multiply_bytes_256(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim b = 0; b < a.blocks(); ++b)
      with_constant<rows_256>(a.height_of(b), [&](auto m) {
        constexpr int vectors = m <= 2 ? 4 : 1;
        for (dim v = 0; v < 4; v += vectors)
          multiply_block_bytes_256<Build, m, vectors>(
              a.block(b), m * line_bytes, a.lines, p.weights + j * p.panel_bytes + v / 2 * tile_bytes + v % 2 * 32,
              a.factor(b * a.height), a.factor_count, p.scale + j * panel_rows + 8 * v,
              p.c.row(b * a.height) + j * panel_rows + 8 * v, p.c.ld);
      });
}

template <class Scale>
MOE_TARGET(MOE_AVX2)
inline __m256 load_scales_256(const std::byte* s) noexcept {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s));
  if constexpr (std::same_as<Scale, f16>)
    return _mm256_cvtph_ps(halves);
  else
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/// total[v] += scale (products - 8 sum) for 8 weight rows v of a panel each, where the row's numbers add up to `sum`.
template <class Scale>
MOE_TARGET(MOE_AVX2)
MOE_INLINE void add_group_256(const std::byte* scale, float sum, __m256i products, __m256& total) noexcept {
  total = _mm256_fmadd_ps(load_scales_256<Scale>(scale),
                          _mm256_sub_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(8 * sum)), total);
}

/// One row against a panel of four bits: eight products of pairs fit a word.
template <int Build, class T>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE void multiply_row_groups_256(const std::byte* a, dim a_step, dim lines, const std::byte* q,
                                           const float* factors, float* c) noexcept {
  using rule = packing<T>;
  using scale = typename T::scale;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const float* sums = factors + 2;
  __m256 total[4];
  MOE_UNROLL
  for (int v = 0; v < 4; ++v) total[v] = _mm256_setzero_ps();
  for (dim l = 0; l < lines; l += 2, q += rule::scale_bytes, sums += 4) {
    const std::byte* scales = q + 2048;
    int_lanes_256 block[4]{};
    MOE_UNROLL
    for (int tile = 0; tile < 4; ++tile) {  // two of 64 k, then two of the next
      const int first = tile % 2 * 2;
      int_lanes_256 lower[2]{}, upper[2]{};
      MOE_NO_UNROLL
      for (int i = 0; i < 8; ++i, q += line_bytes) {
        _mm_prefetch(reinterpret_cast<const char*>(q + from_memory), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(q + from_second), _MM_HINT_T0);
        std::int32_t four[2];
        std::memcpy(&four[0], a + tile / 2 * a_step + 4 * i, 4);
        std::memcpy(&four[1], a + tile / 2 * a_step + 32 + 4 * i, 4);
        MOE_UNROLL
        for (int v = 0; v < 2; ++v) {
          const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32 * v));
          const __m256i high = _mm256_srli_epi16(w, 4);
          lower[v] = (int_lanes_256)_mm256_add_epi16(
              (__m256i)lower[v], _mm256_maddubs_epi16(_mm256_and_si256(w, low), _mm256_set1_epi32(four[0])));
          upper[v] = (int_lanes_256)_mm256_add_epi16(
              (__m256i)upper[v], _mm256_maddubs_epi16(_mm256_and_si256(high, low), _mm256_set1_epi32(four[1])));
        }
      }
      MOE_UNROLL
      for (int v = 0; v < 2; ++v) {
        const __m256i s = _mm256_madd_epi16((__m256i)lower[v], ones), t = _mm256_madd_epi16((__m256i)upper[v], ones);
        if constexpr (T::group == 32) {
          const std::byte* of = scales + tile / 2 * 128 + (first + v) * 16;
          add_group_256<scale>(of, sums[tile / 2 * 2], s, total[first + v]);
          add_group_256<scale>(of + 64, sums[tile / 2 * 2 + 1], t, total[first + v]);
        } else {
          block[first + v] = (int_lanes_256)_mm256_add_epi32((__m256i)block[first + v], _mm256_add_epi32(s, t));
        }
      }
    }
    a += 2 * a_step;
    if constexpr (T::group == 128) {
      MOE_UNROLL
      for (int v = 0; v < 4; ++v)
        add_group_256<scale>(scales + 16 * v, sums[0] + sums[1] + sums[2] + sums[3], (__m256i)block[v], total[v]);
    }
  }
  MOE_UNROLL
  for (int v = 0; v < 4; ++v) _mm256_storeu_ps(c + 8 * v, _mm256_mul_ps(_mm256_set1_ps(factors[0]), total[v]));
}

template <int Build, class T>
void multiply_groups_256(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim r = 0; r < a.rows; ++r)
      multiply_row_groups_256<Build, T>(a.line(r, 0), a.stride(r), a.lines, p.weights + j * p.panel_bytes, a.factor(r),
                                        p.c.row(r) + j * panel_rows);
}

/// M rows against half a panel of two bits a weight, 16 weight rows. A word takes 64 pairs of products of 2 by 127, four
/// steps.
template <int Build, int M>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE
    void multiply_block_ternary_256(const std::byte* a, dim a_step, dim lines, const std::byte* q, const float* factors,
                                    dim factor_count, const float* scale, float* c, dim ld) noexcept {
  using rule = packing<ternary>;
  constexpr dim steps = 4;
  const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8(3);
  int_lanes_256 sum[M][2];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = int_lanes_256{};
  for (dim l = 0; l < lines; l += steps) {
    int_lanes_256 words[M][2];
    MOE_UNROLL
    for (int m = 0; m < M; ++m) words[m][0] = words[m][1] = int_lanes_256{};
    for (dim end = moe::detail::at_most(lines - l, steps), s = 0; s < end; ++s, a += a_step, q += rule::step_bytes) {
      MOE_NO_UNROLL
      for (int i = 0; i < 4; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(q + from_memory + i * line_bytes), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(q + from_second + i * line_bytes), _MM_HINT_T0);
        __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i * line_bytes)),
                v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i * line_bytes + 32));
        MOE_UNROLL
        for (int n = 0; n < 4; ++n) {
          const __m256i low = _mm256_and_si256(u, mask), high = _mm256_and_si256(v, mask);
          u = _mm256_srli_epi16(u, 2);
          v = _mm256_srli_epi16(v, 2);
          MOE_UNROLL
          for (int m = 0; m < M; ++m) {
            std::int32_t four;
            std::memcpy(&four, a + 64 * m + 16 * n + 4 * i, 4);
            const __m256i b = _mm256_set1_epi32(four);
            words[m][0] = (int_lanes_256)_mm256_add_epi16((__m256i)words[m][0], _mm256_maddubs_epi16(low, b));
            words[m][1] = (int_lanes_256)_mm256_add_epi16((__m256i)words[m][1], _mm256_maddubs_epi16(high, b));
          }
        }
      }
    }
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      MOE_UNROLL
      for (int v = 0; v < 2; ++v)
        sum[m][v] = (int_lanes_256)_mm256_add_epi32((__m256i)sum[m][v], _mm256_madd_epi16((__m256i)words[m][v], ones));
    }
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    const __m256 unit = _mm256_set1_ps(factors[m * factor_count]), shift = _mm256_set1_ps(factors[m * factor_count + 1]);
    MOE_UNROLL
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_ps(c + m * ld + 8 * v, _mm256_mul_ps(_mm256_mul_ps(unit, _mm256_loadu_ps(scale + 8 * v)),
                                                         _mm256_sub_ps(_mm256_cvtepi32_ps((__m256i)sum[m][v]), shift)));
  }
}

template <int Build>
void multiply_ternary_256(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim b = 0; b < a.blocks(); ++b)
      for (dim half = 0; half < 2; ++half)
        with_constant<rows_256>(a.height_of(b), [&](auto m) {
          multiply_block_ternary_256<Build, m>(
              a.block(b), m * line_bytes, a.lines, p.weights + j * p.panel_bytes + half * packing<ternary>::half_bytes,
              a.factor(b * a.height), a.factor_count, p.scale + j * panel_rows + half * tile_rows,
              p.c.row(b * a.height) + j * panel_rows + half * tile_rows, p.c.ld);
        });
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class T>
  requires(!packing<T>::scaled)
packed_kernels kernels_of(basic_avx2<Build>, weights_of<T>) noexcept {
  return {operand::f32,
          detail::rows_256,
          16 * detail::rows_256,
          false,
          0,
          detail::prepare_f32<Build>,
          detail::multiply_256<Build, T>};
}
template <int Build>
packed_kernels kernels_of(basic_avx2<Build>, weights_of<std::int8_t>) noexcept {
  return {operand::i8,
          detail::rows_256,
          16 * detail::rows_256,
          false,
          0,
          detail::prepare_i8<Build>,
          detail::multiply_bytes_256<Build>};
}
template <int Build>
packed_kernels kernels_of(basic_avx2<Build>, weights_of<ternary>) noexcept {
  return {operand::i8,
          detail::rows_256,
          16 * detail::rows_256,
          false,
          0,
          detail::prepare_i8<Build, ternary>,
          detail::multiply_ternary_256<Build>};
}
template <int Build, int Group, class Scale>
packed_kernels kernels_of(basic_avx2<Build>, weights_of<int4_groups<Group, Scale>>) noexcept {
  return {operand::i8,
          detail::rows_256,
          16 * detail::rows_256,
          true,
          0,
          detail::prepare_i8<Build>,
          detail::multiply_groups_256<Build, int4_groups<Group, Scale>>};
}

}  // namespace moe::arch

#endif
