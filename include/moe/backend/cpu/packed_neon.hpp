// SPDX-License-Identifier: Apache-2.0
/// Products with packed weights on the 128-bit vectors of 64-bit ARM: a block of up to 4 rows against half a panel, or of 1
/// or 2 rows of floats against a whole one, which is then read in one go. Nothing beyond the base instruction set is used.
#pragma once

#include "moe/backend/cpu/lanes_neon.hpp"
#include "moe/backend/packed_kernels.hpp"

#if defined(__aarch64__) && !defined(MOE_SEPARATE_KERNELS)

namespace moe::arch::detail {

inline constexpr int rows_neon = 4;

/// Four weights, the first or second of each slot, as floats.
template <class T>
inline float32x4_t four_weights(const std::byte* q, int part) noexcept {
  if constexpr (std::same_as<T, float>) {
    return vld1q_f32(reinterpret_cast<const float*>(q));
  } else {
    const uint32x4_t slots = vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const std::uint8_t*>(q)));
    if constexpr (std::same_as<T, bf16>)
      return vreinterpretq_f32_u32(part ? vandq_u32(slots, vdupq_n_u32(0xffff0000u)) : vshlq_n_u32(slots, 16));
    else
      return widen_neon<T>(part ? vshrn_n_u32(slots, 16) : vmovn_u32(slots));
  }
}

/// M rows, floats times floats or halves, against the V vectors of 4 weight rows at q.
template <int Build, class T, int M, int V>
MOE_NO_INLINE void multiply_block_neon(const std::byte* a, dim a_step, dim lines, const std::byte* q, float* c,
                                       dim ld) noexcept {
  constexpr int slot = 4 / sizeof(T), per_line = 16 / slot;
  float32x4_t sum[M][V];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) sum[m][v] = vdupq_n_f32(0);
  }
  for (dim l = 0; l < lines; ++l, a += a_step) {
    const float* x = reinterpret_cast<const float*>(a);
    MOE_NO_UNROLL
    for (int i = 0; i < 16; i += 4, q += 4 / slot * line_bytes) {
      float32x4_t b[M];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) b[m] = vld1q_f32(x + 16 * m + i);
      MOE_UNROLL
      for (int n = 0; n < 4; ++n) {
        float32x4_t w[V];
        MOE_UNROLL
        for (int v = 0; v < V; ++v)
          w[v] = four_weights<T>(q + n / slot * line_bytes + v / 4 * tile_bytes + v % 4 * 16, n % slot);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          MOE_UNROLL
          for (int v = 0; v < V; ++v) sum[m][v] = vfmaq_n_f32(sum[m][v], w[v], b[m][n]);
        }
      }
    }
    if ((l + 1) * per_line % 16 == 0) q += tile_bytes;
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) vst1q_f32(c + m * ld + 4 * v, sum[m][v]);
  }
}

template <int Build, class T>
void multiply_neon(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim b = 0; b < a.blocks(); ++b)
      with_constant<rows_neon>(a.height_of(b), [&](auto m) {
        constexpr int vectors = m <= 2 ? 8 : 4;
        for (dim v = 0; v < 8; v += vectors)
          multiply_block_neon<Build, T, m, vectors>(a.block(b), m * line_bytes, a.lines,
                                                    p.weights + j * p.panel_bytes + v / 4 * tile_bytes,
                                                    p.c.row(b * a.height) + j * panel_rows + 4 * v, p.c.ld);
      });
}

