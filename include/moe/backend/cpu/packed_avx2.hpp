// SPDX-License-Identifier: Apache-2.0
/// Products with packed weights on 256-bit vectors: a block of up to 6 rows against half a panel, or of 1 or 2 rows against
/// a whole one, which is then read in one go.
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

/// M rows, floats times floats or halves, against the V vectors of 8 weight rows at q. Asks for the memory at `ahead`, as
/// much as is read here, with `skip` bytes left out after each kilobyte.
template <int Build, class T, int M, int V>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE void multiply_block_256(const std::byte* a, dim a_step, dim lines, const std::byte* q, const std::byte* ahead,
                                      dim skip, float* c, dim ld) noexcept {
  constexpr int slot = 4 / sizeof(T), per_line = 16 / slot;
  __m256 sum[M][V];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) sum[m][v] = _mm256_setzero_ps();
  }
  for (dim l = 0; l < lines; ++l, a += a_step) {
    const float* x = reinterpret_cast<const float*>(a);
    MOE_NO_UNROLL
    for (int i = 0; i < per_line; ++i, q += line_bytes, ahead += V / 2 * line_bytes) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(q + from_second), _MM_HINT_T0);
      if constexpr (V == 4) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line_bytes), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(q + from_second + tile_bytes), _MM_HINT_T0);
      }
      MOE_UNROLL
      for (int part = 0; part < slot; ++part) {  // few registers: weights are loaded again for their odd halves
        __m256 w[V];
        MOE_UNROLL
        for (int v = 0; v < V; ++v) w[v] = eight_weights<T>(q + v / 2 * tile_bytes + v % 2 * 32, part);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m256 b = _mm256_broadcast_ss(x + 16 * m + slot * i + part);
          MOE_UNROLL
          for (int v = 0; v < V; ++v) sum[m][v] = _mm256_fmadd_ps(b, w[v], sum[m][v]);
        }
      }
    }
    if ((l + 1) * per_line % 16 == 0) {
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

/// M rows, bytes times bytes, against 8 weight rows. Magnitudes of weights times rows with their signs: pairs of products of
/// 127 by 127 fit a word.
template <int Build, int M>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE
    void multiply_block_bytes_256(const std::byte* a, dim a_step, dim lines, const std::byte* q, const float* factors,
                                  dim factor_count, const float* scale, float* c, dim ld) noexcept {
  const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8(static_cast<char>(0x80));
  int_lanes_256 sum[M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) sum[m] = int_lanes_256{};
  for (dim l = 0; l < lines; ++l, a += a_step, q += tile_bytes) {
    MOE_NO_UNROLL
    for (int i = 0; i < 16; ++i, q += line_bytes) {
      _mm_prefetch(reinterpret_cast<const char*>(q + from_memory), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(q + from_second), _MM_HINT_T0);
      const __m256i w = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), middle);
      const __m256i size = _mm256_abs_epi8(w);
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        std::int32_t four;
        std::memcpy(&four, a + 64 * m + 4 * i, 4);
        const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(four), w));
        sum[m] = (int_lanes_256)_mm256_add_epi32((__m256i)sum[m], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
  const __m256 s = _mm256_loadu_ps(scale);
  MOE_UNROLL
  for (int m = 0; m < M; ++m)
    _mm256_storeu_ps(c + m * ld, _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(factors[m * factor_count]), s),
                                               _mm256_cvtepi32_ps((__m256i)sum[m])));
}

template <int Build>
void multiply_bytes_256(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim b = 0; b < a.blocks(); ++b)
      for (dim v = 0; v < 4; ++v)
        with_constant<rows_256>(a.height_of(b), [&](auto m) {
          multiply_block_bytes_256<Build, m>(a.block(b), m * line_bytes, a.lines,
                                             p.weights + j * p.panel_bytes + v / 2 * tile_bytes + v % 2 * 32,
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

/// One row against 8 weight rows of four bits: eight products of pairs fit a word.
template <int Build, class T>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE void multiply_row_groups_256(const std::byte* a, dim a_step, dim lines, const std::byte* q, dim v,
                                           const float* factors, float* c) noexcept {
  using rule = packing<T>;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const std::byte* scales = q + 2048 + v * 16;
  const float* sums = factors + 2;
  __m256 total = _mm256_setzero_ps();
  for (dim l = 0; l < lines; l += 2, q += rule::step_bytes, scales += rule::step_bytes, sums += 4) {
    __m256i block = _mm256_setzero_si256();
    for (dim h = 0; h < 2; ++h, a += a_step) {
      const std::byte* w = q + (2 * h + v / 2) * 512 + v % 2 * 32;
      __m256i lower = _mm256_setzero_si256(), upper = _mm256_setzero_si256();
      for (dim i = 0; i < 8; ++i, w += line_bytes) {
        std::int32_t first, second;
        std::memcpy(&first, a + 4 * i, 4);
        std::memcpy(&second, a + 32 + 4 * i, 4);
        const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        lower = _mm256_add_epi16(lower, _mm256_maddubs_epi16(_mm256_and_si256(u, low), _mm256_set1_epi32(first)));
        upper = _mm256_add_epi16(
            upper, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(u, 4), low), _mm256_set1_epi32(second)));
      }
      lower = _mm256_madd_epi16(lower, ones);
      upper = _mm256_madd_epi16(upper, ones);
      if constexpr (T::group == 32) {
        const __m256 s0 = load_scales_256<typename T::scale>(scales + 2 * h * 64),
                     s1 = load_scales_256<typename T::scale>(scales + (2 * h + 1) * 64);
        total = _mm256_fmadd_ps(s0, _mm256_sub_ps(_mm256_cvtepi32_ps(lower), _mm256_set1_ps(8 * sums[2 * h])), total);
        total = _mm256_fmadd_ps(s1, _mm256_sub_ps(_mm256_cvtepi32_ps(upper), _mm256_set1_ps(8 * sums[2 * h + 1])), total);
      } else {
        block = _mm256_add_epi32(block, _mm256_add_epi32(lower, upper));
      }
    }
    if constexpr (T::group == 128)
      total = _mm256_fmadd_ps(
          load_scales_256<typename T::scale>(scales),
          _mm256_sub_ps(_mm256_cvtepi32_ps(block), _mm256_set1_ps(8 * (sums[0] + sums[1] + sums[2] + sums[3]))), total);
  }
  _mm256_storeu_ps(c, _mm256_mul_ps(_mm256_set1_ps(factors[0]), total));
}

template <int Build, class T>
void multiply_groups_256(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim r = 0; r < a.rows; ++r)
      for (dim v = 0; v < 4; ++v)
        multiply_row_groups_256<Build, T>(a.line(r, 0), a.stride(r), a.lines, p.weights + j * p.panel_bytes, v, a.factor(r),
                                          p.c.row(r) + j * panel_rows + 8 * v);
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
