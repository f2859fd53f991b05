// SPDX-License-Identifier: Apache-2.0
/// Score rules: what ranks an expert and what it weighs, per element plus the reduction it needs. How rows map to lanes,
/// warps or blocks is the backend's business.
///
/// A rule turns the score z of a (token, expert) pair into raw(z), and the raw values of a token's choices into weights:
///
///   weight_j = scale raw_j / divisor(sum over the token's choices of term(raw_i))
///
/// Choices that capacity drops count in the sum: weights stay as they were before dropping.
#pragma once

#include <cmath>
#include <limits>

#include "moe/core/config.hpp"
#include "moe/core/types.hpp"

namespace moe {

/// A score or key that is never selected. NaN is not eligible either.
inline constexpr float not_eligible = -std::numeric_limits<float>::infinity();

MOE_HD inline bool eligible(float key) noexcept { return key > not_eligible; }

/// Over which experts of a token a rule needs the largest score and the sum of exp(z - largest).
enum class reduction : std::uint8_t { none, kept, all };
struct row_statistics {
  float largest = 0, sum = 1;
};

/// Softmax over the kept choices: ranks by z, weighs by exp(z_j) / sum exp(z_i). Softmax, top-k, renormalise (Mixtral) and
/// top-k, softmax (Granite, gpt-oss) are this same function. Its gradient needs the weights alone:
/// dz_j = weight_j (dweight_j - sum weight_i dweight_i).
struct softmax_over_kept {
  static constexpr reduction over = reduction::kept;
  static constexpr bool ranks_by_score = true;  ///< key orders as z does
  static constexpr bool keeps_scores = false;   ///< backward reads the scores again
  static constexpr float scale = 1;

  MOE_HD float key(float z, row_statistics) const noexcept { return z; }
  MOE_HD float raw(float z, row_statistics row) const noexcept { return std::exp(z - row.largest); }
  MOE_HD float slope(float, float raw) const noexcept { return raw; }
  MOE_HD float term(float raw) const noexcept { return raw; }
  MOE_HD float term_slope(float) const noexcept { return 1; }
  MOE_HD float divisor(float sum) const noexcept { return sum; }
  MOE_HD float divisor_slope(float) const noexcept { return 1; }
};

/// Only selects: every weight is 1 and no gradient reaches the scores. The one rule that takes a score of +inf.
struct select_only {
  static constexpr reduction over = reduction::none;
  static constexpr bool ranks_by_score = true;
  static constexpr bool keeps_scores = false;
  static constexpr float scale = 1;

  MOE_HD float key(float z, row_statistics) const noexcept { return z; }
  MOE_HD float raw(float, row_statistics) const noexcept { return 1; }
  MOE_HD float slope(float, float) const noexcept { return 0; }
  MOE_HD float term(float) const noexcept { return 0; }
  MOE_HD float term_slope(float) const noexcept { return 0; }
  MOE_HD float divisor(float) const noexcept { return 1; }
  MOE_HD float divisor_slope(float) const noexcept { return 0; }
};

}  // namespace moe
