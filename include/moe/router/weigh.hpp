// SPDX-License-Identifier: Apache-2.0
/// The weights of a plan's assignments by a score rule, forward and backward, one token at a time. Every router uses it,
/// whatever it selects by, and so does the replay of a recorded plan.
#pragma once

#include "moe/concepts.hpp"
#include "moe/router/score.hpp"

namespace moe {

/// What a router's backward reads beside the plan: the scores, where the rule or a decorator needs them again.
struct score_context {
  matrix_view<float> scores;  ///< [T,E] or empty
};
template <class Rule>
score_context make_score_context(shape s, arena& mem) noexcept {
  if constexpr (Rule::keeps_scores)
    return {mem.matrix<float>("scores", s.tokens, s.experts)};
  else
    return {};
}

namespace detail {

/// Makes room for the scores in the context of a router whose rule does not ask for it: where choices are dropped, the
/// weights alone do not give the gradient. Decorators that keep something of their own hold the router's context as `inner`.
template <class Context>
void keep_scores(Context& ctx, shape s, arena& mem) noexcept {
  if constexpr (requires { ctx.inner; })
    keep_scores(ctx.inner, s, mem);
  else if constexpr (std::same_as<Context, score_context>)
    if (ctx.scores.cols == 0) ctx.scores = mem.matrix<float>("scores", s.tokens, s.experts);
}
/// The scores that a router's context keeps, or an empty view.
template <class Context>
matrix_view<float> kept_scores(const Context& ctx) noexcept {
  if constexpr (requires { ctx.inner; })
    return kept_scores(ctx.inner);
  else if constexpr (std::same_as<Context, score_context>)
    return ctx.scores;
  else
    return {};
}

/// A plan as device code reads it.
struct plan_pointers {
  const idx *offsets, *token_offsets, *position;
  float* weight;
  idx experts;

  explicit plan_pointers(const routing_plan& p) noexcept
      : offsets(p.offsets.data()),
        token_offsets(p.token_offsets.data()),
        position(p.position.data()),
        weight(p.weight.data()),
        experts(static_cast<idx>(p.experts())) {}
  MOE_HD plan_pointers(const idx* o, const idx* to, const idx* p, float* w, idx n) noexcept
      : offsets(o), token_offsets(to), position(p), weight(w), experts(n) {}

