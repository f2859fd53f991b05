// SPDX-License-Identifier: Apache-2.0
/// Decoding from a cache of bytes on 512-bit vectors. Queries and weights become whole numbers of 16 bits, cut in two bytes,
/// whose products with bytes add up exactly: a query is off by at most 2^-16 of its largest element, a weight by 2^-17 of
/// the largest of its step.
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

/// sum + the products of 4 bytes in each lane, the first of them without sign.
MOE_TARGET(MOE_AVX512_VNNI)
inline decode_ints add_products_512(decode_ints sum, decode_ints a, decode_ints b) noexcept {
  return (decode_ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
MOE_TARGET(MOE_AVX512)
inline decode_ints spread_four_512(const void* p) noexcept {
  std::int32_t four;
  std::memcpy(&four, p, sizeof four);
  return (decode_ints)_mm512_set1_epi32(four);
}

/// Scores of N blocks in the units of the queries, four elements of 16 keys at a time: bytes are read as k + 128, which the
/// sum of the query makes good.
template <int Build, int N>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void score_bytes_512(const key_blocks_512<std::int8_t>& w, const float* k_scale, float* s) noexcept {
  const byte_query q[4] = {{w.q[0], w.d}, {w.q[1], w.d}, {w.q[2], w.d}, {w.q[3], w.d}};
  decode_ints high[N][4], low[N][4];
  MOE_UNROLL
  for (int n = 0; n < N; ++n) {
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      high[n][g] = decode_ints{};
      low[n][g] = (decode_ints)_mm512_set1_epi32(q[g].start);
    }
  }
  const std::byte *q0 = q[0].high, *q1 = q[1].high, *q2 = q[2].high, *q3 = q[3].high;
  const std::int8_t* k = w.k;
  lines_ahead ahead = w.ahead;
  const dim step = w.d * kv_block, d = w.d;
  MOE_NO_UNROLL
  for (dim j = 0; j < d; j += 4, k += 64) {
    ahead.ask<N>();
    const std::byte* from[4] = {q0 + j, q1 + j, q2 + j, q3 + j};
    decode_ints x[N];
    MOE_UNROLL
    for (int n = 0; n < N; ++n)
      x[n] = (decode_ints)_mm512_xor_si512(_mm512_loadu_si512(k + n * step), _mm512_set1_epi8(-128));
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      const decode_ints a = spread_four_512(from[g]), b = spread_four_512(from[g] + d);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        high[n][g] = add_products_512(high[n][g], x[n], a);
        low[n][g] = add_products_512(low[n][g], x[n], b);
      }
    }
  }
  MOE_UNROLL
  for (int n = 0; n < N; ++n) {
    const __m512 scale = _mm512_loadu_ps(k_scale + n * kv_block);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      const __m512i all = _mm512_add_epi32(_mm512_slli_epi32((__m512i)high[n][g], 8), (__m512i)low[n][g]);
      _mm512_storeu_ps(s + g * decode_tile + n * kv_block, _mm512_mul_ps(_mm512_cvtepi32_ps(all), scale));
    }
  }
}

/// The weights p v_scale of a tile as whole numbers of 16 bits in a unit for each head, NaN where one of its weights is.
struct byte_weights {
  alignas(64) std::uint8_t high[decode_heads * decode_tile];
  alignas(64) std::uint8_t low[decode_heads * decode_tile];
  float unit[decode_heads];
};
static_assert(decode_tile * 127 * 65535 < 0x7fffffff, "sums over a tile fit 32 bits");
/// Two bytes of each of 64 numbers.
MOE_TARGET(MOE_AVX512)
inline void store_bytes_512(__m512i a, __m512i b, __m512i c, __m512i d, std::uint8_t* high, std::uint8_t* low) noexcept {
  const __m512i ab = _mm512_packus_epi32(a, b), cd = _mm512_packus_epi32(c, d), byte = _mm512_set1_epi16(0xff);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(ab, byte), _mm512_and_si512(cd, byte));
  const __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(ab, 8), _mm512_srli_epi16(cd, 8));
  _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, lower));
  _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, upper));
}
MOE_TARGET(MOE_AVX512)
inline __m512i rounded_512(const float* p, __m512 per, const tile_512& t, dim r) noexcept {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(t.lanes[r / kv_block], p), per));
}
/// p[4][decode_tile]: the softmax of a tile for four heads, which becomes p v_scale on the way.
template <int Build>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE
    void round_weights_512(float* p, const float* v_scale, const tile_512& t, byte_weights& w, lines_ahead ahead) noexcept {
  constexpr dim step = 64;
  const dim first = t.lo / step * step;
  __m512i most[4];  // of numbers without sign, as whole numbers: NaN is the largest
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) most[g] = _mm512_setzero_si512();
  for (dim r = first; r < t.hi; r += kv_block) {
    ahead.ask<4>();
    const __mmask16 own = t.lanes[r / kv_block];
    const __m512 scale = _mm512_maskz_loadu_ps(own, v_scale + r);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      float* at = p + g * decode_tile + r;
      const __m512 x = _mm512_maskz_mul_ps(own, _mm512_loadu_ps(at), scale);
      most[g] = _mm512_max_epu32(most[g], _mm512_castps_si512(x));
      _mm512_storeu_ps(at, x);
    }
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    const float largest = __builtin_bit_cast(float, _mm512_reduce_max_epu32(most[g]));
    w.unit[g] = largest / 65535;
    const __m512 per = _mm512_set1_ps(largest > 0x1p-100f ? 65535 / largest : 0.f);
    const float* from = p + g * decode_tile;
    for (dim r = first; r < t.hi; r += step)
      store_bytes_512(rounded_512(from + r, per, t, r), rounded_512(from + r + 16, per, t, r + 16),
                      rounded_512(from + r + 32, per, t, r + 32), rounded_512(from + r + 48, per, t, r + 48),
                      w.high + g * decode_tile + r, w.low + g * decode_tile + r);
  }
}

