// SPDX-License-Identifier: Apache-2.0
/// The n best of many keys without sorting them: where an expert chooses among tokens, or has no room for all.
#pragma once

#include "moe/router/score.hpp"

namespace moe::detail {

/// Orders as the key does; 0 for a key that is not eligible.
MOE_HD inline std::uint32_t ordered(float key) noexcept {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, key + 0.f);  // -0 becomes 0
  if (!eligible(key)) return 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Where a ranking is cut: keys above the value stay, of those equal to it the ones up to index `last`.
struct cut {
  std::uint32_t value = 0;
  idx last = -1;

  MOE_HD bool keeps(float key, idx i) const noexcept {
    const std::uint32_t k = ordered(key);
    return k > value || (k == value && i <= last);
  }
  /// Two numbers of a plan's type, as scratch holds them.
  MOE_HD void store(idx* to) const noexcept {
    to[0] = __builtin_bit_cast(idx, value);
    to[1] = last;
  }
  MOE_HD static cut load(const idx* from) noexcept { return {__builtin_bit_cast(std::uint32_t, from[0]), from[1]}; }
};

/// The cut that keeps the `room` largest of the eligible keys key(0) .. key(n - 1), ties to the lower index; all of them
/// where there are fewer. Bisects over the bits of a float: 32 passes, no memory.
template <class Key>
MOE_HD cut best_of(idx n, dim room, Key key) noexcept {
  const auto at_least = [&](std::uint32_t value) {
    dim count = 0;
    for (idx i = 0; i < n; ++i) count += ordered(key(i)) >= value;
    return count;
  };
  if (at_least(1) <= room) return {};
  cut c;  // the largest value that `room` keys reach
  for (std::uint32_t bit = 0x80000000u; bit != 0; bit >>= 1)
    if (at_least(c.value | bit) >= room) c.value |= bit;
  room -= at_least(c.value + 1);
  for (idx i = 0; i < n && room > 0; ++i)
    if (ordered(key(i)) == c.value) {
      c.last = i;
      --room;
    }
  return c;
}

}  // namespace moe::detail
