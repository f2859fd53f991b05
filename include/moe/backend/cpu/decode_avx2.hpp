// SPDX-License-Identifier: Apache-2.0
/// Decoding on 256-bit vectors: a block of keys against four query heads at once, then each value once for four heads.
/// Halves and bytes are widened as they are read, so of bytes only their own rounding counts.
///
/// Scores and weights of a tile lie head after head, decode_tile keys each.
#pragma once

#include "moe/backend/cpu/attention_avx2.hpp"
#include "moe/backend/decode_kernels.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// The elements that lie together, of eight keys or columns: x[i] is the i-th of each.
MOE_TARGET(MOE_AVX2)
inline void load_256(const float* p, __m256 (&x)[1]) noexcept { x[0] = _mm256_loadu_ps(p); }
MOE_TARGET(MOE_AVX2)
inline void load_256(const f16* p, __m256 (&x)[1]) noexcept {
  x[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MOE_TARGET(MOE_AVX2)
inline void load_256(const bf16* p, __m256 (&x)[1]) noexcept {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
MOE_TARGET(MOE_AVX2)
inline void load_256(const bf16* p, __m256 (&x)[2]) noexcept {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  x[1] = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
MOE_TARGET(MOE_AVX2)
inline void load_256(const std::int8_t* p, __m256 (&x)[4]) noexcept {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  x[0] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24), 24));
  x[1] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 16), 24));
  x[2] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 8), 24));
  x[3] = _mm256_cvtepi32_ps(_mm256_srai_epi32(v, 24));
}
MOE_TARGET(MOE_AVX2)
inline void ask_256(const void* p) noexcept {
  constexpr dim ahead = 4096;
  _mm_prefetch(static_cast<const char*>(p) + ahead, _MM_HINT_T0);
}

/// The scores of a block of keys for four heads.
template <int Build, class T>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE void score_block_256(const T* k, dim d, const float* const (&q)[4], float* s) noexcept {
  constexpr int n = moe::detail::keys_together<T>;
  __m256 a[4], b[4];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) a[g] = b[g] = _mm256_setzero_ps();
  const float *q0 = q[0], *q1 = q[1], *q2 = q[2], *q3 = q[3];
  MOE_NO_UNROLL
  for (dim j = 0; j < d; j += n, k += n * kv_block) {
    const float* p[4] = {q0 + j, q1 + j, q2 + j, q3 + j};
    ask_256(k);
    __m256 x[n];
    load_256(k, x);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      MOE_UNROLL
      for (int i = 0; i < n; ++i) a[g] = _mm256_fmadd_ps(x[i], _mm256_broadcast_ss(p[g] + i), a[g]);
    }
    load_256(k + n * 8, x);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      MOE_UNROLL
      for (int i = 0; i < n; ++i) b[g] = _mm256_fmadd_ps(x[i], _mm256_broadcast_ss(p[g] + i), b[g]);
    }
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    _mm256_storeu_ps(s + g * decode_tile, a[g]);
    _mm256_storeu_ps(s + g * decode_tile + 8, b[g]);
  }
}

