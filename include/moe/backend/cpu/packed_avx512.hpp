// SPDX-License-Identifier: Apache-2.0
/// Products with packed weights on 512-bit vectors. A block of up to 12 rows keeps two vectors of sums a row, one for each
/// half of a panel; a line of weights is read once for all of them.
#pragma once

#include "moe/backend/cpu/ladder.hpp"
#include "moe/backend/packed_kernels.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

#if defined(__GNUC__)
typedef int int_lanes __attribute__((vector_size(64)));  // GCC 12 keeps an array of __m512i in memory
#else
using int_lanes = __m512i;
#endif

inline constexpr int rows_512 = 12;

/// One block of rows against one panel.
struct block_work {
  const std::byte* a;
  dim a_step;  ///< bytes from line to line of a row
  dim lines;
  const std::byte* weights;
  const std::byte* ahead;  ///< weights that are needed soon,
  dim pace;                ///< and the bytes to move on there for each two lines of weights read here
  const float* factors;    ///< of the block's rows
  dim factor_count;
  const float* scale;  ///< of the panel's rows
  float* c;
  dim ld;
};

/// f(height, work) for every block of rows and panel. A block alone asks for its own weights; several share the asking for
/// `bytes` at `next`, by default the next panel.
template <class Multiply>
void for_each_panel_block(const prepared_rows& a, const panel_product& p, Multiply multiply, const std::byte* next = nullptr,
                          dim bytes = 0) noexcept {
  const dim blocks = a.blocks();
  for (dim j = 0; j < p.panels; ++j)
    for (dim b = 0; b < blocks; ++b) {
      const std::byte *w = p.weights + j * p.panel_bytes, *ahead = w + from_memory;
      dim pace = 2 * line_bytes;
      if (blocks > 1 || next) {
        const dim size = next ? bytes : p.panel_bytes;
        pace = (pace * size / p.panel_bytes + blocks - 1) / blocks;
        ahead = (next ? next : w + p.panel_bytes) + b * moe::detail::round_up(size / blocks, line_bytes);
      }
      multiply(a.height_of(b), block_work{a.block(b), a.height_of(b) * line_bytes, a.lines, w, ahead, pace,
                                          a.factor(b * a.height), a.factor_count,
                                          p.scale ? p.scale + j * panel_rows : nullptr,
                                          p.c.row(b * a.height) + j * panel_rows, p.c.ld});
    }
}

/// Asks for weights from memory, and for the lines of both halves of a panel, `half` bytes apart, that come soon after the
/// one at q.
MOE_TARGET(MOE_AVX512)
inline void ask_ahead(const std::byte* ahead, dim pace, const std::byte* q, dim half = tile_bytes) noexcept {
  _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
  if (pace > line_bytes) _mm_prefetch(reinterpret_cast<const char*>(ahead + line_bytes), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(q + from_second), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(q + from_second + half), _MM_HINT_T0);
}

/// p, but the compiler does not know: numbers that are read through both are read twice, each as an operand in memory of a
/// multiply-add. Fewer instructions let more of them wait for weights.
template <class T>
MOE_INLINE const T* again(const T* p) noexcept {
#if defined(__GNUC__)
  __asm__("" : "+r"(p));
#endif
  return p;
}

/// The even and the odd halves of a line as floats.
template <class T>
MOE_TARGET(MOE_AVX512)
inline __m512 even_halves(__m512i v) noexcept {
  if constexpr (std::same_as<T, bf16>)
    return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  else
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}
template <class T>
MOE_TARGET(MOE_AVX512)
inline __m512 odd_halves(__m512i v) noexcept {
  if constexpr (std::same_as<T, bf16>)
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  else
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
}

/// Floats times floats or halves.
template <int Build, class T, int M>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void multiply_block(const block_work& w) noexcept {
  constexpr int slot = 4 / sizeof(T), per_line = 16 / slot;
  __m512 left[M], right[M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) left[m] = right[m] = _mm512_setzero_ps();
  const std::byte *a = w.a, *q = w.weights, *ahead = w.ahead;
  const dim pace = w.pace;
  for (dim l = 0; l < w.lines; ++l, a += w.a_step) {
    const float* x = reinterpret_cast<const float*>(a);
    [[maybe_unused]] const float* y = again(x);
    MOE_NO_UNROLL
    for (int i = 0; i < per_line; ++i, q += line_bytes, ahead += pace) {
      ask_ahead(ahead, pace, q);
      if constexpr (slot == 1) {
        const __m512 u = _mm512_loadu_ps(q), v = _mm512_loadu_ps(q + tile_bytes);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m512 b = _mm512_set1_ps(x[16 * m + i]);
          left[m] = _mm512_fmadd_ps(b, u, left[m]);
          right[m] = _mm512_fmadd_ps(b, v, right[m]);
        }
      } else {
        const __m512i u = _mm512_loadu_si512(q), v = _mm512_loadu_si512(q + tile_bytes);
        const __m512 u0 = even_halves<T>(u), v0 = even_halves<T>(v);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          left[m] = _mm512_fmadd_ps(_mm512_set1_ps(x[16 * m + 2 * i]), u0, left[m]);
          right[m] = _mm512_fmadd_ps(_mm512_set1_ps(y[16 * m + 2 * i]), v0, right[m]);
        }
        const __m512 u1 = odd_halves<T>(u), v1 = odd_halves<T>(v);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          left[m] = _mm512_fmadd_ps(_mm512_set1_ps(x[16 * m + 2 * i + 1]), u1, left[m]);
          right[m] = _mm512_fmadd_ps(_mm512_set1_ps(y[16 * m + 2 * i + 1]), v1, right[m]);
        }
      }
    }
    if ((l + 1) * per_line % 16 == 0) q += tile_bytes;
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    _mm512_storeu_ps(w.c + m * w.ld, left[m]);
    _mm512_storeu_ps(w.c + m * w.ld + 16, right[m]);
  }
}

