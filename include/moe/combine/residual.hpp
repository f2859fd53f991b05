// SPDX-License-Identifier: Apache-2.0
/// A combine around which the input passes.
#pragma once

#include "moe/combine/weighted_sum.hpp"

namespace moe {

/// y = x + C(ys). A token whose every choice was dropped passes unchanged.
///
/// adds to  dx
template <class C = weighted_sum>
struct residual {
  static constexpr bool weighted_rows = detail::weighted_rows<C>;
  using weights = typename C::weights;
  using weights_grad = detail::weights_grad<C>;
  using context = typename C::context;

  [[no_unique_address]] C inner{};

  void check(shape s) const { detail::check_shape(inner, s); }
  void check(const weights& w, shape s) const { detail::check_weights(inner, w, s); }
  weights make_weights(shape s, arena& mem) const noexcept { return detail::make_weights(inner, s, mem); }
  weights_grad make_gradients(shape s, arena& mem) const noexcept { return detail::make_gradients(inner, s, mem); }
  context make_context(shape s, arena& mem) const noexcept { return detail::make_context(inner, s, mem); }
  template <class B>
  void make_scratch(const B& backend, shape s, arena& mem) const noexcept { detail::count_scratch_on(backend, inner, mem, s); }
  template <class B>
  void count_backward(const B& backend, shape s, arena& mem) const noexcept {
    detail::count_combine_backward(backend, inner, s, mem);
  }

  template <class B, class Rows>
    requires Combine<C, matrix_view<const float>, routing_plan, Rows, B>
  void forward(const call<B>& on, const weights& w, const matrix_view<const float>& x, const routing_plan& p, Rows& ys,
               matrix_view<float> y, context& ctx) const noexcept {
    inner.forward(on, w, x, p, ys, y, ctx);
    add(on, x, y);
  }
  template <class B>
    requires detail::combines_by_part<C, matrix_view<const float>, B>
  void forward_part(const call<B>& on, const weights& w, const matrix_view<const float>& x, const routing_plan& p,
                    matrix_view<float> ys, dim t, dim column, float* y, dim n) const noexcept {
    inner.forward_part(on, w, x, p, ys, t, column, y, n);
    axpy(typename B::arch{}, 1.f, x.row(t) + column, y, n);
  }
  template <class B, class Rows, class RowGradient>
    requires TrainableCombine<C, matrix_view<const float>, matrix_view<float>, routing_plan, Rows, B>
  void backward(const call<B>& on, const weights& w, const matrix_view<const float>& x, const routing_plan& p, const Rows& ys,
                const context& ctx, matrix_view<const float> dy, RowGradient& dys, matrix_view<float>& dx, weights_grad& dw,
                std::span<float> dweight) const noexcept {
    inner.backward(on, w, x, p, ys, ctx, dy, dys, dx, dw, dweight);
    if (dx) add(on, dy, dx);
  }
};

}  // namespace moe
