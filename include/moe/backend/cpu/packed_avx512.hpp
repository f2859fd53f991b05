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

/// How a block of M rows passes a step of a panel: both halves of it side by side, which share what is read of a row, or one
/// after the other, which reads memory in order. One row or two do so little with a line that they wait for nothing else.
template <int M>
inline constexpr int halves_at_once = M <= 2 ? 1 : 2;

/// For each line at q of H halves, `half` bytes apart: asks for weights from memory, and for the lines that come soon after.
template <int H>
MOE_TARGET(MOE_AVX512)
inline void ask_ahead(const std::byte*& ahead, dim pace, const std::byte* q, dim half = tile_bytes) noexcept {
  _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
  if (H == 2 && pace > line_bytes) _mm_prefetch(reinterpret_cast<const char*>(ahead + line_bytes), _MM_HINT_T1);
  ahead += H == 2 ? pace : (pace + 1) / 2;
  MOE_UNROLL
  for (int h = 0; h < H; ++h) _mm_prefetch(reinterpret_cast<const char*>(q + from_second + h * half), _MM_HINT_T0);
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

/// The numbers of a line as floats: halves are the even or the odd ones.
template <class T>
MOE_TARGET(MOE_AVX512)
inline __m512 part_of(__m512i v, int odd) noexcept {
  if constexpr (std::same_as<T, float>)
    return _mm512_castsi512_ps(v);
  else if constexpr (std::same_as<T, bf16>)
    return _mm512_castsi512_ps(odd ? _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
                                   : _mm512_slli_epi32(v, 16));
  else
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(odd ? _mm512_srli_epi32(v, 16) : v));
}

/// sum[h][m] += x W^T over one line of a row of x, floats times floats or halves: 16 lines of weights from q on, or 8, of H
/// halves of a panel.
template <class T, int M, int H>
MOE_TARGET(MOE_AVX512)
MOE_INLINE
    void add_line(const std::byte* a, const std::byte*& q, const std::byte*& ahead, dim pace, __m512 (*sum)[M]) noexcept {
  constexpr int slot = 4 / sizeof(T);
  const float* x = reinterpret_cast<const float*>(a);
  [[maybe_unused]] const float* y = again(x);
  MOE_NO_UNROLL
  for (int i = 0; i < 16 / slot; ++i, q += line_bytes) {
    ask_ahead<H>(ahead, pace, q);
    __m512i line[H];
    MOE_UNROLL
    for (int h = 0; h < H; ++h) line[h] = _mm512_loadu_si512(q + h * tile_bytes);
    MOE_UNROLL
    for (int s = 0; s < slot; ++s) {
      __m512 w[H];
      MOE_UNROLL
      for (int h = 0; h < H; ++h) w[h] = part_of<T>(line[h], s);
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        MOE_UNROLL
        for (int h = 0; h < H; ++h)
          sum[h][m] = _mm512_fmadd_ps(_mm512_set1_ps((slot == 2 && h == 1 ? y : x)[16 * m + slot * i + s]), w[h], sum[h][m]);
      }
    }
  }
}
/// Of both halves of a panel.
template <int M>
MOE_TARGET(MOE_AVX512)
MOE_INLINE void store_sums(const block_work& w, const __m512 (*sum)[M]) noexcept {
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(w.c + m * w.ld + 16 * h, sum[h][m]);
  }
}
template <int Build, class T, int M>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void multiply_block(const block_work& w) noexcept {
  constexpr int lines = 4 / sizeof(T), H = halves_at_once<M>;  // of a row, for a tile
  __m512 sum[2][M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) sum[0][m] = sum[1][m] = _mm512_setzero_ps();
  const std::byte *a = w.a, *q = w.weights, *ahead = w.ahead;
  for (dim l = 0; l < w.lines; l += lines, a += lines * w.a_step) {
    MOE_UNROLL
    for (int h = 0; h < 2; h += H)
      for (int i = 0; i < lines; ++i) add_line<T, M, H>(a + i * w.a_step, q, ahead, w.pace, sum + h);
    if (H == 2) q += tile_bytes;
  }
  store_sums<M>(w, sum);
}

/// sum[h][m] += x W^T over one line of a row of x, bytes times bytes: a tile of weights from q on, of H halves of a panel.
template <int M, int H>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_INLINE void add_bytes(const std::byte* a, const std::byte*& q, const std::byte*& ahead, dim pace,
                          int_lanes (*sum)[M]) noexcept {
  MOE_NO_UNROLL
  for (int i = 0; i < 16; ++i, q += line_bytes) {
    ask_ahead<H>(ahead, pace, q);
    __m512i w[H];
    MOE_UNROLL
    for (int h = 0; h < H; ++h) w[h] = _mm512_loadu_si512(q + h * tile_bytes);
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      std::int32_t four;
      std::memcpy(&four, a + 64 * m + 4 * i, 4);
      const __m512i b = _mm512_set1_epi32(four);
      MOE_UNROLL
      for (int h = 0; h < H; ++h) sum[h][m] = (int_lanes)_mm512_dpbusd_epi32((__m512i)sum[h][m], w[h], b);
    }
  }
}
template <int Build, int M>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void multiply_block_bytes(const block_work& w) noexcept {
  constexpr int H = halves_at_once<M>;
  int_lanes sum[2][M];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) sum[0][m] = sum[1][m] = int_lanes{};
  const std::byte *a = w.a, *q = w.weights, *ahead = w.ahead;
  for (dim l = 0; l < w.lines; ++l, a += w.a_step) {
    MOE_UNROLL
    for (int h = 0; h < 2; h += H) add_bytes<M, H>(a, q, ahead, w.pace, sum + h);
    if (H == 2) q += tile_bytes;
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    const float* f = w.factors + m * w.factor_count;
    const __m512 unit = _mm512_set1_ps(f[0]);
    const __m512i shift = _mm512_set1_epi32(128 * static_cast<std::int32_t>(f[1]));
    MOE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m512 x = _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)sum[h][m], shift));
      _mm512_storeu_ps(w.c + m * w.ld + 16 * h, _mm512_mul_ps(_mm512_mul_ps(unit, _mm512_loadu_ps(w.scale + 16 * h)), x));
    }
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
