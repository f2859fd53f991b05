// SPDX-License-Identifier: Apache-2.0
/// What routers that select by key share.
///
/// Such a router works in steps, so that decorators can stand between them:
///
///   rank(on, w, scores, keys)        keys[T,E] from scores: what the choice is made by
///   assign(on, w, keys, plan)        the choice: the whole plan but for its weights
///   weigh(on, w, scores, plan, ctx)  the weights of a plan, which may be a recorded one
///
/// and says so with `selects_by_key`. `select` is rank and assign; forward is select and weigh. A decorator of keys wraps
/// `rank`, one of plans wraps `select`, one of weights wraps `weigh`, so the order reads from the inside out:
/// capacity<grouped<bias_balanced<top_k<8, rule>>>>.
#pragma once

#include "moe/concepts.hpp"
#include "moe/router/weigh.hpp"

namespace moe {

/// Room for keys, empty where the scores themselves serve.
struct key_scratch {
  matrix_view<float> keys;
};

namespace detail {

/// keys[t,e] = rule.key(scores[t,e]). A score that is not eligible stays so, and +inf stays before all others.
template <class Rule>
struct rank_token {
  Rule rule;
  matrix_view<const float> scores;
  matrix_view<float> keys;

  MOE_HD void operator()(dim t) const noexcept {
    const float* z = scores.row(t);
    row_statistics row{};
    if constexpr (Rule::over == reduction::all) row = statistics(z, static_cast<idx>(scores.cols));
    for (dim e = 0; e < scores.cols; ++e) {
      const bool finite = eligible(z[e]) && eligible(-z[e]);
      keys(t, e) = finite ? rule.key(z[e], row) : eligible(z[e]) ? z[e] : not_eligible;
    }
  }
};

template <class R>
concept selects_by_key = R::selects_by_key;

/// Scratch for a decorator of keys: what its router takes, with room for keys in any case.
template <class R>
key_scratch make_keys(const R& r, shape s, arena& mem) noexcept {
  key_scratch room = r.make_scratch(s, mem);
  if (room.keys.cols == 0) room.keys = mem.matrix<float>("keys", s.tokens, s.experts);
  return room;
}

/// Rank and assign.
template <class R, class B>
void select_by_key(const call<B>& on, const R& r, const typename R::weights& w, matrix_view<const float> scores,
                   typename R::plan& p) noexcept {
  scratch_frame frame(on.scratch);
  const matrix_view<float> keys = r.make_scratch(on.sizes, on.scratch).keys;
  if (keys) r.rank(on, w, scores, keys);
  r.assign(on, w, keys ? matrix_view<const float>(keys) : scores, p);
}
/// The router inside all decorators. It may say that it keeps the `best` of a token's keys and weighs them by its rule.
template <class R>
const auto& innermost(const R& r) noexcept {
  if constexpr (requires { r.inner; })
    return innermost(r.inner);
  else
    return r;
}
template <class R>
concept routes_by_key = requires(const R& r) { std::remove_cvref_t<decltype(innermost(r))>::best; };

/// What route_by_key takes from scratch.
struct choice_scratch {
  matrix_view<float> keys;  ///< as key_scratch
  std::span<float> weight;  ///< of every choice, before there is a plan
};
template <class R>
choice_scratch make_choice_scratch(const R& r, shape s, arena& mem) noexcept {
  return {r.make_scratch(s, mem).keys, mem.vector<float>("weights", s.tokens * r.choices(s))};
}
/// Rank, assign and weigh, where scores come a run of tokens at a time: the thread that has those of a run does all three.
template <class R, class B>
void route_by_key(const call<B>& on, const R& r, const typename R::weights& w, matrix_view<const float> scores,
                  typename R::plan& p, const score_context& ctx, const fill_scores& fill) noexcept {
  scratch_frame frame(on.scratch);
  const choice_scratch s = make_choice_scratch(r, on.sizes, on.scratch);
  const auto& chooser = innermost(r);
  constexpr int K = std::remove_cvref_t<decltype(chooser)>::best;
  const auto rank_then = [&](const auto& then) {
    fill([&](dim first, dim n) {
      if (s.keys)
        on_this_thread(on, [&](const auto& own) { r.rank(own, w, scores.slice(first, n), s.keys.slice(first, n)); });
      then(first, n);
    });
  };
  const auto weigh_token = [&](dim t, const idx* chosen, idx n, float* weight) {
    weigh_choices<K>(chooser.rule, scores.row(t), static_cast<idx>(scores.cols), chosen, n, weight);
    for (dim e = 0; e < ctx.scores.cols; ++e) ctx.scores(t, e) = scores(t, e);
  };
  route_rows<K>(on, s.keys ? matrix_view<const float>(s.keys) : scores, p, s.weight, rank_then, weigh_token);
}
/// A plan without its weights, by whatever steps the router has.
template <class R, class B>
void select(const call<B>& on, const R& r, const typename R::weights& w, matrix_view<const float> scores,
            typename R::plan& p, typename R::context& ctx) noexcept {
  if constexpr (requires { r.select(on, w, scores, p); })
    r.select(on, w, scores, p);
  else
    r.forward(on, w, scores, p, ctx);
}

/// The unbiased score of a router: that of its rule.
template <class R>
struct score_of {
  using type = softmax_score;
};
template <class R>
  requires requires(R r) { typename decltype(r.rule)::score_type; }
struct score_of<R> {
  using type = typename decltype(R::rule)::score_type;
};
template <class R>
  requires requires(R r) { r.inner; }
struct score_of<R> : score_of<decltype(R::inner)> {};

/// Throws where a router would choose more experts than there are.
inline void expect_choices(dim k, shape s, const char* what) {
  if (k > s.experts)
    throw shape_error(std::string(what) + ": k is " + std::to_string(k) + ", expected at most " + std::to_string(s.experts) +
                      " (E)");
}

}  // namespace detail
}  // namespace moe
