// SPDX-License-Identifier: Apache-2.0
/// The elementwise part of attention on the vectors of 64-bit ARM. As attention_loops.
#pragma once

#include "moe/backend/cpu/lanes_neon.hpp"

#if defined(__aarch64__) && !defined(MOE_SEPARATE_KERNELS)

namespace moe::arch::detail {

template <int Build>
struct attention_neon : attention_loops<blocks_neon<Build>> {
  using lanes = neon_lanes<Build>;
  static constexpr dim width = lanes::width;

  static void widen(const f16* from, float* to, dim n) noexcept {
    dim j = 0;
    for (; j + width <= n; j += width) lanes::store(to + j, lanes::load(from + j));
    if (j < n) lanes::store(to + j, lanes::load(from + j, n - j), n - j);
  }
  static void scale(float* x, float w, dim n) noexcept {
    dim j = 0;
    for (; j + width <= n; j += width) lanes::store(x + j, vmulq_n_f32(lanes::load(x + j), w));
    if (j < n) lanes::store(x + j, vmulq_n_f32(lanes::load(x + j, n - j), w), n - j);
  }
  static float softmax(float* s, dim lo, dim hi, float& largest, float& sum) noexcept {
    const dim first = lo / width * width;
    float32x4_t most = lanes::all(largest), total = lanes::all(0);
    for (dim j = first; j < hi; j += width)  // NaN stays
      most = vmaxq_f32(most, vbslq_f32(between(lo - j, hi - j), lanes::load(s + j), lanes::all(-moe::detail::infinity)));
    const float found = vmaxvq_f32(most), base = found == -moe::detail::infinity ? 0.f : found;
    for (dim j = first; j < hi; j += width) {
      const float32x4_t p = exp2_neon(vsubq_f32(lanes::load(s + j), lanes::all(base)));
      lanes::store(s + j, p);
      total = vaddq_f32(total, only(between(lo - j, hi - j), p));
    }
    const float fade = vgetq_lane_f32(exp2_neon(lanes::all(largest - base)), 0);
    largest = found;
    sum = sum * fade + vaddvq_f32(total);
    return fade;
  }
  static void slopes(float* s, float* dp, dim lo, dim hi, dim n, float lse, float delta) noexcept {
    for (dim j = 0; j < n; j += width) {
      const uint32x4_t seen = between(lo - j, hi - j);
      const float32x4_t p = only(seen, exp2_neon(vsubq_f32(lanes::load(s + j), lanes::all(lse))));
      const float32x4_t slope = vmulq_f32(p, vsubq_f32(lanes::load(dp + j), lanes::all(delta)));
      lanes::store(s + j, p);
      lanes::store(dp + j, only(seen, slope));
    }
  }

 private:
  /// All bits of lanes lo .. hi.
  static uint32x4_t between(dim lo, dim hi) noexcept {
    constexpr std::int32_t numbers[] = {0, 1, 2, 3};
    const auto bound = [](dim n) { return vdupq_n_s32(static_cast<std::int32_t>(n < 0 ? 0 : n < width ? n : width)); };
    const int32x4_t number = vld1q_s32(numbers);
    return vandq_u32(vcgeq_s32(number, bound(lo)), vcltq_s32(number, bound(hi)));
  }
  static float32x4_t only(uint32x4_t lanes, float32x4_t v) noexcept {
    return vreinterpretq_f32_u32(vandq_u32(lanes, vreinterpretq_u32_f32(v)));
  }
};

}  // namespace moe::arch::detail

#endif
