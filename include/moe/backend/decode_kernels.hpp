// SPDX-License-Identifier: Apache-2.0
/// What a level offers for one query a sequence against a cache of keys and values: a table of plain functions per element
/// type of the cache, since the level is known only at run time. One unit is a run of keys of one key head against the query
/// heads that share it, so that every byte is read once. One thread; nothing is allocated.
#pragma once

#include <cmath>
#include <cstring>

#include "moe/backend/decode_layout.hpp"
#include "moe/backend/scalar.hpp"

namespace moe {

namespace detail {

/// Heads that are computed side by side.
inline constexpr dim decode_heads = 4;

}  // namespace detail

/// Keys first .. last of one key head, and the queries that read them. Queries are scaled by log2(e) / sqrt(d) or what
/// stands for it, so exponentials are to base 2.
struct decode_unit {
  const void *k = nullptr, *v = nullptr;  ///< of the head, see decode_layout; d and dv with their padding
  dim first = 0, last = 0, d = 0, dv = 0;
  const float *k_scale = nullptr, *v_scale = nullptr;  ///< of the head's tokens, where elements are bytes
  const void* next = nullptr;                          ///< the block of keys that this thread reads next, or null,
  dim next_keys = 0;                                   ///< and how many from there on
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

using moe::detail::decode_heads, moe::detail::kv_block, moe::detail::kv_pad;

/// Keys of a tile, whole blocks: their scores stay in the nearest cache, and their values in the second.
inline constexpr dim decode_tile = 128;

/// Keys lo .. hi of the tile that begins at key `base`.
struct tile_span {
  dim base, lo, hi;

  dim first_block() const noexcept { return lo / kv_block * kv_block; }
  dim last_block() const noexcept { return moe::detail::round_up(hi, kv_block); }
  dim blocks() const noexcept { return (last_block() - first_block()) / kv_block; }
};
/// f(span) for the tiles of a unit.
template <class F>
void for_each_tile(const decode_unit& u, F f) noexcept {
  for (dim base = u.first / decode_tile * decode_tile; base < u.last; base += decode_tile)
    f(tile_span{base, u.first > base ? u.first - base : 0, moe::detail::at_most(u.last - base, decode_tile)});
}

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
/// s[16] = the scores of a block of keys.
template <int Build, class T>
void score_plain(const T* k, dim d, const float* q, float* s) noexcept {
  constexpr dim n = moe::detail::keys_together<T>;
  float dots[kv_block] = {};
  for (dim j = 0; j < d; j += n, k += n * kv_block)
    for (dim l = 0; l < kv_block; ++l)
      for (dim i = 0; i < n; ++i) dots[l] += q[j + i] * static_cast<float>(k[l * n + i]);
  std::memcpy(s, dots, sizeof dots);
}
/// o = fade o + sum of w[r] v_r for tokens lo .. hi; w is 0 for those that share their values' group.
template <int Build, class T>
void weigh_plain(const T* v, dim dv, dim lo, dim hi, const float* w, float fade, float* o) noexcept {
  constexpr dim n = moe::detail::values_together<T>;
  for (dim j = 0; j < dv; j += 8) {
    float sum[8];
    MOE_UNROLL
    for (int l = 0; l < 8; ++l) sum[l] = fade * o[j + l];
    for (dim r = lo / n * n; r < hi; r += n)
      for (dim i = 0; i < n; ++i) {
        MOE_UNROLL
        for (int l = 0; l < 8; ++l) sum[l] += w[r + i] * static_cast<float>(v[r * dv + (j + l) * n + i]);
      }
    std::memcpy(o + j, sum, sizeof sum);
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
  for_each_tile(u, [&](tile_span t) {
    const T *k = static_cast<const T*>(u.k) + t.base * u.d, *v = static_cast<const T*>(u.v) + t.base * u.dv;
    for (dim i = 0; i < u.heads; ++i) {
      float s[decode_tile], w[decode_tile] = {};
      for (dim r = t.first_block(); r < t.hi; r += kv_block)
        score_plain<Build>(k + r * u.d, u.d, reinterpret_cast<const float*>(u.query(i)), s + r);
      for (dim r = t.lo; u.k_scale && r < t.hi; ++r) s[r] *= u.k_scale[t.base + r];
      const float fade = soften<Build>(s + t.lo, t.hi - t.lo, u.largest[i], u.sum[i]);
      for (dim r = t.lo; r < t.hi; ++r) w[r] = u.v_scale ? s[r] * u.v_scale[t.base + r] : s[r];
      weigh_plain<Build>(v, u.dv, t.lo, t.hi, w, fade, u.o + i * u.dv);
    }
  });
}

}  // namespace detail

template <int Build, class T>
decode_kernels kernels_of(basic_scalar<Build>, cache_of<T>) noexcept {
  return {detail::prepare_floats<Build>, detail::attend_plain<Build, T>};
}

}  // namespace arch
}  // namespace moe
