// SPDX-License-Identifier: Apache-2.0
/// A combine that mixes first and computes once a token.
#pragma once

#include "moe/concepts.hpp"

namespace moe {

/// s[t] = sum over t's rows of weight[r] ys[r];  y[t] = trunk(s[t]).
///
/// `Trunk` is an Expert of one that stores its rows, run over all tokens: one evaluation a token, whatever k is.
/// weights  the trunk's      saves  s[T,d] and what the trunk saves      adds to  the trunk's gradients
/// Order matters: with a trunk that is not linear, mixing after it gives another function. MoFME, arXiv:2312.16610
template <class Trunk>
struct mix_before_trunk {
  static constexpr bool weighted_rows = true;
  static constexpr bool replaces_gradients = true;  // expert_backward sees to it
  using weights = typename Trunk::weights;
  using weights_grad = detail::weights_grad<Trunk>;
  struct context {
    matrix_view<float> mixed;
    typename Trunk::context trunk;
  };

  [[no_unique_address]] Trunk trunk{};
  dim f = 0;  ///< hidden width of the trunk; 0: that of the layer

  void check(shape s) const { detail::check_shape(trunk, narrow(s)); }
  void check(const weights& w, shape s) const { detail::check_weights(trunk, w, narrow(s)); }
  weights make_weights(shape s, arena& mem) const noexcept { return detail::make_weights(trunk, narrow(s), mem); }
  weights_grad make_gradients(shape s, arena& mem) const noexcept { return detail::make_gradients(trunk, narrow(s), mem); }
  context make_context(shape s, arena& mem) const noexcept {
    return {mem.matrix<float>("mixed", s.tokens, s.d), detail::make_context(trunk, narrow(s), s.tokens, mem)};
  }
  template <class B>
  void make_scratch(const B& backend, shape s, arena& mem) const noexcept {
    (void)mem.matrix<float>("mixed", s.tokens, s.d);
    (void)mem.vector<idx>("offsets", 2);
    detail::count_scratch_on(backend, trunk, mem, narrow(s), s.tokens);
  }
  /// Leaves taken what lives until the experts have read it.
  template <class B>
  void count_backward(const B& backend, shape s, arena& mem) const noexcept {
    (void)mem.matrix<float>("dmixed", s.tokens, s.d);
    scratch_frame frame(mem);
    (void)mem.vector<idx>("offsets", 2);
    detail::count_expert_backward(backend, trunk, narrow(s), s.tokens, mem);
  }

  template <class B, class In, RowSource<typename B::arch> Rows>
    requires Expert<Trunk, B> && std::same_as<typename Trunk::output, matrix_view<float>>
  void forward(const call<B>& on, const weights& w, const In&, const routing_plan& p, const Rows& ys, matrix_view<float> y,
               context& ctx) const noexcept {
    scratch_frame frame(on.scratch);
    const auto own = on.with(narrow(on.sizes));
    const auto mixed = ctx.mixed ? ctx.mixed : on.scratch.template matrix<float>("mixed", on.sizes.tokens, on.sizes.d);
    combine_rows(on, p, ys, p.weight, mixed);
    trunk.forward(own, w, mixed, dense_rows(own), y, ctx.trunk);
  }
  template <class B, class In, class InGrad, class Rows>
    requires TrainableExpert<Trunk, B>
  void backward(const call<B>& on, const weights& w, const In&, const routing_plan& p, const Rows&, const context& ctx,
                matrix_view<const float> dy, gathered<float>& dys, InGrad&, weights_grad& dw, std::span<float>) const noexcept {
    auto dmixed = on.scratch.template matrix<float>("dmixed", on.sizes.tokens, on.sizes.d);
    scratch_frame frame(on.scratch);
    const auto own = on.with(narrow(on.sizes));
    fill(on, dmixed, 0.f);
    const typename Trunk::input in = ctx.mixed;
    detail::expert_backward(own, trunk, w, in, dense_rows(own), ctx.trunk, gathered<float>{dy}, dmixed, dw, {});
    dys = {dmixed, p.token.data(), p.weight.data()};
  }

 private:
  shape narrow(shape s) const noexcept { return {s.tokens, s.d, f > 0 ? f : s.f, 1}; }
};

}  // namespace moe
