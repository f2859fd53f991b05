// SPDX-License-Identifier: Apache-2.0
/// Every expert that a token scores high enough.
#pragma once

#include "moe/router/select.hpp"

namespace moe {

/// Keeps the experts whose key by the rule is at least tau, best first, ties to the lower index: any number of them, none
/// included. With `at_least_one` the best eligible expert is kept in any case.
///
/// saves    the scores, 4 T E bytes, where the rule needs them
/// errors   shape_error when tau is NaN
template <class Rule = score_rule<sigmoid_score>>
struct threshold {
  static constexpr bool selects_by_key = true;
  using plan = routing_plan;
  using weights = nothing;
  using context = score_context;

  float tau = 0.5f;
  bool at_least_one = false;
  [[no_unique_address]] Rule rule{};

  void check(shape) const {
    if (!(tau == tau)) throw shape_error("threshold: tau is NaN, expected a number");
  }
  dim max_rows(shape s) const noexcept { return s.tokens * s.experts; }
  dim choices(shape s) const noexcept { return s.experts; }
  context make_context(shape s, arena& mem) const noexcept { return make_score_context<Rule>(s, mem); }
  key_scratch make_scratch(shape s, arena& mem) const noexcept { return {mem.matrix<float>("keys", s.tokens, s.experts)}; }

  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    select(on, w, scores, p);
    weigh(on, w, scores, p, ctx);
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
    list_choices(on, p, high_enough{keys, tau, at_least_one});
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

  // What kernels are made of is public: nvcc wants to name it.
  struct high_enough {
    matrix_view<const float> keys;
    float tau;
    bool at_least_one;

    MOE_HD idx count(dim t) const noexcept {
      idx n = 0;
      for (dim e = 0; e < keys.cols; ++e) n += passes(keys(t, e));
      return n > 0 || !at_least_one ? n : idx{best(t) >= 0};
    }
    MOE_HD void operator()(dim t, idx* chosen) const noexcept {
      idx n = 0;
      for (idx e = 0; e < keys.cols; ++e) {
        if (!passes(keys(t, e))) continue;
        idx j = n++;
        for (; j > 0 && keys(t, e) > keys(t, chosen[j - 1]); --j) chosen[j] = chosen[j - 1];
        chosen[j] = e;
      }
      if (n == 0 && at_least_one && best(t) >= 0) chosen[0] = best(t);
    }

   private:
    MOE_HD bool passes(float key) const noexcept { return eligible(key) && key >= tau; }
    MOE_HD idx best(dim t) const noexcept {
      idx found = -1;
      for (idx e = 0; e < keys.cols; ++e)
        if (eligible(keys(t, e)) && (found < 0 || keys(t, e) > keys(t, found))) found = e;
      return found;
    }
  };
};

}  // namespace moe
