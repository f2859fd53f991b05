// SPDX-License-Identifier: Apache-2.0
/// Decoding on 512-bit vectors, four query heads at once. Halves are widened as they are read.
///
/// Scores and weights of a tile are groups of 16 floats: lane 4 g + i of group n is that of head g and key 4 n + i. While
/// the keys of a tile are read its values are asked for, and while those are read the next keys: memory never waits.
#pragma once

#include "moe/backend/cpu/attention_avx512.hpp"
#include "moe/backend/decode_kernels.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// 32 elements as floats: floats and f16 in order, of bf16 the even ones and the odd ones.
MOE_TARGET(MOE_AVX512)
inline void load_pair_512(const float* p, __m512& a, __m512& b) noexcept {
  a = _mm512_loadu_ps(p);
  b = _mm512_loadu_ps(p + 16);
}
MOE_TARGET(MOE_AVX512)
inline void load_pair_512(const bf16* p, __m512& a, __m512& b) noexcept {
  const __m512i v = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
MOE_TARGET(MOE_AVX512)
inline void load_pair_512(const f16* p, __m512& a, __m512& b) noexcept {
  a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}

/// Sums of the lanes of 16 vectors, those of four heads for each of four keys: fold_heads for each key, then fold_keys,
/// gives the sum of key i and head g in lane 4 g + i.
MOE_TARGET(MOE_AVX512)
inline __m512 fold_heads(__m512 a, __m512 b, __m512 c, __m512 d) noexcept {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
MOE_TARGET(MOE_AVX512)
inline __m512 fold_keys(__m512 a, __m512 b, __m512 c, __m512 d) noexcept {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

/// Asks for `Lines` lines.
template <int Lines>
MOE_TARGET(MOE_AVX512)
inline void ask_512(const char* p) noexcept {
  MOE_UNROLL
  for (int l = 0; l < Lines; ++l) _mm_prefetch(p + 64 * l, _MM_HINT_T1);
}

/// Four key rows against four queries, and memory that is needed soon.
template <class T>
struct key_quad {
  const T* k[4];
  const std::byte* q[decode_heads];
  dim d;
  const char* ahead;
};

template <int Build, class T>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void score_quad_512(const key_quad<T>& w, float* s) noexcept {
  constexpr int lines = 4 * decode_pad * sizeof(T) / 64;
  __m512 sum[4][4];
  MOE_UNROLL
  for (int i = 0; i < 4; ++i) {
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) sum[i][g] = _mm512_setzero_ps();
  }
  const T *k0 = w.k[0], *k1 = w.k[1], *k2 = w.k[2], *k3 = w.k[3];
  const std::byte *q0 = w.q[0], *q1 = w.q[1], *q2 = w.q[2], *q3 = w.q[3];
  const char* ahead = w.ahead;
  MOE_NO_UNROLL
  for (dim j = 0; j < w.d; j += decode_pad, ahead += 64 * lines) {
    ask_512<lines>(ahead);
    const std::byte* q[4] = {q0 + 4 * j, q1 + 4 * j, q2 + 4 * j, q3 + 4 * j};
    __m512 qa[4], qb[4];
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      qa[g] = _mm512_loadu_ps(q[g]);
      qb[g] = _mm512_loadu_ps(q[g] + 64);
    }
    const T* k[4] = {k0 + j, k1 + j, k2 + j, k3 + j};
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
      __m512 a, b;
      load_pair_512(k[i], a, b);
      MOE_UNROLL
      for (int g = 0; g < 4; ++g) {
        sum[i][g] = _mm512_fmadd_ps(a, qa[g], sum[i][g]);
        sum[i][g] = _mm512_fmadd_ps(b, qb[g], sum[i][g]);
      }
    }
  }
  __m512 folded[4];
  MOE_UNROLL
  for (int i = 0; i < 4; ++i) folded[i] = fold_heads(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
  _mm512_storeu_ps(s, fold_keys(folded[0], folded[1], folded[2], folded[3]));
}

/// Four floats, each in the four lanes of its head; and the largest and the sum of those lanes.
MOE_TARGET(MOE_AVX512)
inline __m512 spread_heads(const float* p) noexcept {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                               _mm512_castps128_ps512(_mm_loadu_ps(p)));
}
MOE_TARGET(MOE_AVX512)
inline __m512 largest_of_head(__m512 v) noexcept {
  v = _mm512_max_ps(v, _mm512_permute_ps(v, 0x4e));
  return _mm512_max_ps(v, _mm512_permute_ps(v, 0xb1));
}
MOE_TARGET(MOE_AVX512)
inline __m512 sum_of_head(__m512 v) noexcept {
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
  return _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
}
MOE_TARGET(MOE_AVX512)
inline void store_heads(float* p, __m512 v) noexcept {
  _mm_storeu_ps(p, _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_set1_epi64(0x0000000400000000), v)));
  _mm_storel_pi(reinterpret_cast<__m64*>(p + 2),
                _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_set1_epi64(0x0000000c00000008), v)));
}