struct value_bytes_512 {
  const std::int8_t* v;
  dim lo, hi, dv;
  const byte_weights* weights;
  const float* fade;
  float* o[decode_heads];
  lines_ahead ahead;
};

/// 32 columns of four tokens at a time.
template <int Build>
MOE_TARGET(MOE_AVX512_VNNI)
MOE_NO_INLINE void weigh_bytes_512(const value_bytes_512& w, dim first) noexcept {
  decode_ints high[4][2], low[4][2];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 2; ++c) high[g][c] = low[g][c] = decode_ints{};
  }
  const dim lo = w.lo / 4 * 4;
  const std::int8_t* v = w.v + lo * w.dv + 4 * first;
  const std::uint8_t *h = w.weights->high, *l = w.weights->low;
  lines_ahead ahead = w.ahead;
  MOE_NO_UNROLL
  for (dim r = lo; r < w.hi; r += 4, v += 4 * w.dv) {
    ahead.ask<2>();
    const decode_ints x[2] = {(decode_ints)_mm512_loadu_si512(v), (decode_ints)_mm512_loadu_si512(v + 64)};
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      const decode_ints a = spread_four_512(h + g * decode_tile + r), b = spread_four_512(l + g * decode_tile + r);
      MOE_UNROLL
      for (int c = 0; c < 2; ++c) {
        high[g][c] = add_products_512(high[g][c], a, x[c]);
        low[g][c] = add_products_512(low[g][c], b, x[c]);
      }
    }
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 2; ++c) {
      const __m512i all = _mm512_add_epi32(_mm512_slli_epi32((__m512i)high[g][c], 8), (__m512i)low[g][c]);
      float* o = w.o[g] + first + 16 * c;
      const __m512 faded = _mm512_mul_ps(_mm512_set1_ps(w.fade[g]), _mm512_loadu_ps(o));
      _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(w.weights->unit[g]), faded));
    }
  }
}

template <int Build>
void attend_bytes_512(const decode_unit& u) noexcept {
  using keys = key_blocks_512<std::int8_t>;
  start_heads(u);
  for_each_tile(u, [&](tile_span span) {
    const tile_512 t(span);
    const float* scale = u.k_scale + t.base;
    tile_ahead ahead = ahead_of<std::int8_t>(u, t, soften_lines + 1);  // one for round_weights_512
    for (dim head = 0; head < u.heads; head += decode_heads) {
      alignas(64) float s[decode_heads * decode_tile];
      byte_weights weights;
      float unit[decode_heads], fade[decode_heads];
      score_tile_512<std::int8_t>(
          u, t, head, ahead, s, [&](const keys& w, dim r, float* to) { score_bytes_512<Build, 1>(w, scale + r, to); },
          [&](const keys& w, dim r, float* to) { score_bytes_512<Build, 2>(w, scale + r, to); });
      for (dim g = 0; g < decode_heads; ++g) unit[g] = byte_query(u.query(head + g), u.d).unit;
      soften_512<Build>(s, t, unit, u.largest + head, u.sum + head, fade,
                        ahead.take(t.blocks() * decode_heads * soften_lines));
      round_weights_512<Build>(s, u.v_scale + t.base, t, weights, ahead.take(t.blocks() * decode_heads));
      value_bytes_512 w{static_cast<const std::int8_t*>(u.v) + t.base * u.dv, t.lo, t.hi, u.dv, &weights, fade, {}, {}};
      for (dim g = 0; g < decode_heads; ++g) w.o[g] = u.o + (head + g) * u.dv;
      for (dim j = 0; j < u.dv; j += kv_pad) {
        w.ahead = ahead.take_along((t.hi - t.lo) * kv_pad / 64);
        weigh_bytes_512<Build>(w, j);
      }
    }
  });
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build>
decode_kernels kernels_of(basic_avx512_vnni<Build>, cache_of<std::int8_t>) noexcept {
  return {detail::prepare_bytes<Build>, detail::attend_bytes_512<Build>};
}

}  // namespace moe::arch

#endif
