// SPDX-License-Identifier: Apache-2.0
/// A bound on the rows of an expert, and which assignments give way to it.
#pragma once

#include <limits>

#include "moe/router/capacity_limit.hpp"
#include "moe/router/cut.hpp"
#include "moe/router/select.hpp"

namespace moe {

/// Who is served first by an expert without room for all; ties to the lower token.
enum class drop_order : std::uint8_t {
  choices,  ///< every first choice before any second one, within them by token
  tokens,   ///< by token alone
  score,    ///< the largest unbiased score of the rule: a probability, a sigmoid
};

/// The router R with at most C rows for an expert, C = limit(shape, k). What is beyond is dropped: it has no row, stays in
/// the plan as position = -1 - e, and is counted by `dropped(plan)`. The weights of the others stay as they were, dropped
/// choices counted in their norm; `renormalised` divides by what is left.
///
/// saves    what R saves, and the scores in any case, 4 T E bytes
/// errors   shape_error for a limit that cannot work
/// Lepikhin et al. 2020, GShard, arXiv:2006.16668; by score: Riquelme et al. 2021, arXiv:2106.05974
template <class R, class Limit = capacity_factor>
struct capacity {
  using plan = typename R::plan;
  using weights = typename R::weights;
  using weights_grad = detail::weights_grad<R>;
  using context = typename R::context;
  struct scratch {
    std::span<float> priority;  ///< of each row
    matrix_view<idx> cuts;      ///< of each expert
  };

  R inner{};
  Limit limit{};
  drop_order order = drop_order::choices;

  void check(shape s) const {
    detail::check_shape(inner, s);
    limit.check();
  }
  void check(const weights& w, shape s) const { detail::check_weights(inner, w, s); }
  dim max_rows(shape s) const noexcept { return inner.max_rows(s); }
  dim choices(shape s) const noexcept { return inner.choices(s); }
  weights make_weights(shape s, arena& mem) const noexcept { return detail::make_weights(inner, s, mem); }
  weights_grad make_gradients(shape s, arena& mem) const noexcept { return detail::make_gradients(inner, s, mem); }
  context make_context(shape s, arena& mem) const noexcept {
    context ctx = detail::make_context(inner, s, mem);
    detail::keep_scores(ctx, s, mem);
    return ctx;
  }
  scratch make_scratch(shape s, arena& mem) const noexcept {
    detail::count_scratch(inner, mem, s);
    return make_drops(s, mem);
  }
  auto make_backward_scratch(shape s, arena& mem) const noexcept
    requires requires { inner.make_backward_scratch(s, mem); }
  {
    return inner.make_backward_scratch(s, mem);
  }

  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    detail::select(on, inner, w, scores, p, ctx);
    drop(on, scores, p);
    weigh(on, w, scores, p, ctx);
  }
  template <class B>
  void weigh(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    inner.weigh(on, w, scores, p, ctx);
  }
  template <class B>
  void backward(const call<B>& on, const weights& w, const plan& p, const context& ctx, std::span<const float> dweight,
                matrix_view<float> dscores, weights_grad& dw) const noexcept {
    inner.backward(on, w, p, ctx, dweight, dscores, dw);
  }

  // What kernels are made of is public: nvcc wants to name it.
  template <class Score>
  struct rank_rows {
    detail::plan_pointers plan;
    matrix_view<const float> scores;
    drop_order order;
    float* priority;

    MOE_HD void operator()(dim t) const noexcept {
      const idx first = plan.token_offsets[t], last = plan.token_offsets[t + 1];
      row_statistics row{};
      if (Score::over == reduction::all && order == drop_order::score) row = detail::statistics(scores.row(t), plan.experts);
      for (idx i = first; i < last; ++i)
        if (const idx r = plan.position[i]; r >= 0) priority[r] = of(i - first, scores(t, plan.expert_of_row(r)), row);
    }
    MOE_HD float of(idx choice, float z, row_statistics row) const noexcept {
      if (order == drop_order::tokens) return 0;
      if (order == drop_order::choices) return -static_cast<float>(choice);
      const float s = Score{}(z, row);
      return eligible(s) ? s : least;  // NaN gives way first
    }
  };
  struct cut_rows {
    detail::plan_pointers plan;
    dim room;
    const float* priority;
    matrix_view<idx> cuts;
    MOE_HD void operator()(dim e) const noexcept {
      const float* of = priority + plan.offsets[e];
      detail::best_of(plan.offsets[e + 1] - plan.offsets[e], room, [&](idx i) { return of[i]; }).store(cuts.row(e));
    }
  };
  struct drop_rows {
    detail::plan_pointers plan;
    idx* position;
    const float* priority;
    matrix_view<const idx> cuts;
    MOE_HD void operator()(dim t) const noexcept {
      for (idx i = plan.token_offsets[t]; i < plan.token_offsets[t + 1]; ++i) {
        const idx r = position[i];
        if (r < 0) continue;
        const idx e = plan.expert_of_row(r);
        position[i] = detail::cut::load(cuts.row(e)).keeps(priority[r], r - plan.offsets[e]) ? e : -1 - e;
      }
    }
  };

 private:
  static constexpr float least = std::numeric_limits<float>::lowest();

  scratch make_drops(shape s, arena& mem) const noexcept {
    return {mem.vector<float>("priority", max_rows(s)), mem.matrix<idx>("cuts", s.experts, 2)};
  }
  template <class B>
  void drop(const call<B>& on, matrix_view<const float> scores, plan& p) const noexcept {
    scratch_frame frame(on.scratch);
    const scratch s = make_drops(on.sizes, on.scratch);
    using score = typename detail::score_of<R>::type;
    const detail::plan_pointers from(p);
    for_each_token(on, p.tokens(), rank_rows<score>{from, scores, order, s.priority.data()});
    for_each_token(on, p.experts(), cut_rows{from, limit(on.sizes, choices(on.sizes)), s.priority.data(), s.cuts});
    for_each_token(on, p.tokens(), drop_rows{from, p.position.data(), s.priority.data(), s.cuts});
    group_by_expert(on, p);
  }
};

}  // namespace moe