/// Largest and sum of the lanes.
MOE_TARGET(MOE_AVX2)
inline float largest_256(__m256 v) noexcept {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
MOE_TARGET(MOE_AVX2)
inline float sum_256(__m256 v) noexcept {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
/// Softmax of a tile of one head, see soften: weights of keys outside of it, in its blocks, are 0. Scales: of keys, or null.
template <int Build>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE float soften_256(float* s, tile_span t, const float* k_scale, float& largest, float& sum) noexcept {
  const dim first = t.first_block(), last = t.last_block();
  for (dim r = t.lo; k_scale && r < t.hi; ++r) s[r] *= k_scale[r];
  for (dim r = first; r < t.lo; ++r) s[r] = -moe::detail::infinity;
  for (dim r = t.hi; r < last; ++r) s[r] = -moe::detail::infinity;
  __m256 most = _mm256_set1_ps(largest), total = _mm256_setzero_ps();
  for (dim r = first; r < last; r += 8) most = _mm256_max_ps(_mm256_loadu_ps(s + r), most);  // NaN gives way
  const float top = largest_256(most), base = top > -moe::detail::infinity ? top : 0.f;
  for (dim r = first; r < last; r += 8) {
    const __m256 w = exp2_256(_mm256_sub_ps(_mm256_loadu_ps(s + r), _mm256_set1_ps(base)));
    total = _mm256_add_ps(total, w);
    _mm256_storeu_ps(s + r, w);
  }
  const float fade = _mm256_cvtss_f32(exp2_256(_mm256_set1_ps(largest - base)));
  largest = top;
  sum = sum * fade + sum_256(total);
  return fade;
}

/// 16 columns: o_g = fade_g o_g + sum over tokens lo .. hi of w(g, token) v; w is 0 for those that share their group.
template <int Build, class T>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE
    void weigh_rows_256(const T* v, dim lo, dim hi, dim dv, const float* w, const float* fade, float* o, bool ask) noexcept {
  constexpr int n = moe::detail::values_together<T>;
  __m256 a[4], b[4];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    const __m256 f = _mm256_set1_ps(fade[g]);
    a[g] = _mm256_mul_ps(f, _mm256_loadu_ps(o + g * dv));
    b[g] = _mm256_mul_ps(f, _mm256_loadu_ps(o + g * dv + 8));
  }
  lo = lo / n * n;
  v += lo * dv;
  MOE_NO_UNROLL
  for (dim r = lo; r < hi; r += n, v += n * dv) {
    for (dim l = 0; ask && l < n * dv * dim{sizeof(T)}; l += 64) ask_256(reinterpret_cast<const char*>(v) + l);
    __m256 x[n];
    load_256(v, x);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      MOE_UNROLL
      for (int i = 0; i < n; ++i) a[g] = _mm256_fmadd_ps(x[i], _mm256_broadcast_ss(w + g * decode_tile + r + i), a[g]);
    }
    load_256(v + n * 8, x);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      MOE_UNROLL
      for (int i = 0; i < n; ++i) b[g] = _mm256_fmadd_ps(x[i], _mm256_broadcast_ss(w + g * decode_tile + r + i), b[g]);
    }
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    _mm256_storeu_ps(o + g * dv, a[g]);
    _mm256_storeu_ps(o + g * dv + 8, b[g]);
  }
}

template <int Build, class T>
void attend_256(const decode_unit& u) noexcept {
  start_heads(u);
  for_each_tile(u, [&](tile_span t) {
    const T *k = static_cast<const T*>(u.k) + t.base * u.d, *v = static_cast<const T*>(u.v) + t.base * u.dv;
    for (dim head = 0; head < u.heads; head += decode_heads) {
      alignas(32) float s[decode_heads * decode_tile];
      float fade[decode_heads];
      const float* q[decode_heads];
      for (dim g = 0; g < decode_heads; ++g) q[g] = reinterpret_cast<const float*>(u.query(head + g));
      for (dim r = t.first_block(); r < t.hi; r += kv_block) score_block_256<Build>(k + r * u.d, u.d, q, s + r);
      for (dim g = 0; g < decode_heads; ++g)
        fade[g] = soften_256<Build>(s + g * decode_tile, t, u.k_scale ? u.k_scale + t.base : nullptr, u.largest[head + g],
                                    u.sum[head + g]);
      for (dim g = 0; u.v_scale && g < decode_heads; ++g)
        for (dim r = t.lo; r < t.hi; ++r) s[g * decode_tile + r] *= u.v_scale[t.base + r];
      for (dim j = 0; j < u.dv; j += 16)
        weigh_rows_256<Build>(v + j * moe::detail::values_together<T>, t.lo, t.hi, u.dv, s, fade, u.o + head * u.dv + j,
                              j == 0);
    }
  });
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class T>
decode_kernels kernels_of(basic_avx2<Build>, cache_of<T>) noexcept {
  return {detail::prepare_floats<Build>, detail::attend_256<Build, T>};
}

}  // namespace moe::arch

#endif
