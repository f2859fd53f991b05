// SPDX-License-Identifier: Apache-2.0
/// Weights that sum to one over what was kept.
#pragma once

#include "moe/router/select.hpp"

namespace moe {

/// The router R with the weights of each token divided by max(sum, 2^-23), the sum over its rows: around `capacity`, over
/// the survivors.
///
/// saves    what R saves, the scores in any case, and the sums, 4 T bytes
template <class R>
struct renormalised {
  using plan = typename R::plan;
  using weights = typename R::weights;
  using weights_grad = detail::weights_grad<R>;
  struct context {
    typename R::context inner;
    std::span<float> sums;  ///< [T] what the weights were divided by
  };

  R inner{};

  void check(shape s) const { detail::check_shape(inner, s); }
  void check(const weights& w, shape s) const { detail::check_weights(inner, w, s); }
  dim max_rows(shape s) const noexcept { return inner.max_rows(s); }
  dim choices(shape s) const noexcept { return inner.choices(s); }
  weights make_weights(shape s, arena& mem) const noexcept { return detail::make_weights(inner, s, mem); }
  weights_grad make_gradients(shape s, arena& mem) const noexcept { return detail::make_gradients(inner, s, mem); }
  context make_context(shape s, arena& mem) const noexcept {
    context ctx{detail::make_context(inner, s, mem), mem.vector<float>("sums", s.tokens)};
    detail::keep_scores(ctx, s, mem);  // the plan's weights are no longer those of the router
    return ctx;
  }
  auto make_scratch(shape s, arena& mem) const noexcept
    requires requires { inner.make_scratch(s, mem); }
  {
    return inner.make_scratch(s, mem);
  }
  std::span<float> make_backward_scratch(shape s, arena& mem) const noexcept {
    const auto own = make_row_gradient(s, mem);
    detail::count_backward_scratch(inner, mem, s);
    return own;
  }

  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    inner.forward(on, w, scores, p, ctx.inner);
    divide(on, p, ctx);
  }
  template <class B>
  void weigh(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    inner.weigh(on, w, scores, p, ctx.inner);
    divide(on, p, ctx);
  }
  /// With w' = w / S: dw_j = (dw'_j - sum dw'_i w'_i) / S, without the sum where S is the floor.
  template <class B>
  void backward(const call<B>& on, const weights& w, const plan& p, const context& ctx, std::span<const float> dweight,
                matrix_view<float> dscores, weights_grad& dw) const noexcept {
    scratch_frame frame(on.scratch);
    const std::span<float> before = make_row_gradient(on.sizes, on.scratch);
    for_each_token(on, p.tokens(), undo{detail::plan_pointers(p), ctx.sums.data(), dweight.data(), before.data()});
    inner.backward(on, w, p, ctx.inner, before, dscores, dw);
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct divide_token {
    detail::plan_pointers plan;
    float* sums;  // or null
    MOE_HD void operator()(dim t) const noexcept {
      const idx first = plan.token_offsets[t], last = plan.token_offsets[t + 1];
      float sum = 0;
      for (idx i = first; i < last; ++i)
        if (const idx r = plan.position[i]; r >= 0) sum += plan.weight[r];
      if (sum < least) sum = least;  // a NaN stays
      for (idx i = first; i < last; ++i)
        if (const idx r = plan.position[i]; r >= 0) plan.weight[r] /= sum;
      if (sums) sums[t] = sum;
    }
  };
  struct undo {
    detail::plan_pointers plan;
    const float *sums, *dweight;
    float* before;
    MOE_HD void operator()(dim t) const noexcept {
      const idx first = plan.token_offsets[t], last = plan.token_offsets[t + 1];
      float mean = 0;
      for (idx i = first; i < last; ++i)
        if (const idx r = plan.position[i]; r >= 0 && sums[t] > least) mean += dweight[r] * plan.weight[r];
      for (idx i = first; i < last; ++i)
        if (const idx r = plan.position[i]; r >= 0) before[r] = (dweight[r] - mean) / sums[t];
    }
  };

 private:
  static constexpr float least = std::numeric_limits<float>::epsilon();

  std::span<float> make_row_gradient(shape s, arena& mem) const noexcept {
    return mem.vector<float>("dweight", max_rows(s));
  }
  template <class B>
  static void divide(const call<B>& on, plan& p, context& ctx) noexcept {
    for_each_token(on, p.tokens(), divide_token{detail::plan_pointers(p), ctx.sums.data()});
  }
};

}  // namespace moe
