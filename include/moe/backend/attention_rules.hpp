// SPDX-License-Identifier: Apache-2.0
/// The elementwise part of attention, base 2, in plain loops: what a level without rules of its own uses.
#pragma once

#include <bit>
#include <cmath>

#include "moe/backend/host_blocks.hpp"
#include "moe/core/dtype.hpp"

namespace moe::arch::detail {

/// 2^x for |x| <= 1/2 is 1 + x (c1 + x (c2 + ...)), off by at most 9.2e-8 of the value.
inline constexpr float exp2_terms[] = {0.6931469775690255f, 0.24022242024194906f, 0.0555073375291162f,
                                       0.009671516671824698f, 0.001326473871318884f};
/// Below this 2^x is 0 in float.
inline constexpr float exp2_least = -160.f;

/// Rows that are ranked at once.
inline constexpr dim rank_rows = 16;

/// Rules over the blocks `K` of a level.
template <class K>
struct attention_loops {
  using blocks = K;

  static void widen(const f16* from, float* to, dim n) noexcept {
    for (dim j = 0; j < n; ++j) to[j] = static_cast<float>(from[j]);
  }
  static void scale(float* x, float w, dim n) noexcept {
    for (dim j = 0; j < n; ++j) x[j] *= w;
  }
  /// best[0 .. room)[l], descending, become the largest of themselves and s[l][0 .. n[l]) for each l of rank_rows, and
  /// `which` their numbers: s[l][j] is number first + j. Of equal ones the earlier stays.
  static void rank(const float* const* s, const idx* n, idx first, float* best, idx* which, dim room) noexcept {
    for (dim l = 0; l < rank_rows; ++l)
      for (idx j = 0; j < n[l]; ++j)
        if (s[l][j] > best[(room - 1) * rank_rows + l]) insert(s[l][j], first + j, best + l, which + l, room);
  }
  static void insert(float value, idx number, float* best, idx* which, dim room) noexcept {
    dim at = (room - 1) * rank_rows;
    for (; at > 0 && value > best[at - rank_rows]; at -= rank_rows) {
      best[at] = best[at - rank_rows];
      which[at] = which[at - rank_rows];
    }
    best[at] = value;
    which[at] = number;
  }
  /// s[lo .. hi) becomes 2^(s - largest), with `largest` raised to the largest of them and their sum added to `sum`. Returns
  /// by what the old sum, and all that was summed with it, is multiplied.
  static float softmax(float* s, dim lo, dim hi, float& largest, float& sum) noexcept {
    float most = largest, total = 0;
    for (dim j = lo; j < hi; ++j) most = s[j] > most || s[j] != s[j] ? s[j] : most;
    if (most == -moe::detail::infinity) most = 0;  // every weight is 0
    for (dim j = lo; j < hi; ++j) total += s[j] = std::exp2(s[j] - most);
    const float fade = largest == -moe::detail::infinity ? 0.f : std::exp2(largest - most);
    if (total > 0 || total != total) largest = most;
    sum = sum * fade + total;
    return fade;
  }
  /// s[lo .. hi) becomes p = 2^(s - lse) and dp becomes p (dp - delta); both are 0 outside, up to n.
  static void slopes(float* s, float* dp, dim lo, dim hi, dim n, float lse, float delta) noexcept {
    for (dim j = 0; j < n; ++j) {
      const bool seen = j >= lo && j < hi;
      s[j] = seen ? std::exp2(s[j] - lse) : 0.f;
      dp[j] = seen ? s[j] * (dp[j] - delta) : 0.f;
    }
  }
};

}  // namespace moe::arch::detail
