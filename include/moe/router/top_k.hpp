// SPDX-License-Identifier: Apache-2.0
/// The usual router: the k best experts of each token.
#pragma once

#include "moe/router/select.hpp"

namespace moe {

/// Keeps the K experts with the largest key, ties to the lower index; weighs them by the rule. A token with fewer than K
/// eligible experts keeps fewer.
///
/// saves    nothing for rules whose gradient needs the weights alone; else the scores, 4 T E bytes
/// errors   shape_error when K is more than the layer's experts
template <int K, class Rule = softmax_over_kept>
struct top_k {
  static_assert(K > 0, "moe::top_k: K must be at least 1");
  static constexpr bool selects_by_key = true;
  static constexpr int best = K;
  using plan = routing_plan;
  using weights = nothing;
  using context = score_context;

  [[no_unique_address]] Rule rule{};

  void check(shape s) const { detail::expect_choices(K, s, "top_k"); }
  dim max_rows(shape s) const noexcept { return s.tokens * K; }
  dim choices(shape) const noexcept { return K; }
  context make_context(shape s, arena& mem) const noexcept { return make_score_context<Rule>(s, mem); }
  key_scratch make_scratch(shape s, arena& mem) const noexcept {
    if constexpr (Rule::ranks_by_score)
      return {};
    else
      return {mem.matrix<float>("keys", s.tokens, s.experts)};
  }

  auto make_choices(shape s, arena& mem) const noexcept { return detail::make_choice_scratch(*this, s, mem); }

  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    select(on, w, scores, p);
    weigh(on, w, scores, p, ctx);
  }
  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx,
               const fill_scores& fill) const noexcept {
    detail::route_by_key(on, *this, w, scores, p, ctx, fill);
  }
  template <class B>
  void select(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p) const noexcept {
    detail::select_by_key(on, *this, w, scores, p);
  }
  template <class B>
  void rank(const call<B>& on, const weights&, matrix_view<const float> scores, matrix_view<float> keys) const noexcept {
    for_each_token(on, scores.rows, detail::rank_token<Rule>{rule, scores, keys});
  }
  template <class B>
  void assign(const call<B>& on, const weights&, matrix_view<const float> keys, plan& p) const noexcept {
    top_k_rows<K>(on, keys, p);
    group_by_expert(on, p);
  }
  template <class B>
  void weigh(const call<B>& on, const weights&, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    moe::weigh(on, rule, scores, p, ctx);
  }
  template <class B>
  void backward(const call<B>& on, const weights&, const plan& p, const context& ctx, std::span<const float> dweight,
                matrix_view<float> dscores, weights&) const noexcept {
    weigh_backward(on, rule, p, ctx, dweight, dscores);
  }
};

}  // namespace moe
