// SPDX-License-Identifier: Apache-2.0
/// Decoding on the vectors of 64-bit ARM: a block of keys against four query heads at once, then each value once for four
/// heads. Halves and bytes are widened as they are read, so of bytes only their own rounding counts.
///
/// Scores and weights of a tile lie head after head, decode_tile keys each.
#pragma once

#include "moe/backend/cpu/lanes_neon.hpp"
#include "moe/backend/decode_kernels.hpp"

#if defined(__aarch64__) && !defined(MOE_SEPARATE_KERNELS)

namespace moe::arch::detail {

/// The elements that lie together, of four keys or columns: x[i] is the i-th of each.
template <class T>
inline void load_neon(const T* p, float32x4_t (&x)[1]) noexcept {
  x[0] = neon_lanes<0>::load(p);
}
inline void load_neon(const bf16* p, float32x4_t (&x)[2]) noexcept {
  const uint32x4_t v = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  x[0] = vreinterpretq_f32_u32(vshlq_n_u32(v, 16));
  x[1] = vreinterpretq_f32_u32(vandq_u32(v, vdupq_n_u32(0xffff0000u)));
}
inline void load_neon(const std::int8_t* p, float32x4_t (&x)[4]) noexcept {
  const int32x4_t v = vreinterpretq_s32_s8(vld1q_s8(p));
  x[0] = vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(v, 24), 24));
  x[1] = vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(v, 16), 24));
  x[2] = vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(v, 8), 24));
  x[3] = vcvtq_f32_s32(vshrq_n_s32(v, 24));
}

/// sum[g][v] += x[i], 16 floats for each i of N, times factor[g][i]; elements lie as load_neon reads them.
template <int N, class T>
MOE_INLINE void add_sixteen_neon(const T* p, const float* const (&factor)[4], float32x4_t (&sum)[4][4]) noexcept {
  MOE_UNROLL
  for (int v = 0; v < 4; ++v) {
    float32x4_t x[N];
    load_neon(p + v * 4 * N, x);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      MOE_UNROLL
      for (int i = 0; i < N; ++i) sum[g][v] = vfmaq_n_f32(sum[g][v], x[i], factor[g][i]);
    }
  }
}

/// The scores of a block of keys for four heads.
template <int Build, class T>
MOE_NO_INLINE void score_block_neon(const T* k, dim d, const float* const (&q)[4], float* s) noexcept {
  constexpr int n = moe::detail::keys_together<T>;
  float32x4_t sum[4][4];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) sum[g][0] = sum[g][1] = sum[g][2] = sum[g][3] = vdupq_n_f32(0);
  MOE_NO_UNROLL
  for (dim j = 0; j < d; j += n, k += n * kv_block) {
    const float* const factor[4] = {q[0] + j, q[1] + j, q[2] + j, q[3] + j};
    add_sixteen_neon<n>(k, factor, sum);
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int v = 0; v < 4; ++v) vst1q_f32(s + g * decode_tile + 4 * v, sum[g][v]);
  }
}

/// Softmax of a tile of one head, see soften: weights of keys outside of it, in its blocks, are 0. Scales: of keys, or null.
template <int Build>
float soften_neon(float* s, tile_span t, const float* k_scale, float& largest, float& sum) noexcept {
  const dim first = t.first_block(), last = t.last_block();
  for (dim r = t.lo; k_scale && r < t.hi; ++r) s[r] *= k_scale[r];
  for (dim r = first; r < t.lo; ++r) s[r] = -moe::detail::infinity;
  for (dim r = t.hi; r < last; ++r) s[r] = -moe::detail::infinity;
  float32x4_t most = vdupq_n_f32(largest), total = vdupq_n_f32(0);
  for (dim r = first; r < last; r += 4) most = vmaxnmq_f32(vld1q_f32(s + r), most);  // NaN gives way
  const float top = vmaxnmvq_f32(most), base = top > -moe::detail::infinity ? top : 0.f;
  for (dim r = first; r < last; r += 4) {
    const float32x4_t w = exp2_neon(vsubq_f32(vld1q_f32(s + r), vdupq_n_f32(base)));
    total = vaddq_f32(total, w);
    vst1q_f32(s + r, w);
  }
  const float fade = vgetq_lane_f32(exp2_neon(vdupq_n_f32(largest - base)), 0);
  largest = top;
  sum = sum * fade + vaddvq_f32(total);
  return fade;
}

/// 16 columns: o_g = fade_g o_g + sum over tokens lo .. hi of w(g, token) v; w is 0 for those that share their group.
template <int Build, class T>
MOE_NO_INLINE void weigh_rows_neon(const T* v, dim lo, dim hi, dim dv, const float* w, const float* fade,
                                   float* o) noexcept {
  constexpr int n = moe::detail::values_together<T>;
  float32x4_t sum[4][4];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 4; ++c) sum[g][c] = vmulq_n_f32(vld1q_f32(o + g * dv + 4 * c), fade[g]);
  }
  lo = lo / n * n;
  v += lo * dv;
  MOE_NO_UNROLL
  for (dim r = lo; r < hi; r += n, v += n * dv) {
    const float* const factor[4] = {w + r, w + decode_tile + r, w + 2 * decode_tile + r, w + 3 * decode_tile + r};
    add_sixteen_neon<n>(v, factor, sum);
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 4; ++c) vst1q_f32(o + g * dv + 4 * c, sum[g][c]);
  }
}

template <int Build, class T>
void attend_neon(const decode_unit& u) noexcept {
  start_heads(u);
  for_each_tile(u, [&](tile_span t) {
    const T *k = static_cast<const T*>(u.k) + t.base * u.d, *v = static_cast<const T*>(u.v) + t.base * u.dv;
    for (dim head = 0; head < u.heads; head += decode_heads) {
      float s[decode_heads * decode_tile], fade[decode_heads];
      const float* q[decode_heads];
      for (dim g = 0; g < decode_heads; ++g) q[g] = reinterpret_cast<const float*>(u.query(head + g));
      for (dim r = t.first_block(); r < t.hi; r += kv_block) score_block_neon<Build>(k + r * u.d, u.d, q, s + r);
      for (dim g = 0; g < decode_heads; ++g)
        fade[g] = soften_neon<Build>(s + g * decode_tile, t, u.k_scale ? u.k_scale + t.base : nullptr, u.largest[head + g],
                                     u.sum[head + g]);
      for (dim g = 0; u.v_scale && g < decode_heads; ++g)
        for (dim r = t.lo; r < t.hi; ++r) s[g * decode_tile + r] *= u.v_scale[t.base + r];
      for (dim j = 0; j < u.dv; j += 16)
        weigh_rows_neon<Build>(v + j * moe::detail::values_together<T>, t.lo, t.hi, u.dv, s, fade, u.o + head * u.dv + j);
    }
  });
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class T>
decode_kernels kernels_of(basic_neon<Build>, cache_of<T>) noexcept {
  return {detail::prepare_floats<Build>, detail::attend_neon<Build, T>};
}

}  // namespace moe::arch

#endif