  MOE_HD idx expert_of_row(idx r) const noexcept {
    idx low = 0, high = experts;  // offsets[low] <= r < offsets[high]
    while (high - low > 1) {
      const idx middle = low + (high - low) / 2;
      if (offsets[middle] <= r)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
  MOE_HD idx expert_of(idx choice) const noexcept {
    const idx r = position[choice];
    return r < 0 ? -1 - r : expert_of_row(r);
  }
};

MOE_HD inline row_statistics statistics(const float* z, idx n) noexcept {
  row_statistics s{not_eligible, 0};
  for (idx e = 0; e < n; ++e)
    if (z[e] > s.largest) s.largest = z[e];
  for (idx e = 0; e < n; ++e)
    if (eligible(z[e])) s.sum += std::exp(z[e] - s.largest);
  return s;
}

/// All choices of a token share its divisor.
inline constexpr idx every_choice = std::numeric_limits<idx>::max();

/// The choices of one token, as a rule sees them. Only the first `normed` are divided by the sum, which is theirs alone.
template <class Rule>
struct choices {
  const Rule& rule;
  const plan_pointers& plan;
  const float* z;
  idx first, last, normed;
  row_statistics row{};
  float divisor = 1;

  MOE_HD choices(const Rule& r, const plan_pointers& p, const float* scores, idx t, idx n) noexcept
      : rule(r), plan(p), z(scores), first(p.token_offsets[t]), last(p.token_offsets[t + 1]),
        normed(last - first < n ? last : first + n) {
    if constexpr (Rule::over == reduction::all) row = statistics(z, plan.experts);
    if constexpr (Rule::over == reduction::kept) {
      row.largest = not_eligible;
      for (idx i = first; i < last; ++i)
        if (score(i) > row.largest) row.largest = score(i);
    }
    divisor = rule.divisor(sum());
  }
  MOE_HD float score(idx choice) const noexcept { return z[plan.expert_of(choice)]; }
  MOE_HD float raw(idx choice) const noexcept { return rule.raw(score(choice), row); }
  MOE_HD float divisor_of(idx choice) const noexcept { return choice < normed ? divisor : 1.f; }
  MOE_HD float sum() const noexcept {
    float s = 0;
    for (idx i = first; i < normed; ++i) s += rule.term(raw(i));
    return s;
  }
};

/// weight[r] for every row of token t.
template <class Rule>
struct weigh_token {
  Rule rule;
  plan_pointers plan;
  matrix_view<const float> scores;
  idx normed = every_choice;

  MOE_HD void operator()(dim t) const noexcept {
    const choices<Rule> c(rule, plan, scores.row(t), static_cast<idx>(t), normed);
    for (idx i = c.first; i < c.last; ++i)
      if (const idx r = plan.position[i]; r >= 0) plan.weight[r] = rule.scale * c.raw(i) / c.divisor_of(i);
  }
};

/// weight[0 .. n] of a token's experts chosen[0 .. n], n <= K, before there is a plan: the same bits.
template <int K, class Rule>
void weigh_choices(const Rule& rule, const float* scores, idx experts, const idx* chosen, idx n, float* weight) noexcept {
  idx position[K];
  const idx ends[] = {0, n};
  for (idx j = 0; j < n; ++j) position[j] = -1 - chosen[j];
  const plan_pointers plan(nullptr, ends, position, nullptr, experts);
  const choices<Rule> c(rule, plan, scores, 0, every_choice);
  for (idx j = 0; j < n; ++j) weight[j] = rule.scale * c.raw(j) / c.divisor_of(j);
}

/// dscores[t] (all E of them) from dweight of t's rows.
template <class Rule>
struct weigh_token_backward {
  Rule rule;
  plan_pointers plan;
  matrix_view<const float> scores;  // empty: softmax over kept choices, from the weights alone
  const float* dweight;
  matrix_view<float> dscores;
  idx normed = every_choice;

  MOE_HD void operator()(dim t) const noexcept {
    float* dz = dscores.row(t);
    for (dim e = 0; e < dscores.cols; ++e) dz[e] = 0;
    if (scores)
      from_scores(static_cast<idx>(t), dz);
    else if constexpr (Rule::over == reduction::kept)
      from_weights(static_cast<idx>(t), dz);
  }

 private:
  MOE_HD void from_weights(idx t, float* dz) const noexcept {
    const idx first = plan.token_offsets[t], last = plan.token_offsets[t + 1];
    float mean = 0;
    for (idx i = first; i < last; ++i)
      if (const idx r = plan.position[i]; r >= 0) mean += plan.weight[r] * dweight[r];
    for (idx i = first; i < last; ++i)
      if (const idx r = plan.position[i]; r >= 0) dz[plan.expert_of_row(r)] = plan.weight[r] * (dweight[r] - mean);
  }
  MOE_HD void from_scores(idx t, float* dz) const noexcept {
    const choices<Rule> c(rule, plan, scores.row(t), t, normed);
    float pull = 0, sum = 0;  // of the divisor: -sum dweight_i raw_i / divisor^2
    for (idx i = c.first; i < c.normed; ++i) {
      const float raw = c.raw(i);
      sum += rule.term(raw);
      if (const idx r = plan.position[i]; r >= 0) pull += dweight[r] * raw;
    }
    pull *= rule.divisor_slope(sum) / (c.divisor * c.divisor);
    float mean = 0;
    for (idx i = c.first; i < c.last; ++i) {
      const float raw = c.raw(i);
      const idx r = plan.position[i], e = plan.expert_of(i);
      const float draw = rule.scale * ((r >= 0 ? dweight[r] / c.divisor_of(i) : 0.f) -
                                       (i < c.normed ? pull * rule.term_slope(raw) : 0.f));
      if constexpr (Rule::over == reduction::all) mean += draw * raw;
      dz[e] = draw * rule.slope(c.score(i), raw);
    }
    if constexpr (Rule::over == reduction::all)  // a softmax over all experts: each falls as the chosen rise
      for (dim e = 0; e < dscores.cols; ++e)
        if (eligible(c.z[e])) dz[e] -= mean * rule.raw(c.z[e], c.row);
  }
};

}  // namespace detail

/// plan.weight from scores, by `rule`; keeps the scores in `ctx` where it has room for them. A router that adds choices to
/// those that make up a token's norm lists them after its first `normed` ones: they weigh scale raw.
template <class B, class Rule>
void weigh(const call<B>& on, const Rule& rule, matrix_view<const float> scores, routing_plan& p, score_context& ctx,
           idx normed = detail::every_choice) noexcept {
  if (ctx.scores) copy(on, scores, ctx.scores);
  for_each_token(on, p.tokens(), detail::weigh_token<Rule>{rule, detail::plan_pointers(p), scores, normed});
}
/// dscores (=) from dweight, by `rule`.
template <class B, class Rule>
void weigh_backward(const call<B>& on, const Rule& rule, const routing_plan& p, const score_context& ctx,
                    std::span<const float> dweight, matrix_view<float> dscores, idx normed = detail::every_choice) noexcept {
  for_each_token(
      on, p.tokens(),
      detail::weigh_token_backward<Rule>{rule, detail::plan_pointers(p), ctx.scores, dweight.data(), dscores, normed});
}

}  // namespace moe
