// SPDX-License-Identifier: Apache-2.0
/// Decoding from a cache of bytes on 512-bit vectors. Queries and weights become whole numbers of 16 bits, so that products
/// of pairs add up exactly: a query is off by at most 2^-16 of its largest element, a weight by 2^-16 of the largest of its
/// step.
#pragma once

#include "moe/backend/cpu/decode_avx512.hpp"
#include "moe/backend/decode_bytes.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

#if defined(__GNUC__)
typedef int decode_ints __attribute__((vector_size(64)));  // GCC 12 keeps an array of __m512i in memory
#else
using decode_ints = __m512i;
#endif

/// As of floats.
MOE_TARGET(MOE_AVX512)
inline __m512i fold_heads(__m512i a, __m512i b, __m512i c, __m512i d) noexcept {
  const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  const __m512i cd = _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}
MOE_TARGET(MOE_AVX512)
inline __m512i fold_keys(__m512i a, __m512i b, __m512i c, __m512i d) noexcept {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
MOE_TARGET(MOE_AVX512)
inline __m512i load_words_512(const std::int8_t* p) noexcept {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

/// Scores in the units of the queries.
template <int Build>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void score_quad_bytes_512(const key_quad<std::int8_t>& w, const float (&k_scale)[4], float* s) noexcept {
  decode_ints sum[4][4];
  MOE_UNROLL
  for (int i = 0; i < 4; ++i) {
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) sum[i][g] = decode_ints{};
  }
  const std::int8_t *k0 = w.k[0], *k1 = w.k[1], *k2 = w.k[2], *k3 = w.k[3];
  const std::byte *q0 = words_of(w.q[0]), *q1 = words_of(w.q[1]), *q2 = words_of(w.q[2]), *q3 = words_of(w.q[3]);
  const char* ahead = w.ahead;
  MOE_NO_UNROLL
  for (dim j = 0; j < w.d; j += decode_pad, ahead += 128) {
    ask_512<2>(ahead);
    const std::int8_t* k[4] = {k0 + j, k1 + j, k2 + j, k3 + j};
    const decode_ints q[4] = {(decode_ints)_mm512_loadu_si512(q0 + 2 * j), (decode_ints)_mm512_loadu_si512(q1 + 2 * j),
                              (decode_ints)_mm512_loadu_si512(q2 + 2 * j), (decode_ints)_mm512_loadu_si512(q3 + 2 * j)};
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512i x = load_words_512(k[i]);
      MOE_UNROLL
      for (int g = 0; g < 4; ++g) sum[i][g] = (decode_ints)_mm512_dpwssd_epi32((__m512i)sum[i][g], x, (__m512i)q[g]);
    }
  }
  decode_ints folded[4];
  MOE_UNROLL
  for (int i = 0; i < 4; ++i)
    folded[i] = (decode_ints)fold_heads((__m512i)sum[i][0], (__m512i)sum[i][1], (__m512i)sum[i][2], (__m512i)sum[i][3]);
  const __m512i all = fold_keys((__m512i)folded[0], (__m512i)folded[1], (__m512i)folded[2], (__m512i)folded[3]);
  _mm512_storeu_ps(s, _mm512_mul_ps(_mm512_cvtepi32_ps(all), _mm512_broadcast_f32x4(_mm_loadu_ps(k_scale))));
}

/// The weights p v_scale of n rows as whole numbers w in a unit for each head, NaN where one of its weights is.
template <int Build>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void round_weights_512(float* p, const float* v_scale, dim n, std::int16_t* w, float* unit) noexcept {
  const dim groups = moe::detail::blocks(n, 4);
  __m512 most = _mm512_setzero_ps(), strange = most;
  for (dim i = 0; i < groups; ++i) {
    const __mmask8 rows = static_cast<__mmask8>(n - 4 * i >= 4 ? 0xf : (1 << (n - 4 * i)) - 1);
    const __m512 own =
        _mm512_mul_ps(_mm512_loadu_ps(p + 16 * i), _mm512_broadcast_f32x4(_mm_maskz_loadu_ps(rows, v_scale + 4 * i)));
    most = _mm512_max_ps(most, own);
    strange = _mm512_fmadd_ps(own, _mm512_setzero_ps(), strange);  // NaN where one is not finite
    _mm512_storeu_ps(p + 16 * i, own);
  }
  most = largest_of_head(most);
  store_heads(unit, _mm512_fmadd_ps(most, _mm512_set1_ps(1.f / 32767), sum_of_head(strange)));
  const __m512 per =
      _mm512_maskz_div_ps(_mm512_cmp_ps_mask(most, _mm512_set1_ps(0x1p-100f), _CMP_GT_OQ), _mm512_set1_ps(32767), most);
  for (dim i = 0; i < groups; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(w + 16 * i),
                        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + 16 * i), per))));
}

