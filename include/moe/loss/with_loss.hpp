// SPDX-License-Identifier: Apache-2.0
/// A router with an auxiliary loss on its routing.
#pragma once

#include "moe/router/select.hpp"

namespace moe {

/// What a loss looks at.
struct routed_tokens {
  matrix_view<const float> scores;
  const routing_plan& plan;
  dim choices;  ///< k
};

/// The value of a loss in its context, its coefficient applied; 0 in an inference context. It lies in the memory of the
/// backend, so `value()` is for the host.
struct loss_value {
  float* memory = nullptr;
  float value() const noexcept { return memory ? *memory : 0.f; }
};

/// The routing of R; forward leaves the loss in `ctx.router.loss.value()`, backward adds its gradient, so a training loop
/// adds the value to what it reports and nothing else. Losses stack: with_loss<with_loss<R, A>, B> has A's value in
/// `ctx.router.inner.loss`. Measured in training contexts alone, before replayed assignments as well as chosen ones.
///
/// A loss L is a struct with `context`, `make_context(shape, arena)`, `make_scratch(shape, arena)` and
///
///   measure(on, tokens, ctx)                 the value, and what backward needs of the whole batch
///   add_gradient(on, scores, ctx, dscores)   dscores[T,E] +=, or where it says `on_weights`
///   add_gradient(on, plan, ctx, dweight)     dweight[A] +=, before the router's own backward
///
/// saves    what R saves, what L saves, and the scores in any case, 4 T E bytes
template <class R, class L>
struct with_loss {
  using plan = typename R::plan;
  using weights = typename R::weights;
  using weights_grad = detail::weights_grad<R>;
  struct context {
    typename R::context inner;
    typename L::context loss;
    matrix_view<float> scores;  ///< the router's own where it keeps them
  };

  R inner{};
  L loss{};

  void check(shape s) const {
    detail::check_shape(inner, s);
    if constexpr (requires { loss.check(s); }) loss.check(s);
  }
  void check(const weights& w, shape s) const { detail::check_weights(inner, w, s); }
  dim max_rows(shape s) const noexcept { return inner.max_rows(s); }
  dim choices(shape s) const noexcept { return inner.choices(s); }
  weights make_weights(shape s, arena& mem) const noexcept { return detail::make_weights(inner, s, mem); }
  weights_grad make_gradients(shape s, arena& mem) const noexcept { return detail::make_gradients(inner, s, mem); }
  context make_context(shape s, arena& mem) const noexcept {
    context ctx{detail::make_context(inner, s, mem), loss.make_context(s, mem), {}};
    if constexpr (!on_weights) {
      ctx.scores = detail::kept_scores(ctx.inner);
      if (ctx.scores.cols == 0) ctx.scores = mem.matrix<float>("scores", s.tokens, s.experts);
    }
    return ctx;
  }
  void make_scratch(shape s, arena& mem) const noexcept {
    detail::count_scratch(inner, mem, s);
    detail::count_scratch(loss, mem, s);
  }
  std::span<float> make_backward_scratch(shape s, arena& mem) const noexcept {
    const auto own = make_row_gradient(s, mem);
    detail::count_backward_scratch(inner, mem, s);
    return own;
  }

  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    inner.forward(on, w, scores, p, ctx.inner);
    measure(on, scores, p, ctx);
  }
  template <class B>
  void weigh(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    inner.weigh(on, w, scores, p, ctx.inner);
    measure(on, scores, p, ctx);
  }
  template <class B>
  void backward(const call<B>& on, const weights& w, const plan& p, const context& ctx, std::span<const float> dweight,
                matrix_view<float> dscores, weights_grad& dw) const noexcept {
    scratch_frame frame(on.scratch);
    if constexpr (on_weights) {
      const std::span<float> both = make_row_gradient(on.sizes, on.scratch);
      const auto as_row = [](auto v) { return matrix_view(v.data(), 1, static_cast<dim>(v.size())); };
      copy(on, as_row(dweight), as_row(both));
      loss.add_gradient(on, p, ctx.loss, both);
      inner.backward(on, w, p, ctx.inner, both, dscores, dw);
    } else {
      inner.backward(on, w, p, ctx.inner, dweight, dscores, dw);
      loss.add_gradient(on, matrix_view<const float>(ctx.scores), ctx.loss, dscores);
    }
  }

 private:
  static constexpr bool on_weights = requires { L::on_weights; };

  std::span<float> make_row_gradient(shape s, arena& mem) const noexcept {
    return on_weights ? mem.vector<float>("dweight", max_rows(s)) : std::span<float>{};
  }
  template <class B>
  void measure(const call<B>& on, matrix_view<const float> scores, const plan& p, context& ctx) const noexcept {
    if (!ctx.loss.memory) return;
    if (ctx.scores && ctx.scores.data != detail::kept_scores(ctx.inner).data) copy(on, scores, ctx.scores);
    loss.measure(on, routed_tokens{scores, p, choices(on.sizes)}, ctx.loss);
  }
};

}  // namespace moe