/// M rows, bytes times bytes, against the V vectors of 4 weight rows at q. Two products of -128 .. 127 by -127 .. 127 fit a
/// word.
template <int Build, int M, int V>
MOE_NO_INLINE void multiply_block_bytes_neon(const std::byte* a, dim a_step, dim lines, const std::byte* q,
                                             const float* factors, dim factor_count, const float* scale, float* c,
                                             dim ld) noexcept {
  const uint8x16_t middle = vdupq_n_u8(0x80);
  int32x4_t low[M][V], high[M][V];  // of the vectors' lower and upper two weight rows, two sums for each
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) low[m][v] = high[m][v] = vdupq_n_s32(0);
  }
  for (dim l = 0; l < lines; ++l, a += a_step, q += tile_bytes) {
    MOE_NO_UNROLL
    for (int i = 0; i < 16; i += 2, q += 2 * line_bytes) {
      int8x16_t w[V], w2[V];
      MOE_UNROLL
      for (int v = 0; v < V; ++v) {
        const std::uint8_t* u = reinterpret_cast<const std::uint8_t*>(q + 16 * v);
        w[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(u), middle));
        w2[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(u + line_bytes), middle));
      }
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        const std::int32_t* fours = reinterpret_cast<const std::int32_t*>(a + 64 * m + 4 * i);
        const int8x16_t b = vreinterpretq_s8_s32(vld1q_dup_s32(fours)), b2 = vreinterpretq_s8_s32(vld1q_dup_s32(fours + 1));
        MOE_UNROLL
        for (int v = 0; v < V; ++v) {
          const int16x8_t words = vmull_s8(vget_low_s8(w[v]), vget_low_s8(b));
          low[m][v] = vpadalq_s16(low[m][v], vmlal_s8(words, vget_low_s8(w2[v]), vget_low_s8(b2)));
          high[m][v] = vpadalq_s16(high[m][v], vmlal_high_s8(vmull_high_s8(w[v], b), w2[v], b2));
        }
      }
    }
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v)
      vst1q_f32(c + m * ld + 4 * v, vmulq_f32(vmulq_n_f32(vld1q_f32(scale + 4 * v), factors[m * factor_count]),
                                              vcvtq_f32_s32(vpaddq_s32(low[m][v], high[m][v]))));
  }
}

template <int Build>
void multiply_bytes_neon(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim b = 0; b < a.blocks(); ++b)
      with_constant<rows_neon>(a.height_of(b), [&](auto m) {
        constexpr int vectors = m <= 2 ? 4 : 2;
        for (dim v = 0; v < 8; v += vectors)
          multiply_block_bytes_neon<Build, m, vectors>(
              a.block(b), m * line_bytes, a.lines, p.weights + j * p.panel_bytes + v / 4 * tile_bytes + v % 4 * 16,
              a.factor(b * a.height), a.factor_count, p.scale + j * panel_rows + 4 * v,
              p.c.row(b * a.height) + j * panel_rows + 4 * v, p.c.ld);
      });
}

/// Adds to total[v] the four weight rows' sums of a group, less 8 for every weight, times the scales at s.
template <class T>
inline void add_group_neon(float32x4_t (&total)[4], const int32x4_t (&sum)[4], float q_sum, const std::byte* s) noexcept {
  const float32x4_t shift = vdupq_n_f32(8 * q_sum);
  MOE_UNROLL
  for (int v = 0; v < 4; ++v) {
    const uint16x4_t halves = vld1_u16(reinterpret_cast<const std::uint16_t*>(s) + 4 * v);
    total[v] = vfmaq_f32(total[v], widen_neon<typename T::scale>(halves), vsubq_f32(vcvtq_f32_s32(sum[v]), shift));
  }
}

/// Products of 16 weight rows of four bits at w and of 32 k of a row each, at a and 32 bytes further on: lower[v] sums those
/// with the lower halves of the bytes, upper[v] those with the upper. Sixteen products of 15 by 127 fit a word.
inline void sum_fours_neon(const std::byte* a, const std::byte* w, int32x4_t (&lower)[4], int32x4_t (&upper)[4]) noexcept {
  const uint8x16_t mask = vdupq_n_u8(15);
  int16x8_t words[4][4];  // of a vector: lower halves of its lower and upper two weight rows, then upper halves
  MOE_UNROLL
  for (int v = 0; v < 4; ++v) words[v][0] = words[v][1] = words[v][2] = words[v][3] = vdupq_n_s16(0);
  MOE_NO_UNROLL
  for (int i = 0; i < 8; ++i, a += 4, w += line_bytes) {
    const int8x16_t b = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const std::int32_t*>(a))),
                    b2 = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const std::int32_t*>(a + 32)));
    MOE_UNROLL
    for (int v = 0; v < 4; ++v) {
      const uint8x16_t u = vld1q_u8(reinterpret_cast<const std::uint8_t*>(w + 16 * v));
      const int8x16_t q = vreinterpretq_s8_u8(vandq_u8(u, mask)), q2 = vreinterpretq_s8_u8(vshrq_n_u8(u, 4));
      words[v][0] = vmlal_s8(words[v][0], vget_low_s8(q), vget_low_s8(b));
      words[v][1] = vmlal_high_s8(words[v][1], q, b);
      words[v][2] = vmlal_s8(words[v][2], vget_low_s8(q2), vget_low_s8(b2));
      words[v][3] = vmlal_high_s8(words[v][3], q2, b2);
    }
  }
  MOE_UNROLL
  for (int v = 0; v < 4; ++v) {
    lower[v] = vpaddlq_s16(vpaddq_s16(words[v][0], words[v][1]));
    upper[v] = vpaddlq_s16(vpaddq_s16(words[v][2], words[v][3]));
  }
}

