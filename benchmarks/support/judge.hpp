// SPDX-License-Identifier: Apache-2.0
/// Whether peers are as good as they are known to be: a ratio to a weaker one would flatter.
#pragma once

#include <string>
#include <vector>

#include "support/report.hpp"

namespace bench {

/// A sentence for each row beside which the Eigen loop fell short of 85 % of its `known_loop`, where that applies: forward
/// on two threads with even routing.
std::vector<std::string> judge_loop(const std::vector<row>& rows);

}  // namespace bench