/// Bytes times bytes.
template <int Build, int M>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void multiply_block_bytes(const block_work& w) noexcept {
  int_lanes left[M], right[M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) left[m] = right[m] = int_lanes{};
  const std::byte *a = w.a, *q = w.weights, *ahead = w.ahead;
  const dim pace = w.pace;
  for (dim l = 0; l < w.lines; ++l, a += w.a_step, q += tile_bytes) {
    MOE_NO_UNROLL
    for (int i = 0; i < 16; ++i, q += line_bytes, ahead += pace) {
      ask_ahead(ahead, pace, q);
      const __m512i u = _mm512_loadu_si512(q), v = _mm512_loadu_si512(q + tile_bytes);
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        std::int32_t four;
        std::memcpy(&four, a + 64 * m + 4 * i, 4);
        const __m512i b = _mm512_set1_epi32(four);
        left[m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)left[m], u, b);
        right[m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)right[m], v, b);
      }
    }
  }
  const __m512 s = _mm512_loadu_ps(w.scale), t = _mm512_loadu_ps(w.scale + 16);
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    const float* f = w.factors + m * w.factor_count;
    const __m512 unit = _mm512_set1_ps(f[0]);
    const __m512i shift = _mm512_set1_epi32(128 * static_cast<std::int32_t>(f[1]));
    const __m512 x = _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)left[m], shift));
    const __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)right[m], shift));
    _mm512_storeu_ps(w.c + m * w.ld, _mm512_mul_ps(_mm512_mul_ps(unit, s), x));
    _mm512_storeu_ps(w.c + m * w.ld + 16, _mm512_mul_ps(_mm512_mul_ps(unit, t), y));
  }
}

/// The block of the height that is wanted.
template <int Build, class T>
void multiply_rows_512(dim height, const block_work& w) noexcept {
  with_constant<rows_512>(height, [&](auto m) {
    if constexpr (std::same_as<T, std::int8_t>)
      multiply_block_bytes<Build, m>(w);
    else
      multiply_block<Build, T, m>(w);
  });
}
template <int Build, class T>
void multiply_512(const prepared_rows& a, const panel_product& p) noexcept {
  for_each_panel_block(a, p, multiply_rows_512<Build, T>);
}

/// The same as prepare_i8, 16 numbers at a time.
template <int Build, class T = std::int8_t>
MOE_TARGET(MOE_AVX512)
void prepare_i8_512(const float* x, dim k, std::byte* to, float* factors, bool sums_of_32) noexcept {
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();  // as integers magnitudes keep their order, and NaN is above all
  for (dim i = 0; i < k; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(k - i < 16 ? (1u << (k - i)) - 1 : 0xffffu);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, x + i), no_sign));
  }
  const std::int32_t bits = _mm512_reduce_max_epi32(largest);
  float most;
  std::memcpy(&most, &bits, sizeof most);
  most += packing<T>::margin;
  const bool finite = most - most == 0;
  const __m512 per = _mm512_set1_ps(moe::detail::to_bytes(most));
  __m512i total = _mm512_setzero_si512();
  const dim end = moe::detail::round_up(k, sums_of_32 ? 128 : 64);
  for (dim i = 0; i < end; i += 32) {
    __m512i q[2];
    MOE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const dim left = k - i - 16 * h;
      const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffffu : left > 0 ? (1u << left) - 1 : 0u);
      q[h] = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i + 16 * h), per))
                    : _mm512_setzero_si512();
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i + 16 * h), _mm512_cvtepi32_epi8(q[h]));
    }
    const __m512i both = _mm512_add_epi32(q[0], q[1]);
    total = _mm512_add_epi32(total, both);
    if (sums_of_32) factors[2 + i / 32] = static_cast<float>(_mm512_reduce_add_epi32(both));
  }
  factors[0] = finite ? most / 127 : NAN;
  factors[1] = static_cast<float>(_mm512_reduce_add_epi32(total));
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class T>
  requires(!packing<T>::scaled)
packed_kernels kernels_of(basic_avx512<Build>, weights_of<T>) noexcept {
  return {operand::f32,
          detail::rows_512,
          8 * detail::rows_512,
          false,
          0,
          detail::prepare_f32<Build>,
          detail::multiply_512<Build, T>};
}
template <int Build>
packed_kernels kernels_of(basic_avx512_vnni<Build>, weights_of<std::int8_t>) noexcept {
  return {operand::i8,
          detail::rows_512,
          16 * detail::rows_512,
          false,
          0,
          detail::prepare_i8_512<Build>,
          detail::multiply_512<Build, std::int8_t>};
}

}  // namespace moe::arch

#endif
