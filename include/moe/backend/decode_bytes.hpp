// SPDX-License-Identifier: Apache-2.0
/// Queries as whole numbers of 16 bits, and columns in the order in which pairs of rows of bytes are read: what the levels
/// that multiply bytes share.
#pragma once

#include "moe/backend/decode_kernels.hpp"

namespace moe::arch::detail {

/// A query of d numbers: its unit, then, from byte 64 on, words q with x ~ unit q. They are small enough for sums of d
/// products with bytes to fit 32 bits, and have 16 bits up to d = 512.
static_assert(decode_pad >= 32, "64 + 2 d bytes are at most 4 d");
inline float unit_of(const std::byte* q) noexcept {
  float unit;
  std::memcpy(&unit, q, sizeof unit);
  return unit;
}
inline const std::byte* words_of(const std::byte* q) noexcept { return q + 64; }

template <int Build>
void prepare_words(const float* q, dim d, std::byte* to) noexcept {
  float largest = 0, rest = 0;
  for (dim j = 0; j < d; ++j) {
    largest = std::fabs(q[j]) > largest ? std::fabs(q[j]) : largest;
    rest += q[j] - q[j];  // NaN where q is not finite
  }
  const float range = static_cast<float>(moe::detail::at_most(32767, 0x7fffffff / (127 * d)));
  const float per = rest == 0 && largest > 0x1p-100f ? range / largest : 0, unit = rest == 0 ? largest / range : NAN;
  std::memcpy(to, &unit, sizeof unit);
  for (dim j = 0; j < d; ++j) {
    const auto word = static_cast<std::int16_t>(per != 0 ? std::nearbyint(q[j] * per) : 0);
    std::memcpy(to + 64 + 2 * j, &word, sizeof word);
  }
}

/// Where column l of 32 belongs that was read as the lower or the upper half of two interleaved rows, `Lanes` of each.
template <int Lanes>
constexpr dim place_of_pairs(dim l) noexcept {
  const dim run = l / (2 * Lanes), at = l % Lanes;
  return run * 2 * Lanes + at / 4 * 8 + l % (2 * Lanes) / Lanes * 4 + at % 4;
}

}  // namespace moe::arch::detail
