// SPDX-License-Identifier: Apache-2.0
/// What a level offers for one query a sequence against a cache of keys and values: a table of plain functions per element
/// type of the cache, since the level is known only at run time. One unit is a run of keys of one key head against the query
/// heads that share it, so that every byte is read once. One thread; nothing is allocated.
#pragma once

#include <cmath>
#include <cstring>

#include "moe/attention/decode.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/core/dtype.hpp"

namespace moe {

/// Keys first .. first + rows of one key head, and the queries that read them. Queries are scaled by log2(e) / sqrt(d) or
/// what stands for it, so exponentials are to base 2.
struct decode_unit {
  const void *k = nullptr, *v = nullptr;  ///< rows of `d` and `dv` elements, the padding included
  dim rows = 0, d = 0, dv = 0;
  const float *k_scale = nullptr, *v_scale = nullptr;  ///< of each row, where elements are bytes
  const std::byte* q = nullptr;                        ///< prepared, 4 d bytes each
  const idx* pick = nullptr;                           ///< the queries that take part, or null: all
  dim heads = 0;                                       ///< how many
  /// Results, with memory for `heads` rounded up to a multiple of decode_heads: o = sum of 2^(s - largest) v, and the sum of
  /// these weights. Without keys: 0, -inf and 0.
  float *o = nullptr, *largest = nullptr, *sum = nullptr;

  /// Query i; beyond the last one, the last one again.
  const std::byte* query(dim i) const noexcept {
    const dim at = i < heads ? i : heads - 1;
    return q + (pick ? pick[at] : at) * 4 * d;
  }
};

/// One level's kernels for one element type.
struct decode_kernels {
  void (*prepare)(const float* q, dim d, std::byte* to) noexcept;  ///< d floats, the padding included, into 4 d bytes
  void (*attend)(const decode_unit& u) noexcept;
};

namespace arch {

/// Names an element type of a cache when kernels are looked up: kernels_of(arch, cache_of<T>{}).
template <class T>
struct cache_of {};

namespace detail {

using moe::detail::decode_heads;

/// Keys of a tile: their scores, and their values, stay in the nearest cache. Elements that rows are padded to.
inline constexpr dim decode_tile = 64, decode_pad = moe::detail::kv_cache_pad;

// The plain rung: bytes are widened, so only their own rounding counts.
template <int Build>
void prepare_floats(const float* q, dim d, std::byte* to) noexcept {
  std::memcpy(to, q, static_cast<std::size_t>(d) * sizeof(float));
}
/// The softmax of a step, in place: s[n] becomes weights, `largest` and `sum` move on. Returns what was summed before
/// shrinks by.
template <int Build>
float soften(float* s, dim n, float& largest, float& sum) noexcept {
  float most = largest, total = 0;
  for (dim r = 0; r < n; ++r) most = s[r] > most ? s[r] : most;
  const float base = most > -moe::detail::infinity ? most : 0.f;
  for (dim r = 0; r < n; ++r) total += s[r] = std::exp2(s[r] - base);
  const float fade = std::exp2(largest - base);
  largest = most;
  sum = sum * fade + total;
  return fade;
}
/// s[n] = the scores of n keys.
template <int Build, class T>
void score_plain(const T* k, dim d, const float* scale, dim n, const float* q, float* s) noexcept {
  for (dim r = 0; r < n; ++r, k += d) {
    float dots[8] = {};
    for (dim j = 0; j < d; j += 8) {
      MOE_UNROLL
      for (int l = 0; l < 8; ++l) dots[l] += q[j + l] * static_cast<float>(k[j + l]);
    }
    s[r] = ((dots[0] + dots[4]) + (dots[1] + dots[5])) + ((dots[2] + dots[6]) + (dots[3] + dots[7]));
    if (scale) s[r] *= scale[r];
  }
}
/// o = fade o + sum of w[r] v_r
template <int Build, class T>
void weigh_plain(const T* v, dim dv, const float* scale, dim n, const float* w, float fade, float* o) noexcept {
  for (dim j = 0; j < dv; j += 8) {
    float sum[8];
    MOE_UNROLL
    for (int l = 0; l < 8; ++l) sum[l] = fade * o[j + l];
    for (dim r = 0; r < n; ++r) {
      const float own = scale ? w[r] * scale[r] : w[r];
      MOE_UNROLL
      for (int l = 0; l < 8; ++l) sum[l] += own * static_cast<float>(v[r * dv + j + l]);
    }
    std::memcpy(o + j, sum, sizeof sum);
  }
}
/// Columns that were read in another order, 32 at a time: the l-th of them belongs at place(l).
template <class Place>
void restore_order(float* o, dim n, Place place) noexcept {
  for (dim j = 0; j < n; j += decode_pad) {
    float read[decode_pad];
    std::memcpy(read, o + j, sizeof read);
    for (dim l = 0; l < decode_pad; ++l) o[j + place(l)] = read[l];
  }
}
/// No keys so far.
inline void start_heads(const decode_unit& u) noexcept {
  const dim heads = moe::detail::round_up(u.heads, decode_heads);
  std::memset(u.o, 0, static_cast<std::size_t>(heads * u.dv) * sizeof(float));
  for (dim i = 0; i < heads; ++i) {
    u.largest[i] = -moe::detail::infinity;
    u.sum[i] = 0;
  }
}
template <int Build, class T>
void attend_plain(const decode_unit& u) noexcept {
  start_heads(u);
  for (dim first = 0; first < u.rows; first += decode_tile) {
    const dim n = moe::detail::at_most(u.rows - first, decode_tile);
    const T *k = static_cast<const T*>(u.k) + first * u.d, *v = static_cast<const T*>(u.v) + first * u.dv;
    for (dim i = 0; i < u.heads; ++i) {
      float s[decode_tile];
      score_plain<Build>(k, u.d, u.k_scale ? u.k_scale + first : nullptr, n, reinterpret_cast<const float*>(u.query(i)), s);
      const float fade = soften<Build>(s, n, u.largest[i], u.sum[i]);
      weigh_plain<Build>(v, u.dv, u.v_scale ? u.v_scale + first : nullptr, n, s, fade, u.o + i * u.dv);
    }
  }
}

}  // namespace detail

template <int Build, class T>
decode_kernels kernels_of(basic_scalar<Build>, cache_of<T>) noexcept {
  return {detail::prepare_floats<Build>, detail::attend_plain<Build, T>};
}

}  // namespace arch
}  // namespace moe
