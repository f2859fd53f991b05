// SPDX-License-Identifier: Apache-2.0
/// The vectors of 64-bit ARM, four floats each: as the blocks of products use them, and 2^x. Nothing beyond the base
/// instruction set is used.
#pragma once

#include "moe/backend/attention_rules.hpp"
#include "moe/backend/cpu/ladder.hpp"
#include "moe/backend/host_blocks.hpp"

#if defined(__aarch64__) && !defined(MOE_SEPARATE_KERNELS)

#include <arm_neon.h>

#include <concepts>

namespace moe::arch::detail {

/// Four halves as floats.
template <class T>
inline float32x4_t widen_neon(uint16x4_t halves) noexcept {
  if constexpr (std::same_as<T, bf16>)
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(halves), 16));
  else
    return vcvt_f32_f16(vreinterpret_f16_u16(halves));
}

/// As plain_lanes, with sums of a product and an addend that are rounded once whatever the compiler does.
template <int Build>
struct neon_lanes {
  using vector = float32x4_t;
  static constexpr int width = 4;
  static constexpr bool many_registers = true;

  static vector all(float v) noexcept { return vdupq_n_f32(v); }
  static vector load(const float* p) noexcept { return vld1q_f32(p); }
  static vector load(const bf16* p) noexcept { return widen_neon<bf16>(vld1_u16(&p->bits)); }
  static vector load(const f16* p) noexcept { return widen_neon<f16>(vld1_u16(&p->bits)); }
  /// The first n < width elements at p, then zeros.
  template <class T>
  static vector load(const T* p, dim n) noexcept {
    T lane[width] = {};
    for (dim l = 0; l < n; ++l) lane[l] = p[l];
    return load(lane);
  }
  /// The last n < width elements of the row of k at p, and zeros.
  template <class T>
  static vector load_last(const T* p, dim k, dim n) noexcept {
    return load(p + k - n, n);
  }
  static void store(float* p, vector v) noexcept { vst1q_f32(p, v); }
  static void store(float* p, vector v, dim n) noexcept {
    float lane[width];
    store(lane, v);
    for (dim l = 0; l < n; ++l) p[l] = lane[l];
  }
  static vector multiply_add(vector x, vector y, vector z) noexcept { return vfmaq_f32(z, x, y); }
  /// s[0 .. 4] = the sums of the lanes of a, b, c and d.
  static void sum_four(vector a, vector b, vector c, vector d, float* s) noexcept {
    store(s, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
};

/// As lane_blocks, with rows of bf16 widened and squares transposed in registers.
template <int Build>
struct blocks_neon : lane_blocks<neon_lanes<Build>> {
  using lanes = neon_lanes<Build>;
  using lane_blocks<lanes>::columns, lane_blocks<lanes>::widen;
  static constexpr int width = lanes::width;

  static void widen(const bf16* from, float* to, dim n) noexcept {
    dim j = 0;
    for (; j + width <= n; j += width) lanes::store(to + j, lanes::load(from + j));
    if (j < n) lanes::store(to + j, lanes::load(from + j, n - j), n - j);
  }
  template <dim Step = columns>
  static void transpose(const float* const* row, dim first, float* to) noexcept {
    const float32x4_t a = lanes::load(row[0] + first), b = lanes::load(row[1] + first), c = lanes::load(row[2] + first),
                      d = lanes::load(row[3] + first);
    const float64x2_t even = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b)),
                      even2 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), odd2 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    lanes::store(to, vreinterpretq_f32_f64(vtrn1q_f64(even, even2)));
    lanes::store(to + Step, vreinterpretq_f32_f64(vtrn1q_f64(odd, odd2)));
    lanes::store(to + 2 * Step, vreinterpretq_f32_f64(vtrn2q_f64(even, even2)));
    lanes::store(to + 3 * Step, vreinterpretq_f32_f64(vtrn2q_f64(odd, odd2)));
  }
};

/// 2^x by exp2_terms: 0 from -127 down; NaN stays.
inline float32x4_t exp2_neon(float32x4_t x) noexcept {
  x = vmaxq_f32(vdupq_n_f32(-127), x);  // whose power has no exponent bits: 0
  const int32x4_t whole = vcvtnq_s32_f32(x);
  const float32x4_t part = vsubq_f32(x, vcvtq_f32_s32(whole));
  float32x4_t p = vdupq_n_f32(exp2_terms[4]);
  p = vfmaq_f32(vdupq_n_f32(exp2_terms[3]), p, part);
  p = vfmaq_f32(vdupq_n_f32(exp2_terms[2]), p, part);
  p = vfmaq_f32(vdupq_n_f32(exp2_terms[1]), p, part);
  p = vfmaq_f32(vdupq_n_f32(exp2_terms[0]), p, part);
  p = vfmaq_f32(vdupq_n_f32(1.f), p, part);
  return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(whole, vdupq_n_s32(127)), 23)));
}

}  // namespace moe::arch::detail

#endif