/// One row against 16 weight rows of four bits, half a panel.
template <int Build, class T>
MOE_NO_INLINE void multiply_row_groups_neon(const std::byte* a, dim a_step, dim lines, const std::byte* q, dim half,
                                            const float* factors, float* c) noexcept {
  using rule = packing<T>;
  const float* sums = factors + 2;
  float32x4_t total[4] = {};
  for (dim l = 0; l < lines; l += 2, q += rule::step_bytes, sums += 4) {
    const std::byte* scales = q + 2048 + half * 32;
    int32x4_t block[4] = {};
    for (dim h = 0; h < 2; ++h, a += a_step) {
      int32x4_t lower[4], upper[4];
      sum_fours_neon(a, q + (2 * h + half) * 512, lower, upper);
      if constexpr (T::group == 32) {
        add_group_neon<T>(total, lower, sums[2 * h], scales + 2 * h * 64);
        add_group_neon<T>(total, upper, sums[2 * h + 1], scales + (2 * h + 1) * 64);
      } else {
        MOE_UNROLL
        for (int v = 0; v < 4; ++v) block[v] = vaddq_s32(block[v], vaddq_s32(lower[v], upper[v]));
      }
    }
    if constexpr (T::group == 128) add_group_neon<T>(total, block, sums[0] + sums[1] + sums[2] + sums[3], scales);
  }
  MOE_UNROLL
  for (int v = 0; v < 4; ++v) vst1q_f32(c + 4 * v, vmulq_n_f32(total[v], factors[0]));
}

template <int Build, class T>
void multiply_groups_neon(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim r = 0; r < a.rows; ++r)
      for (dim half = 0; half < 2; ++half)
        multiply_row_groups_neon<Build, T>(a.line(r, 0), a.stride(r), a.lines, p.weights + j * p.panel_bytes, half,
                                           a.factor(r), p.c.row(r) + j * panel_rows + half * tile_rows);
}

/// M rows against half a panel of two bits a weight. A word takes 128 products of 2 by 127, eight steps.
template <int Build, int M>
MOE_NO_INLINE void multiply_block_ternary_neon(const std::byte* a, dim a_step, dim lines, const std::byte* q,
                                               const float* factors, dim factor_count, const float* scale, float* c,
                                               dim ld) noexcept {
  using rule = packing<ternary>;
  constexpr dim steps = 8;
  const uint8x16_t mask = vdupq_n_u8(3);
  for (dim v = 0; v < 4; ++v, q += 16, scale += 4, c += 4) {
    const std::byte *x = a, *w = q;
    int32x4_t low[M], high[M];  // of the lower and upper two weight rows, two sums for each
    MOE_UNROLL
    for (int m = 0; m < M; ++m) low[m] = high[m] = vdupq_n_s32(0);
    for (dim l = 0; l < lines; l += steps) {
      int16x8_t words[M][2];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) words[m][0] = words[m][1] = vdupq_n_s16(0);
      for (dim end = moe::detail::at_most(lines - l, steps), s = 0; s < end; ++s, x += a_step, w += rule::step_bytes) {
        MOE_NO_UNROLL
        for (int i = 0; i < 4; ++i) {
          const uint8x16_t u = vld1q_u8(reinterpret_cast<const std::uint8_t*>(w + i * line_bytes));
          const int8x16_t codes[4] = {
              vreinterpretq_s8_u8(vandq_u8(u, mask)), vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(u, 2), mask)),
              vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(u, 4), mask)), vreinterpretq_s8_u8(vshrq_n_u8(u, 6))};
          MOE_UNROLL
          for (int m = 0; m < M; ++m) {
            MOE_UNROLL
            for (int n = 0; n < 4; ++n) {
              const int8x16_t b =
                  vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const std::int32_t*>(x + 64 * m + 16 * n + 4 * i)));
              words[m][0] = vmlal_s8(words[m][0], vget_low_s8(codes[n]), vget_low_s8(b));
              words[m][1] = vmlal_high_s8(words[m][1], codes[n], b);
            }
          }
        }
      }
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        low[m] = vpadalq_s16(low[m], words[m][0]);
        high[m] = vpadalq_s16(high[m], words[m][1]);
      }
    }
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      const float* f = factors + m * factor_count;
      const float32x4_t sum = vsubq_f32(vcvtq_f32_s32(vpaddq_s32(low[m], high[m])), vdupq_n_f32(f[1]));
      vst1q_f32(c + m * ld, vmulq_f32(vmulq_n_f32(vld1q_f32(scale), f[0]), sum));
    }
  }
}
template <int Build>
void multiply_ternary_neon(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim b = 0; b < a.blocks(); ++b)
      with_constant<rows_neon>(a.height_of(b), [&](auto m) {
        for (dim half = 0; half < 2; ++half)
          multiply_block_ternary_neon<Build, m>(
              a.block(b), m * line_bytes, a.lines, p.weights + j * p.panel_bytes + half * packing<ternary>::half_bytes,
              a.factor(b * a.height), a.factor_count, p.scale + j * panel_rows + half * tile_rows,
              p.c.row(b * a.height) + j * panel_rows + half * tile_rows, p.c.ld);
      });
}