/// Values of 32 C columns for four heads, two rows at a time.
template <int Build, int C>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void weigh_quad_bytes_512(const value_quad<std::int8_t, std::int16_t>& w, dim first) noexcept {
  decode_ints sum[4][2 * C];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 2 * C; ++c) sum[g][c] = decode_ints{};
  }
  const std::int8_t* v = w.v + first;
  const char* ahead = w.ahead;
  MOE_NO_UNROLL
  for (dim r = 0; r < w.rows; r += 2, v += 2 * w.dv, ahead += 64 * C) {
    ask_512<C>(ahead);
    const std::int8_t* next = r + 1 < w.rows ? v + w.dv : v;  // beyond the last row weights are 0
    decode_ints x[2 * C];
    MOE_UNROLL
    for (int c = 0; c < C; ++c) {
      const __m512i a = load_words_512(v + 32 * c), b = load_words_512(next + 32 * c);
      x[2 * c] = (decode_ints)_mm512_unpacklo_epi16(a, b);
      x[2 * c + 1] = (decode_ints)_mm512_unpackhi_epi16(a, b);
    }
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      std::int32_t pair;
      std::memcpy(&pair, w.weights + r / 4 * 16 + 4 * g + r % 4, sizeof pair);
      const __m512i b = _mm512_set1_epi32(pair);
      MOE_UNROLL
      for (int c = 0; c < 2 * C; ++c) sum[g][c] = (decode_ints)_mm512_dpwssd_epi32((__m512i)sum[g][c], (__m512i)x[c], b);
    }
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 2 * C; ++c) {
      const __m512 own = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sum[g][c]), _mm512_set1_ps(w.unit[g]));
      float* o = w.o[g] + first + 16 * c;
      _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_set1_ps(w.fade[g]), _mm512_loadu_ps(o), own));
    }
  }
}

template <int Build>
void attend_bytes_512(const decode_unit& u) noexcept {
  start_heads(u);
  for (dim first = 0; first < u.rows; first += decode_tile) {
    const dim n = moe::detail::at_most(u.rows - first, decode_tile);
    const auto *k = static_cast<const std::int8_t*>(u.k) + first * u.d,
               *v = static_cast<const std::int8_t*>(u.v) + first * u.dv;
    for (dim head = 0; head < u.heads; head += decode_heads) {
      alignas(64) float s[decode_heads * decode_tile];
      alignas(64) std::int16_t weights[decode_heads * decode_tile];
      float fade[decode_heads], unit[decode_heads];
      value_quad<std::int8_t, std::int16_t> w{v,    n,    u.dv, weights,
                                              fade, unit, {},   reinterpret_cast<const char*>(k + n * u.d)};
      for (dim g = 0; g < decode_heads; ++g) {
        unit[g] = unit_of(u.query(head + g));
        w.o[g] = u.o + (head + g) * u.dv;
      }
      for (dim r = 0; r < n; r += 4) {
        float k_scale[4];
        for (dim i = 0; i < 4; ++i) k_scale[i] = u.k_scale[first + moe::detail::at_most(r + i, n - 1)];
        score_quad_bytes_512<Build>(quad_of(u, k, r, n, head, v), k_scale, s + 4 * r);
      }
      soften_512<Build>(s, n, unit, u.largest + head, u.sum + head, fade);
      round_weights_512<Build>(s, u.v_scale + first, n, weights, unit);
      dim j = 0;
      for (; j + 64 <= u.dv; j += 64, w.ahead += n * 64) weigh_quad_bytes_512<Build, 2>(w, j);
      if (j < u.dv) weigh_quad_bytes_512<Build, 1>(w, j);
    }
  }
  for (dim i = 0; i < u.heads; ++i) restore_order(u.o + i * u.dv, u.dv, place_of_pairs<16>);
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build>
decode_kernels kernels_of(basic_avx512_vnni<Build>, cache_of<std::int8_t>) noexcept {
  return {detail::prepare_words<Build>, detail::attend_bytes_512<Build>};
}

}  // namespace moe::arch

#endif
