// SPDX-License-Identifier: Apache-2.0
/// Queries as whole numbers of 16 bits, cut in two bytes: what the levels that multiply bytes read.
#pragma once

#include "moe/backend/decode_kernels.hpp"

namespace moe::arch::detail {

/// A query of d numbers x ~ unit q with q = 256 high + low, both signed bytes: unit and `start`, -128 times the sum of q, in
/// its first 64 bytes, then all of `high`, then all of `low`. They are small enough for sums of d products with bytes to fit
/// 32 bits, and have 16 bits up to d = 512.
struct byte_query {
  float unit;
  std::int32_t start;
  const std::byte *high, *low;

  byte_query(const std::byte* q, dim d) noexcept : high(q + 64), low(q + 64 + d) {
    std::memcpy(&unit, q, sizeof unit);
    std::memcpy(&start, q + sizeof unit, sizeof start);
  }
};
static_assert(kv_pad >= 32, "64 + 2 d bytes are at most 4 d");

template <int Build>
void prepare_bytes(const float* q, dim d, std::byte* to) noexcept {
  float most[8] = {}, rests[8] = {};
  for (dim j = 0; j < d; j += 8) {
    MOE_UNROLL
    for (int l = 0; l < 8; ++l) {
      const float x = std::fabs(q[j + l]);
      most[l] = x > most[l] ? x : most[l];
      rests[l] += q[j + l] - q[j + l];  // NaN where q is not finite
    }
  }
  float largest = 0, rest = 0;
  for (int l = 0; l < 8; ++l) {
    largest = most[l] > largest ? most[l] : largest;
    rest += rests[l];
  }
  // 32639 = 127 * 256 + 127, the largest that two signed bytes hold
  const float range = static_cast<float>(moe::detail::at_most(32639, 0x7fffffff / (127 * d)));
  const float per = rest == 0 && largest > 0x1p-100f ? range / largest : 0, unit = rest == 0 ? largest / range : NAN;
  std::uint32_t start = 0;  // whole numbers wrap around, and the last sum fits
  for (dim j = 0; j < d; j += kv_pad) {
    std::int8_t high[kv_pad] = {}, low[kv_pad] = {};
    for (dim l = 0; per != 0 && l < kv_pad; ++l) {
      const float scaled = q[j + l] * per;
      const auto whole = static_cast<std::int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
      high[l] = static_cast<std::int8_t>((whole + 128) >> 8);
      low[l] = static_cast<std::int8_t>(whole - 256 * high[l]);
      start -= 128 * static_cast<std::uint32_t>(whole);
    }
    std::memcpy(to + 64 + j, high, sizeof high);
    std::memcpy(to + 64 + d + j, low, sizeof low);
  }
  std::memcpy(to, &unit, sizeof unit);
  std::memcpy(to + sizeof unit, &start, sizeof start);
}

}  // namespace moe::arch::detail