/// The 32 numbers from x[i] on: where they are, or those before k and zeros in `spare`.
inline const float* next_32(const float* x, dim i, dim k, float (&spare)[32]) noexcept {
  if (i + 32 <= k) return x + i;
  for (dim n = 0; n < 32; ++n) spare[n] = i + n < k ? x[i + n] : 0.f;
  return spare;
}

/// The same as prepare_i8, 32 numbers at a time. Where one is not finite all are multiplied by 0, and NaN becomes 0.
template <int Build, class T = std::int8_t>
void prepare_i8_neon(const float* x, dim k, std::byte* to, float* factors, bool sums_of_32) noexcept {
  float spare[32];
  uint32x4_t largest = vdupq_n_u32(0);  // as integers magnitudes keep their order, and NaN is above all
  for (dim i = 0; i < k; i += 32) {
    const float* from = next_32(x, i, k, spare);
    MOE_UNROLL
    for (int v = 0; v < 8; ++v) largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(from + 4 * v))));
  }
  const float most = __builtin_bit_cast(float, vmaxvq_u32(largest)) + packing<T>::margin;
  const bool finite = most - most == 0;
  const float per = moe::detail::to_bytes(most);
  std::int32_t total = 0;
  for (dim i = 0; i < moe::detail::round_up(k, sums_of_32 ? 128 : 64); i += 32) {
    const float* from = next_32(x, i, k, spare);
    int16x8_t q[4];
    MOE_UNROLL
    for (int v = 0; v < 4; ++v)
      q[v] = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from + 8 * v), per))),
                          vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from + 8 * v + 4), per))));
    std::int8_t* out = reinterpret_cast<std::int8_t*>(to + i);
    vst1q_s8(out, vcombine_s8(vqmovn_s16(q[0]), vqmovn_s16(q[1])));
    vst1q_s8(out + 16, vcombine_s8(vqmovn_s16(q[2]), vqmovn_s16(q[3])));
    const std::int32_t part = vaddlvq_s16(vaddq_s16(vaddq_s16(q[0], q[1]), vaddq_s16(q[2], q[3])));
    total += part;
    if (sums_of_32) factors[2 + i / 32] = static_cast<float>(part);
  }
  factors[0] = finite ? most / 127 : NAN;
  factors[1] = static_cast<float>(total);
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class T>
  requires(!packing<T>::scaled)
packed_kernels kernels_of(basic_neon<Build>, weights_of<T>) noexcept {
  return {operand::f32,
          detail::rows_neon,
          16 * detail::rows_neon,
          false,
          0,
          detail::prepare_f32<Build>,
          detail::multiply_neon<Build, T>};
}
template <int Build>
packed_kernels kernels_of(basic_neon<Build>, weights_of<std::int8_t>) noexcept {
  return {operand::i8,
          detail::rows_neon,
          16 * detail::rows_neon,
          false,
          0,
          detail::prepare_i8_neon<Build>,
          detail::multiply_bytes_neon<Build>};
}
template <int Build>
packed_kernels kernels_of(basic_neon<Build>, weights_of<ternary>) noexcept {
  return {operand::i8,
          detail::rows_neon,
          16 * detail::rows_neon,
          false,
          0,
          detail::prepare_i8_neon<Build, ternary>,
          detail::multiply_ternary_neon<Build>};
}
template <int Build, int Group, class Scale>
packed_kernels kernels_of(basic_neon<Build>, weights_of<int4_groups<Group, Scale>>) noexcept {
  return {operand::i8,
          detail::rows_neon,
          16 * detail::rows_neon,
          true,
          0,
          detail::prepare_i8_neon<Build>,
          detail::multiply_groups_neon<Build, int4_groups<Group, Scale>>};
}

}  // namespace moe::arch

#endif
