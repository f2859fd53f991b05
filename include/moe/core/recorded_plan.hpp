// SPDX-License-Identifier: Apache-2.0
/// A plan that owns its memory: for replay with other weights, and for files (io/plan_file.hpp).
#pragma once

#include <utility>

#include "moe/core/plan.hpp"

namespace moe {

/// A plan with arrays of exactly its length. `plan()` is valid until the object is destroyed or assigned to.
class recorded_plan {
 public:
  recorded_plan() = default;
  /// Room for `rows` assignments kept out of `choices`, all zero: offsets[E+1] token[rows] weight[rows]
  /// token_offsets[T+1] position[choices].
  recorded_plan(dim experts, dim tokens, dim rows, dim choices) {
    arena count;
    carve(count, experts, tokens, rows, choices);
    memory_ = buffer(count.used());
    arena mem(memory_.bytes());
    plan_ = carve(mem, experts, tokens, rows, choices);
  }
  recorded_plan(recorded_plan&& other) noexcept { swap(other); }
  recorded_plan& operator=(recorded_plan&& other) noexcept {
    swap(other);
    return *this;
  }
  recorded_plan(const recorded_plan&) = delete;
  recorded_plan& operator=(const recorded_plan&) = delete;

  const routing_plan& plan() const noexcept { return plan_; }

 private:
  static routing_plan carve(arena& mem, dim experts, dim tokens, dim rows, dim choices) noexcept {
    return {mem.vector<idx>("offsets", experts + 1), mem.vector<idx>("token", rows), mem.vector<float>("weight", rows),
            mem.vector<idx>("token_offsets", tokens + 1), mem.vector<idx>("position", choices)};
  }
  void swap(recorded_plan& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(plan_, other.plan_);
  }

  buffer memory_;
  routing_plan plan_;
};

/// A deep copy of a plan. Throws shape_error for one that is broken (check).
inline recorded_plan record(const routing_plan& p) {
  check(p);
  recorded_plan copy(p.experts(), p.tokens(), p.rows(), p.token_offsets.back());
  const routing_plan& to = copy.plan();
  const auto fill = [](auto from, auto into) {
    for (std::size_t i = 0; i < into.size(); ++i) into[i] = from[i];
  };
  fill(p.offsets, to.offsets);
  fill(p.token, to.token);
  fill(p.weight, to.weight);
  fill(p.token_offsets, to.token_offsets);
  fill(p.position, to.position);
  return copy;
}

}  // namespace moe
