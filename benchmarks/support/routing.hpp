// SPDX-License-Identifier: Apache-2.0
/// Which experts tokens choose: even routing, and uneven routing that is told how uneven.
#pragma once

#include <vector>

#include "support/contestant.hpp"

namespace bench {

/// Biases of the scores, by rank, under which the chance that a token has the expert of rank r (from 1) among its k best is
/// proportional to r^-skew, but at most 1. Scores are normal of deviation 1, as those of random tokens and routers are.
std::vector<float> popularity_bias(dim experts, dim k, double skew);

/// Fills in the plan of a batch from its x, router and bias.
void plan(batch& b, dim k);

/// Experts that the batch uses at least once.
dim active_experts(const batch& b);

}  // namespace bench
