// SPDX-License-Identifier: Apache-2.0
/// Layers of published models, and the limits of the machine that the tables were made on.
#pragma once

#include <algorithm>
#include <array>

#include "moe/core/types.hpp"

namespace support {

using moe::dim;

/// A layer of gated feed-forward experts, and what a loop of Eigen products over its experts did on the machine of
/// docs/performance.md when nothing else ran: tokens per second at each of `batches`, two threads.
struct model_shape {
  const char* name;
  dim d, f, experts;
  std::array<double, 6> known_loop;

  double weight_bytes(double active) const {
    return 4 * (static_cast<double>(3 * d * f) * active + static_cast<double>(experts * d));
  }
  double flops(dim tokens, int k) const { return 2. * static_cast<double>(3 * d * f * tokens * k + experts * d * tokens); }
};

inline constexpr std::array<dim, 6> batches{1, 4, 32, 128, 512, 2048};
inline constexpr model_shape s1{"S1", 1024, 3584, 8, {185, 134, 481, 1999, 4647, 5112}};      // k = 2
inline constexpr model_shape s2{"S2", 2048, 768, 128, {104, 99, 112, 319, 1184, 2455}};       // k = 8
inline constexpr model_shape s3{"S3", 2048, 1024, 64, {78, 67, 106, 462, 1499, 2119}};        // k = 8
inline constexpr model_shape s4{"S4", 1024, 512, 96, {2318, 2309, 2239, 2521, 5309, 17800}};  // k = 1

/// The roof of one thread: bytes from memory and float32 operations per second (90 % of the multiply-add rate).
inline constexpr double roof_bytes = 18.3e9, roof_flops = 192e9;

/// Tokens per second at the roof: each active expert's weights read once, or the operations, whichever takes longer.
inline double roof(const model_shape& s, dim tokens, int k, double active, int threads) {
  const double seconds = std::max(s.weight_bytes(active) / roof_bytes, s.flops(tokens, k) / roof_flops) / threads;
  return static_cast<double>(tokens) / seconds;
}

}  // namespace support
