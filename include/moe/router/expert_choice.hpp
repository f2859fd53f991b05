// SPDX-License-Identifier: Apache-2.0
/// Experts choose their tokens.
#pragma once

#include "moe/router/capacity_limit.hpp"
#include "moe/router/cut.hpp"
#include "moe/router/select.hpp"

namespace moe {

/// Each expert takes the C tokens with its largest keys, ties to the lower token, C = min(T, ceil(factor T K / E)): the load
/// is even by construction, and a token has any number of experts, none included. The weight is the score, not
/// renormalised. The choice looks at the whole batch, so it is for training and encoders.
///
/// saves    the scores, 4 T E bytes, where the rule needs them
/// errors   shape_error when factor is not more than 0
/// Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368
template <int K, class Rule = score_rule<softmax_score>>
struct expert_choice {
  static_assert(K > 0, "moe::expert_choice: K must be at least 1");
  static constexpr bool selects_by_key = true;
  using plan = routing_plan;
  using weights = nothing;
  using context = score_context;

  double factor = 1;
  [[no_unique_address]] Rule rule{};

  void check(shape) const { limit().check(); }
  dim max_rows(shape s) const noexcept { return s.experts * limit()(s, K); }
  dim choices(shape s) const noexcept { return s.experts; }
  context make_context(shape s, arena& mem) const noexcept { return make_score_context<Rule>(s, mem); }
  key_scratch make_scratch(shape s, arena& mem) const noexcept {
    const key_scratch room{mem.matrix<float>("keys", s.tokens, s.experts)};
    scratch_frame for_assign(mem);
    (void)make_cuts(s, mem);
    return room;
  }

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
    scratch_frame frame(on.scratch);
    const matrix_view<idx> cuts = make_cuts(on.sizes, on.scratch);
    for_each_token(on, keys.cols, cut_column{keys, limit()(on.sizes, K), cuts});
    list_choices(on, p, taken{keys, cuts});
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
  struct cut_column {
    matrix_view<const float> keys;
    dim room;
    matrix_view<idx> cuts;
    MOE_HD void operator()(dim e) const noexcept {
      detail::best_of(static_cast<idx>(keys.rows), room, [&](idx t) { return keys(t, e); }).store(cuts.row(e));
    }
  };
  struct taken {
    matrix_view<const float> keys;
    matrix_view<const idx> cuts;
    MOE_HD idx count(dim t) const noexcept {
      idx n = 0;
      for (dim e = 0; e < keys.cols; ++e) n += takes(e, t);
      return n;
    }
    MOE_HD void operator()(dim t, idx* chosen) const noexcept {
      for (idx e = 0; e < keys.cols; ++e)
        if (takes(e, t)) *chosen++ = e;
    }
    MOE_HD bool takes(dim e, dim t) const noexcept {
      return detail::cut::load(cuts.row(e)).keeps(keys(t, e), static_cast<idx>(t));
    }
  };

 private:
  capacity_factor limit() const noexcept { return {.factor = factor}; }
  static matrix_view<idx> make_cuts(shape s, arena& mem) noexcept { return mem.matrix<idx>("cuts", s.experts, 2); }
};

}  // namespace moe
