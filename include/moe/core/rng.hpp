// SPDX-License-Identifier: Apache-2.0
/// Counter-based random numbers: a pure function of (seed, stream, counter), equal on every backend and thread count.
#pragma once

#include <cmath>
#include <cstdint>

#include "moe/core/config.hpp"

namespace moe {

/// Philox 4x32-10: `rng(seed, stream)(counter)` is 64 random bits. Nothing advances; who draws names the counter.
/// Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
class rng {
 public:
  rng() = default;
  MOE_HD explicit constexpr rng(std::uint64_t seed, std::uint64_t stream = 0) noexcept : seed_(seed), stream_(stream) {}

  /// An independent generator, for a part that needs its own numbers.
  MOE_HD constexpr rng split(std::uint64_t salt) const noexcept { return rng((*this)(salt), stream_ + 1); }

  MOE_HD constexpr std::uint64_t operator()(std::uint64_t counter) const noexcept {
    std::uint32_t c0 = low(counter), c1 = high(counter), c2 = low(stream_), c3 = high(stream_);
    std::uint32_t k0 = low(seed_), k1 = high(seed_);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
      const std::uint32_t n0 = high(p1) ^ c1 ^ k0, n2 = high(p0) ^ c3 ^ k1;
      c1 = low(p1);
      c3 = low(p0);
      c0 = n0;
      c2 = n2;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return std::uint64_t{c1} << 32 | c0;
  }

  /// In [0, 1), with 24 bits.
  MOE_HD constexpr float uniform(std::uint64_t counter) const noexcept {
    return static_cast<float>((*this)(counter) >> 40) * 0x1p-24f;
  }
  /// Mean 0, deviation 1 (Box-Muller over the two halves of one draw).
  MOE_HD float normal(std::uint64_t counter) const noexcept {
    const std::uint64_t u = (*this)(counter);
    const float radius = (static_cast<float>(low(u) >> 8) + 1.f) * 0x1p-24f;  // (0, 1]
    const float angle = static_cast<float>(high(u) >> 8) * (6.28318530718f * 0x1p-24f);
    return std::sqrt(-2.f * std::log(radius)) * std::cos(angle);
  }

 private:
  MOE_HD static constexpr std::uint32_t low(std::uint64_t v) noexcept { return static_cast<std::uint32_t>(v); }
  MOE_HD static constexpr std::uint32_t high(std::uint64_t v) noexcept { return static_cast<std::uint32_t>(v >> 32); }

  std::uint64_t seed_ = 0, stream_ = 0;
};

}  // namespace moe