/// Softmax of a tile of n keys, see soften, of scores in units of `unit` for each head: weights of keys from n on are 0.
template <int Build>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void soften_512(float* s, dim n, const float* unit, float* largest, float* sum, float* fade) noexcept {
  const dim groups = moe::detail::blocks(n, 4);
  const __mmask16 last = static_cast<__mmask16>(0x1111 * ((1 << (n - 4 * (groups - 1))) - 1));
  float* end = s + 16 * (groups - 1);
  _mm512_storeu_ps(end, _mm512_mask_loadu_ps(_mm512_set1_ps(-moe::detail::infinity), last, end));
  const __m512 least = _mm512_set1_ps(-moe::detail::infinity), before = spread_heads(largest), per = spread_heads(unit);
  __m512 most = least;
  for (const float* p = s; p <= end; p += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(p));
  most = _mm512_max_ps(before, _mm512_mul_ps(largest_of_head(most), per));
  const __m512 base = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(most, least, _CMP_NEQ_UQ), most);
  __m512 total = _mm512_setzero_ps();
  for (float* p = s; p <= end; p += 16) {
    const __m512 w = exp2_512(_mm512_fmsub_ps(_mm512_loadu_ps(p), per, base));
    total = _mm512_add_ps(total, w);
    _mm512_storeu_ps(p, w);
  }
  const __m512 shrink = exp2_512(_mm512_sub_ps(before, base));
  store_heads(fade, shrink);
  store_heads(largest, most);
  store_heads(sum, _mm512_fmadd_ps(spread_heads(sum), shrink, sum_of_head(total)));
}

/// Value rows for four heads: o_g = fade_g o_g + sum over rows of weight(g, row) v.
template <class T, class W>
struct value_quad {
  const T* v;
  dim rows, dv;
  const W* weights;   ///< in groups
  const float* fade;  ///< [4]
  const float* unit;  ///< [4] of the weights, where they are whole numbers
  float* o[decode_heads];
  const char* ahead;
};

/// 32 C columns.
template <int Build, class T, int C>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void weigh_quad_512(const value_quad<T, float>& w, dim first) noexcept {
  constexpr int lines = C * decode_pad * sizeof(T) / 64;
  __m512 sum[4][2 * C];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 2 * C; ++c)
      sum[g][c] = _mm512_mul_ps(_mm512_set1_ps(w.fade[g]), _mm512_loadu_ps(w.o[g] + first + 16 * c));
  }
  const T* v = w.v + first;
  const char* ahead = w.ahead;
  MOE_NO_UNROLL
  for (dim r = 0; r < w.rows; ++r, v += w.dv, ahead += 64 * lines) {
    ask_512<lines>(ahead);
    const float* p = w.weights + r / 4 * 16 + r % 4;
    __m512 x[2 * C];
    MOE_UNROLL
    for (int c = 0; c < C; ++c) load_pair_512(v + c * decode_pad, x[2 * c], x[2 * c + 1]);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      const __m512 b = _mm512_set1_ps(p[4 * g]);
      MOE_UNROLL
      for (int c = 0; c < 2 * C; ++c) sum[g][c] = _mm512_fmadd_ps(b, x[c], sum[g][c]);
    }
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 2 * C; ++c) _mm512_storeu_ps(w.o[g] + first + 16 * c, sum[g][c]);
  }
}

/// Rows r .. r + 4 of n, the last one again beyond it.
template <class T>
inline key_quad<T> quad_of(const decode_unit& u, const T* k, dim r, dim n, dim head, const T* ahead) noexcept {
  key_quad<T> w;
  for (dim i = 0; i < 4; ++i) {
    w.k[i] = k + moe::detail::at_most(r + i, n - 1) * u.d;
    w.q[i] = u.query(head + i);
  }
  w.d = u.d;
  w.ahead = reinterpret_cast<const char*>(ahead + r * u.d);
  return w;
}

/// Columns in the order in which 32 elements of T are read; of bf16 the even ones first.
template <class T>
constexpr dim place_512(dim l) noexcept {
  return std::is_same_v<T, bf16> ? l % 16 * 2 + l / 16 : l;
}

template <int Build, class T>
void attend_512(const decode_unit& u) noexcept {
  constexpr float ones[decode_heads] = {1, 1, 1, 1};
  start_heads(u);
  for (dim first = 0; first < u.rows; first += decode_tile) {
    const dim n = moe::detail::at_most(u.rows - first, decode_tile);
    const T *k = static_cast<const T*>(u.k) + first * u.d, *v = static_cast<const T*>(u.v) + first * u.dv;
    for (dim head = 0; head < u.heads; head += decode_heads) {
      alignas(64) float s[decode_heads * decode_tile];
      float fade[decode_heads];
      for (dim r = 0; r < n; r += 4) score_quad_512<Build>(quad_of(u, k, r, n, head, v), s + 4 * r);
      soften_512<Build>(s, n, ones, u.largest + head, u.sum + head, fade);
      value_quad<T, float> w{v, n, u.dv, s, fade, ones, {}, reinterpret_cast<const char*>(k + n * u.d)};
      for (dim g = 0; g < decode_heads; ++g) w.o[g] = u.o + (head + g) * u.dv;
      dim j = 0;
      for (; j + 64 <= u.dv; j += 64, w.ahead += n * 64 * dim{sizeof(T)}) weigh_quad_512<Build, T, 2>(w, j);
      if (j < u.dv) weigh_quad_512<Build, T, 1>(w, j);
    }
  }
  for (dim i = 0; i < u.heads; ++i) restore_order(u.o + i * u.dv, u.dv, place_512<T>);
}

/// Queries in the order in which keys are read.
template <int Build, class T>
void prepare_512(const float* q, dim d, std::byte* to) noexcept {
  for (dim j = 0; j < d; ++j) {
    const float* from = q + j / 32 * 32 + place_512<T>(j % 32);
    std::memcpy(to + j * dim{sizeof(float)}, from, sizeof(float));
  }
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class T>
  requires(!std::is_same_v<T, std::int8_t>)
decode_kernels kernels_of(basic_avx512<Build>, cache_of<T>) noexcept {
  return {detail::prepare_512<Build, T>, detail::attend_512<Build, T>};
}

}  // namespace moe::arch

#endif
