// SPDX-License-Identifier: Apache-2.0
/// Score rules: what ranks an expert and what it weighs, per element plus the reduction it needs. How rows map to lanes,
/// warps or blocks is the backend's business.
///
/// A rule turns the score z of a (token, expert) pair into raw(z), and the raw values of a token's choices into weights:
///
///   weight_j = scale raw_j / divisor(sum over the token's choices of term(raw_i))
///
/// Choices that capacity drops count in the sum: weights stay as they were before dropping.
///
/// Most rules are a `score_rule<Score, Norm>`; which model family uses which is in router/presets.hpp.
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

/// Scores: s(z), increasing in z, and ds/dz from z and s.

/// exp(z) / sum over all experts of exp(z)
struct softmax_score {
  static constexpr reduction over = reduction::all;
  MOE_HD float operator()(float z, row_statistics row) const noexcept { return std::exp(z - row.largest) / row.sum; }
  MOE_HD float slope(float, float s) const noexcept { return s; }  ///< but for the share of the sum, which `weigh` adds
};
/// 1 / (1 + exp(-z))
struct sigmoid_score {
  static constexpr reduction over = reduction::none;
  MOE_HD float operator()(float z, row_statistics) const noexcept { return 1.f / (1.f + std::exp(-z)); }
  MOE_HD float slope(float, float s) const noexcept { return s * (1.f - s); }
};
/// sqrt(log(1 + exp(z)))
struct sqrt_softplus_score {
  static constexpr reduction over = reduction::none;
  MOE_HD float operator()(float z, row_statistics) const noexcept {
    return std::sqrt((z > 0 ? z : 0.f) + std::log1p(std::exp(-std::fabs(z))));
  }
  MOE_HD float slope(float z, float s) const noexcept { return s > 0 ? 0.5f / (s * (1.f + std::exp(-z))) : 0.f; }
};
/// z
struct identity_score {
  static constexpr reduction over = reduction::none;
  MOE_HD float operator()(float z, row_statistics) const noexcept { return z; }
  MOE_HD float slope(float, float) const noexcept { return 1; }
};

namespace detail {

/// 10^exponent, the nearest float for exponents of -22 to 22.
constexpr float power_of_ten(int exponent) noexcept {
  double v = 1;
  for (int i = 0; i < (exponent < 0 ? -exponent : exponent); ++i) v *= 10;
  return static_cast<float>(exponent < 0 ? 1 / v : v);
}

}  // namespace detail

/// Norms: what the raw weights of a token are divided by. Which constant stands where is part of a model family's formula,
/// so each form is a type.

/// 1
struct unnormalised {
  MOE_HD float term(float) const noexcept { return 0; }
  MOE_HD float term_slope(float) const noexcept { return 0; }
  MOE_HD float divisor(float) const noexcept { return 1; }
  MOE_HD float divisor_slope(float) const noexcept { return 0; }
};
/// sum raw. Where every raw is 0 the weights are NaN, as the formula says.
struct sum_norm {
  MOE_HD float term(float raw) const noexcept { return raw; }
  MOE_HD float term_slope(float) const noexcept { return 1; }
  MOE_HD float divisor(float sum) const noexcept { return sum; }
  MOE_HD float divisor_slope(float) const noexcept { return 1; }
};
/// sum raw + 10^Exponent
template <int Exponent>
struct sum_plus : sum_norm {
  MOE_HD float divisor(float sum) const noexcept { return sum + epsilon; }

 private:
  static constexpr float epsilon = detail::power_of_ten(Exponent);
};
/// max(sum raw, 10^Exponent)
template <int Exponent>
struct sum_at_least : sum_norm {
  MOE_HD float divisor(float sum) const noexcept { return sum < least ? least : sum; }
  MOE_HD float divisor_slope(float sum) const noexcept { return sum < least ? 0.f : 1.f; }

 private:
  static constexpr float least = detail::power_of_ten(Exponent);
};
/// (sum raw^P)^(1/P)
template <int P>
struct p_norm {
  static_assert(P > 0, "moe::p_norm: P must be at least 1");
  MOE_HD float term(float raw) const noexcept { return power(raw, P); }
  MOE_HD float term_slope(float raw) const noexcept { return P * power(raw, P - 1); }
  MOE_HD float divisor(float sum) const noexcept { return std::pow(sum, 1.f / P); }
  MOE_HD float divisor_slope(float sum) const noexcept { return std::pow(sum, 1.f / P - 1.f) / P; }

 private:
  MOE_HD static float power(float v, int n) noexcept {
    float product = 1;
    for (int i = 0; i < n; ++i) product *= v;
    return product;
  }
};

/// Ranks by s(z); weighs by scale s(z) / norm over the kept choices. The scale starts as Numerator / Denominator; a
/// checkpoint's configuration may say otherwise.
template <class Score, class Norm = unnormalised, int Numerator = 1, int Denominator = 1>
struct score_rule {
  using score_type = Score;  ///< unbiased: what capacity by score drops by
  static constexpr reduction over = Score::over;
  static constexpr bool ranks_by_score = true;  ///< key orders as z does
  static constexpr bool keeps_scores = true;    ///< backward reads the scores again

  float scale = static_cast<float>(Numerator) / static_cast<float>(Denominator);

  MOE_HD float key(float z, row_statistics row) const noexcept { return Score{}(z, row); }
  MOE_HD float raw(float z, row_statistics row) const noexcept { return Score{}(z, row); }
  MOE_HD float slope(float z, float raw) const noexcept { return Score{}.slope(z, raw); }
  MOE_HD float term(float raw) const noexcept { return Norm{}.term(raw); }
  MOE_HD float term_slope(float raw) const noexcept { return Norm{}.term_slope(raw); }
  MOE_HD float divisor(float sum) const noexcept { return Norm{}.divisor(sum); }
  MOE_HD float divisor_slope(float sum) const noexcept { return Norm{}.divisor_slope(sum); }
};

/// Softmax over the kept choices: ranks by z, weighs by exp(z_j) / sum exp(z_i). Softmax, top-k, renormalise (Mixtral) and
/// top-k, softmax (Granite, gpt-oss) are this same function. Its gradient needs the weights alone:
/// dz_j = weight_j (dweight_j - sum weight_i dweight_i).
struct softmax_over_kept : sum_norm {
  using score_type = softmax_score;
  static constexpr reduction over = reduction::kept;
  static constexpr bool ranks_by_score = true;
  static constexpr bool keeps_scores = false;
  static constexpr float scale = 1;

  MOE_HD float key(float z, row_statistics) const noexcept { return z; }
  MOE_HD float raw(float z, row_statistics row) const noexcept { return std::exp(z - row.largest); }
  MOE_HD float slope(float, float raw) const noexcept { return raw; }
};

/// Only selects: every weight is 1 and no gradient reaches the scores. The one rule that takes a score of +inf.
struct select_only : unnormalised {
  using score_type = identity_score;
  static constexpr reduction over = reduction::none;
  static constexpr bool ranks_by_score = true;
  static constexpr bool keeps_scores = false;
  static constexpr float scale = 1;

  MOE_HD float key(float z, row_statistics) const noexcept { return z; }
  MOE_HD float raw(float, row_statistics) const noexcept { return 1; }
  MOE_HD float slope(float, float) const noexcept { return 0; }
};

}  // namespace moe
