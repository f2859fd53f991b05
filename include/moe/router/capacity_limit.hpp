// SPDX-License-Identifier: Apache-2.0
/// How many rows an expert may take: limit(shape, k) for T tokens of k choices each. Conventions differ, so each is a type.
#pragma once

#include <cmath>
#include <limits>

#include "moe/core/error.hpp"

namespace moe {

/// C = max(ceil(factor T k / E), at_least), or without the k where it counts per token. Never more than T.
template <bool PerToken>
struct basic_capacity_factor {
  double factor = 1;
  dim at_least = 0;

  void check() const {
    if (!(factor > 0 && factor < std::numeric_limits<double>::infinity()))
      throw shape_error("capacity: factor is " + std::to_string(factor) + ", expected more than 0, finite");
    if (at_least < 0) throw shape_error("capacity: at_least is " + std::to_string(at_least) + ", expected at least 0");
  }
  dim operator()(shape s, dim k) const noexcept {
    const double tokens = static_cast<double>(s.tokens), choices = PerToken ? 1 : static_cast<double>(k);
    const double room = std::ceil(factor * tokens * choices / static_cast<double>(s.experts));
    const dim rows = room < tokens ? static_cast<dim>(room) : s.tokens;
    return rows > at_least ? rows : at_least < s.tokens ? at_least : s.tokens;
  }
};
/// GShard, Mixtral
using capacity_factor = basic_capacity_factor<false>;
/// Switch, Z-code
using capacity_per_token = basic_capacity_factor<true>;

/// C = rows, whatever the batch.
struct given_capacity {
  dim rows = 1;

  void check() const {
    if (rows < 1) throw shape_error("capacity: rows is " + std::to_string(rows) + ", expected at least 1");
  }
  dim operator()(shape, dim) const noexcept { return rows; }
};

}  // namespace moe
