// SPDX-License-Identifier: Apache-2.0
/// moe::top_k of a k that is known when the program runs, so that a layer is compiled once and not for every k.
#pragma once

#include "moe/backend/cpu.hpp"
#include "moe/router/top_k.hpp"
#include "support/shapes.hpp"

namespace bench {

using moe::matrix_view;

/// top_k<k>, bit for bit: a table holds those of 1 to most_choices.
///
/// saves    nothing
/// errors   shape_error when k is not from 1 to most_choices, or more than the layer's experts
struct any_top_k {
  using backend = moe::cpu<>;
  using plan = moe::routing_plan;
  using weights = moe::nothing;
  using context = moe::score_context;

  int k = 1;

  void check(moe::shape s) const;
  dim max_rows(moe::shape s) const noexcept { return s.tokens * k; }
  context make_context(moe::shape, moe::arena&) const noexcept { return {}; }
  moe::detail::choice_scratch make_choices(moe::shape s, moe::arena& mem) const noexcept;
  void forward(const moe::call<backend>& on, const weights&, matrix_view<const float> scores, plan& p, context& ctx,
               const moe::fill_scores& fill) const noexcept;
  /// The same of scores that are there, on this thread.
  moe::detail::choice_scratch make_scratch(moe::shape s, moe::arena& mem) const noexcept { return make_choices(s, mem); }
  void forward(const moe::call<backend>& on, const weights&, matrix_view<const float> scores, plan& p,
               context& ctx) const noexcept;
  void backward(const moe::call<backend>& on, const weights&, const plan& p, const context& ctx,
                std::span<const float> dweight, matrix_view<float> dscores, weights&) const noexcept;
};

}  // namespace bench
