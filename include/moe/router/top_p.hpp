// SPDX-License-Identifier: Apache-2.0
/// As many experts as a token is unsure about.
#pragma once

#include "moe/router/select.hpp"

namespace moe {

/// Keeps a token's most probable experts, ties to the lower index, each while the sum of the larger probabilities before it
/// is below p: the one that crosses p is kept, and at least one. KMax cuts after. Probabilities are the softmax over all
/// experts; the weights are these by default, or by `softmax_over_kept` divided by their sum.
///
/// saves    the scores, 4 T E bytes, where the rule needs them
/// errors   shape_error when p is not in (0, 1] or KMax is more than the layer's experts
/// Huang et al. 2024, Harder Tasks Need More Experts, arXiv:2403.07652
template <int KMax, class Rule = score_rule<softmax_score>>
struct top_p {
  static_assert(KMax > 0, "moe::top_p: KMax must be at least 1");
  static constexpr bool selects_by_key = true;
  using plan = routing_plan;
  using weights = nothing;
  using context = score_context;

  float p = 0.9f;
  [[no_unique_address]] Rule rule{};

  void check(shape s) const {
    if (!(p > 0 && p <= 1)) throw shape_error("top_p: p is " + std::to_string(p) + ", expected more than 0 and at most 1");
    detail::expect_choices(KMax, s, "top_p");
  }
  dim max_rows(shape s) const noexcept { return s.tokens * KMax; }
  dim choices(shape) const noexcept { return KMax; }
  context make_context(shape s, arena& mem) const noexcept { return make_score_context<Rule>(s, mem); }
  key_scratch make_scratch(shape s, arena& mem) const noexcept { return {mem.matrix<float>("keys", s.tokens, s.experts)}; }

  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& to, context& ctx) const noexcept {
    select(on, w, scores, to);
    weigh(on, w, scores, to, ctx);
  }
  template <class B>
  void select(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& to) const noexcept {
    detail::select_by_key(on, *this, w, scores, to);
  }
  template <class B>
  void rank(const call<B>& on, const weights&, matrix_view<const float> scores, matrix_view<float> keys) const noexcept {
    using probability = score_rule<softmax_score>;
    for_each_token(on, scores.rows, detail::rank_token<probability>{probability{}, scores, keys});
  }
  template <class B>
  void assign(const call<B>& on, const weights&, matrix_view<const float> keys, plan& to) const noexcept {
    top_k_rows<KMax>(on, keys, to);
    shorten_choices(on, to, nucleus{keys, p});
    group_by_expert(on, to);
  }
  template <class B>
  void weigh(const call<B>& on, const weights&, matrix_view<const float> scores, plan& to, context& ctx) const noexcept {
    moe::weigh(on, rule, scores, to, ctx);
  }
  template <class B>
  void backward(const call<B>& on, const weights&, const plan& from, const context& ctx, std::span<const float> dweight,
                matrix_view<float> dscores, weights&) const noexcept {
    weigh_backward(on, rule, from, ctx, dweight, dscores);
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct nucleus {
    matrix_view<const float> keys;
    float p;
    MOE_HD idx operator()(dim t, const idx* chosen, idx n) const noexcept {
      idx kept = 0;
      for (float sum = 0; kept < n && (kept == 0 || sum < p); ++kept) sum += keys(t, chosen[kept]);
      return kept;
    }
  };
};

}  // namespace moe
