// SPDX-License-Identifier: Apache-2.0
/// What a plan says about the load of the experts.
#pragma once

#include <cmath>
#include <span>

#include "moe/core/plan.hpp"

namespace moe {

/// load[e] += the choices of expert e, dropped ones included: what balancing looks at. Rows alone are offsets' differences.
inline void count_load(const routing_plan& p, std::span<dim> load) {
  expect(static_cast<dim>(load.size()), p.experts(), "count_load: load", "elements", "E");
  for (dim e = 0; e < p.experts(); ++e)
    load[static_cast<std::size_t>(e)] += p.offsets[static_cast<std::size_t>(e + 1)] - p.offsets[static_cast<std::size_t>(e)];
  for (idx i = 0; i < p.token_offsets.back(); ++i)
    if (const idx r = p.position[static_cast<std::size_t>(i)]; r < 0) ++load[static_cast<std::size_t>(-1 - r)];
}

/// How even the rows of a plan are: `routing_statistics s(ctx.plan)`. Dropped choices have no rows.
struct routing_statistics {
  dim rows = 0;          ///< A
  dim dropped = 0;       ///< choices that capacity refused
  dim busiest = 0;       ///< rows of the busiest expert
  dim idle = 0;          ///< experts without rows
  double imbalance = 0;  ///< busiest over the mean load; 1 at balance
  double entropy = 0;    ///< of the experts' shares, in nats; log E at balance

  explicit routing_statistics(const routing_plan& p) noexcept : rows(p.rows()), dropped(moe::dropped(p)) {
    for (dim e = 0; e < p.experts(); ++e) {
      const dim n = p.offsets[static_cast<std::size_t>(e + 1)] - p.offsets[static_cast<std::size_t>(e)];
      busiest = n > busiest ? n : busiest;
      idle += n == 0;
      if (n == 0) continue;
      const double share = static_cast<double>(n) / static_cast<double>(rows);
      entropy -= share * std::log(share);
    }
    if (rows > 0) imbalance = static_cast<double>(busiest * p.experts()) / static_cast<double>(rows);
  }
};

}  // namespace moe
