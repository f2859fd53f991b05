// SPDX-License-Identifier: Apache-2.0
/// The usual router: the k best experts of each token.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"
#include "moe/router/weigh.hpp"

namespace moe {

namespace detail {

/// keys[t,e] = rule.key(scores[t,e]); a score that is not eligible stays so.
template <class Rule>
struct rank_token {
  Rule rule;
  matrix_view<const float> scores;
  matrix_view<float> keys;

  MOE_HD void operator()(dim t) const noexcept {
    const float* z = scores.row(t);
    row_statistics row{};
    if constexpr (Rule::over == reduction::all) row = statistics(z, static_cast<idx>(scores.cols));
    for (dim e = 0; e < scores.cols; ++e) keys(t, e) = eligible(z[e]) ? rule.key(z[e], row) : not_eligible;
  }
};

}  // namespace detail

/// Keeps the K experts with the largest key, ties to the lower index; weighs them by the rule. A token with fewer than K
/// eligible experts keeps fewer.
///
/// saves    nothing for rules whose gradient needs the weights alone; else the scores, 4 T E bytes
///
/// Routers that select by key work in two steps, so that decorators can stand between them: `rank` gives the keys,
/// `assign` selects by them; `weigh` gives a plan its weights.
template <int K, class Rule = softmax_over_kept>
struct top_k {
  static_assert(K > 0, "moe::top_k: K must be at least 1");
  using plan = routing_plan;
  using weights = nothing;
  using context = score_context;
  using rule_type = Rule;
  struct scratch { matrix_view<float> keys; };

  [[no_unique_address]] Rule rule{};

  void check(shape s) const {
    if (K > s.experts)
      throw shape_error("top_k: k is " + std::to_string(K) + ", expected at most " + std::to_string(s.experts) + " (E)");
  }
  dim max_rows(shape s) const noexcept { return s.tokens * K; }
  dim choices() const noexcept { return K; }
  context make_context(shape s, arena& mem) const noexcept {
    if constexpr (Rule::keeps_scores) return {mem.matrix<float>("scores", s.tokens, s.experts)};
    else return {};
  }
  scratch make_scratch(shape s, arena& mem) const noexcept {
    if constexpr (Rule::ranks_by_score) return {};
    else return {mem.matrix<float>("keys", s.tokens, s.experts)};
  }

  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    scratch_frame frame(on.scratch);
    const auto keys = make_scratch(on.sizes, on.scratch).keys;
    if (keys) rank(on, w, scores, keys);
    assign(on, w, keys ? matrix_view<const float>(keys) : scores, p);
    weigh(on, w, scores, p, ctx);
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
