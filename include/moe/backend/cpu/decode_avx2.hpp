// SPDX-License-Identifier: Apache-2.0
/// Decoding on 256-bit vectors: two keys against four query heads at once, then each value row once for four heads. Halves
/// and bytes are widened as they are read, so of bytes only their own rounding counts.
///
/// Scores and weights of a tile lie key after key, four heads each.
#pragma once

#include "moe/backend/cpu/attention_avx2.hpp"
#include "moe/backend/decode_kernels.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// Eight elements as floats.
MOE_TARGET(MOE_AVX2)
inline __m256 load_256(const float* p) noexcept { return _mm256_loadu_ps(p); }
MOE_TARGET(MOE_AVX2)
inline __m256 load_256(const bf16* p) noexcept {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
MOE_TARGET(MOE_AVX2)
inline __m256 load_256(const f16* p) noexcept {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MOE_TARGET(MOE_AVX2)
inline __m256 load_256(const std::int8_t* p) noexcept {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
MOE_TARGET(MOE_AVX2)
inline void ask_256(const void* p) noexcept {
  constexpr dim ahead = 4096;
  _mm_prefetch(static_cast<const char*>(p) + ahead, _MM_HINT_T0);
}

/// s[2, 4] = the scores of two keys and four heads.
template <int Build, class T>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE void score_pair_256(const T* k0, const T* k1, dim d, const float* const (&q)[4], float* s) noexcept {
  __m256 a[4], b[4];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) a[g] = b[g] = _mm256_setzero_ps();
  const float *q0 = q[0], *q1 = q[1], *q2 = q[2], *q3 = q[3];
  MOE_NO_UNROLL
  for (dim j = 0; j < d; j += 8) {
    if (j * dim{sizeof(T)} % 64 == 0) {
      ask_256(k0 + j);
      ask_256(k1 + j);
    }
    const __m256 x = load_256(k0 + j), y = load_256(k1 + j);
    const __m256 h[4] = {_mm256_loadu_ps(q0 + j), _mm256_loadu_ps(q1 + j), _mm256_loadu_ps(q2 + j), _mm256_loadu_ps(q3 + j)};
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      a[g] = _mm256_fmadd_ps(x, h[g], a[g]);
      b[g] = _mm256_fmadd_ps(y, h[g], b[g]);
    }
  }
  const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const __m256 second = _mm256_hadd_ps(_mm256_hadd_ps(b[0], b[1]), _mm256_hadd_ps(b[2], b[3]));
  _mm256_storeu_ps(s,
                   _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31)));
}

/// Softmax of a tile of n keys, see soften; the weight of a key beyond an odd n is 0.
template <int Build>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE void soften_256(float* s, dim n, const float* k_scale, float* largest, float* sum, float* fade) noexcept {
  const dim pairs = moe::detail::blocks(n, 2);
  const __m256 least = _mm256_set1_ps(-moe::detail::infinity);
  __m256 most = least;
  if (n % 2 != 0) _mm_storeu_ps(s + 4 * n, _mm256_castps256_ps128(least));
  for (dim i = 0; i < pairs; ++i) {
    __m256 v = _mm256_loadu_ps(s + 8 * i);
    if (k_scale) {
      const float next = 2 * i + 1 < n ? k_scale[2 * i + 1] : 1.f;
      v = _mm256_mul_ps(v, _mm256_set_m128(_mm_set1_ps(next), _mm_set1_ps(k_scale[2 * i])));
      _mm256_storeu_ps(s + 8 * i, v);
    }
    most = _mm256_max_ps(most, v);
  }
  const __m128 before = _mm_loadu_ps(largest);
  const __m128 top = _mm_max_ps(before, _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1)));
  const __m128 base = _mm_and_ps(top, _mm_cmpneq_ps(top, _mm256_castps256_ps128(least)));
  const __m256 both = _mm256_set_m128(base, base);
  __m256 total = _mm256_setzero_ps();
  for (dim i = 0; i < pairs; ++i) {
    const __m256 w = exp2_256(_mm256_sub_ps(_mm256_loadu_ps(s + 8 * i), both));
    total = _mm256_add_ps(total, w);
    _mm256_storeu_ps(s + 8 * i, w);
  }
  const __m128 shrink = _mm256_castps256_ps128(exp2_256(_mm256_castps128_ps256(_mm_sub_ps(before, base))));
  _mm_storeu_ps(fade, shrink);
  _mm_storeu_ps(largest, top);
  const __m128 now = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
  _mm_storeu_ps(sum, _mm_fmadd_ps(_mm_loadu_ps(sum), shrink, now));
}

/// 16 columns: o_g = fade_g o_g + sum over rows of w(row, g) v
template <int Build, class T>
MOE_TARGET(MOE_AVX2)
MOE_NO_INLINE
    void weigh_rows_256(const T* v, dim rows, dim dv, const float* w, const float* fade, float* o, bool ask) noexcept {
  __m256 a[4], b[4];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    const __m256 f = _mm256_set1_ps(fade[g]);
    a[g] = _mm256_mul_ps(f, _mm256_loadu_ps(o + g * dv));
    b[g] = _mm256_mul_ps(f, _mm256_loadu_ps(o + g * dv + 8));
  }
  MOE_NO_UNROLL
  for (dim r = 0; r < rows; ++r, v += dv, w += 4) {
    for (dim l = 0; ask && l < dv * dim{sizeof(T)}; l += 64) ask_256(reinterpret_cast<const char*>(v) + l);
    const __m256 x = load_256(v), y = load_256(v + 8);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      const __m256 p = _mm256_broadcast_ss(w + g);
      a[g] = _mm256_fmadd_ps(p, x, a[g]);
      b[g] = _mm256_fmadd_ps(p, y, b[g]);
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
  for (dim first = 0; first < u.rows; first += decode_tile) {
    const dim n = moe::detail::at_most(u.rows - first, decode_tile);
    const T *k = static_cast<const T*>(u.k) + first * u.d, *v = static_cast<const T*>(u.v) + first * u.dv;
    for (dim head = 0; head < u.heads; head += decode_heads) {
      alignas(32) float s[decode_heads * decode_tile];
      float fade[decode_heads];
      const float* q[decode_heads];
      for (dim g = 0; g < decode_heads; ++g) q[g] = reinterpret_cast<const float*>(u.query(head + g));
      for (dim r = 0; r < n; r += 2)
        score_pair_256<Build>(k + r * u.d, k + moe::detail::at_most(r + 1, n - 1) * u.d, u.d, q, s + 4 * r);
      soften_256<Build>(s, n, u.k_scale ? u.k_scale + first : nullptr, u.largest + head, u.sum + head, fade);
      for (dim r = 0; u.v_scale && r < n; ++r)
        for (dim g = 0; g < decode_heads; ++g) s[4 * r + g] *= u.v_scale[first + r];
      for (dim j = 0; j < u.dv; j += 16) weigh_rows_256<Build>(v + j, n, u.dv, s, fade, u.o + head * u.dv + j, j == 0);
    }
  }
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class T>
decode_kernels kernels_of(basic_avx2<Build>, cache_of<T>) noexcept {
  return {detail::prepare_floats<Build>, detail::attend_256<Build, T>};
}

}  // namespace moe::arch

#endif
