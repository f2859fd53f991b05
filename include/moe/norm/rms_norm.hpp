// SPDX-License-Identifier: Apache-2.0
/// Root mean square normalisation of rows, and of the heads of queries and keys.
#pragma once

#include <cmath>

#include "moe/attention/heads.hpp"
#include "moe/loss/sum_tokens.hpp"

namespace moe {

/// y = weight * (x * inverse), inverse = 1 / sqrt(mean of x_j^2 + epsilon), for every row, or for each of the n heads of a
/// row with one weight that all heads share.
///
/// weights  weight[d]      saves  inverse[T, n], 4 T n bytes      adds to  dx, dweight
/// backward dx = inverse (weight dy) - inverse^3 mean(weight dy x) x;  dweight = sum over tokens and heads of dy x inverse
/// x and dy are floats or halves; y may be x where no backward follows. In the backward of heads, dx replaces dy.
/// Zhang and Sennrich 2019, arXiv:1910.07467
struct rms_norm {
  struct weights {
    std::span<float> weight;
  };
  using weights_grad = weights;
  struct context {
    matrix_view<float> inverse;
  };
  struct backward_scratch {
    matrix_view<float> sum;
  };

  float epsilon = 1e-6f;

  void check(const weights& w, dim d, const char* what = "rms_norm: weight") const {
    expect(static_cast<dim>(w.weight.size()), d, what, "elements", "d");
  }
  weights make_weights(dim d, arena& mem) const noexcept { return {mem.vector<float>("weight", d, initial::ones)}; }
  context make_context(dim tokens, arena& mem, dim n = 1) const noexcept {
    return {mem.matrix<float>("inverse", tokens, n)};
  }
  backward_scratch make_backward_scratch(dim tokens, dim d, arena& mem) const noexcept {
    const auto sum = mem.matrix<float>("sum", 1, d);
    scratch_frame for_sum(mem);
    (void)detail::make_partial_sums(detail::token_groups(tokens, 0), d, mem);
    return {sum};
  }

  /// Rows [T,d].
  template <class B, class In, class Out>
  void forward(const call<B>& on, const weights& w, matrix_view<In> x, matrix_view<Out> y, context& ctx) const noexcept {
    forward(on, w, matrix_stack<In>{x, 0}, 1, matrix_stack<Out>{y, 0}, ctx);
  }
  /// The first n heads of [T, heads * d].
  template <class B, HeadViews X, HeadViews Y>
  void forward(const call<B>& on, const weights& w, const X& x, dim n, const Y& y, context& ctx) const noexcept {
    for_each_token(on, x[0].rows, normalise<X, Y>{w.weight.data(), x, n, y, ctx.inverse, epsilon});
  }

  /// Adds to dx.
  template <class B, class In, class Grad>
  void backward(const call<B>& on, const weights& w, matrix_view<In> x, const context& ctx, matrix_view<Grad> dy,
                matrix_view<float> dx, weights_grad& dw) const noexcept {
    const matrix_stack<In> xs{x, 0};
    const matrix_stack<Grad> dys{dy, 0};
    add_weight_gradient(on, xs, 1, ctx, dys, dw);
    if (dx)
      for_each_token(on, x.rows,
                     differentiate<matrix_stack<In>, matrix_stack<Grad>, matrix_stack<float>, true>{
                         w.weight.data(), xs, 1, ctx.inverse, dys, {dx, 0}});
  }
  /// The gradients of the outputs of n heads become those of their inputs.
  template <class B, HeadViews X, HeadViews Y>
  void backward_in_place(const call<B>& on, const weights& w, const X& x, dim n, const context& ctx, const Y& dy,
                         weights_grad& dw) const noexcept {
    add_weight_gradient(on, x, n, ctx, dy, dw);
    for_each_token(on, x[0].rows, differentiate<X, Y, Y, false>{w.weight.data(), x, n, ctx.inverse, dy, dy});
  }

  // What kernels are made of is public: nvcc wants to name it.
  template <class X, class Y>
  struct normalise {
    const float* weight;
    X x;
    dim n;
    Y y;
    matrix_view<float> inverse;
    float epsilon;
    MOE_HD void operator()(dim t) const noexcept {
      for (dim a = 0; a < n; ++a) {
        const auto in = x[a];
        const auto* from = in.row(t);
        auto* to = y[a].row(t);
        const float square = detail::sum_of(in.cols, [from](dim j) {
          const float v = static_cast<float>(from[j]);
          return v * v;
        });
        const float by = 1.f / std::sqrt(square / static_cast<float>(in.cols) + epsilon);
        if (inverse) inverse(t, a) = by;
        for (dim j = 0; j < in.cols; ++j) to[j] = output<Y>(weight[j] * (static_cast<float>(from[j]) * by));
      }
    }
  };
  template <class X, class Y, class Z, bool Adds>
  struct differentiate {
    const float* weight;
    X x;
    dim n;
    matrix_view<const float> inverse;
    Y dy;
    Z dx;
    MOE_HD void operator()(dim t) const noexcept {
      for (dim a = 0; a < n; ++a) {
        const auto in = x[a];
        const auto* from = in.row(t);
        const auto* grad = dy[a].row(t);
        auto* to = dx[a].row(t);
        const float *scale = weight, by = inverse(t, a);
        const float inner = detail::sum_of(in.cols, [scale, grad, from](dim j) {
          return scale[j] * static_cast<float>(grad[j]) * static_cast<float>(from[j]);
        });
        const float along = inner * by * by / static_cast<float>(in.cols);
        for (dim j = 0; j < in.cols; ++j) {
          const float own = by * (weight[j] * static_cast<float>(grad[j]) - along * static_cast<float>(from[j]));
          if constexpr (Adds)
            to[j] += own;
          else
            to[j] = output<Z>(own);
        }
      }
    }
  };
  template <class X, class Y>
  struct weight_terms {
    X x;
    dim n;
    matrix_view<const float> inverse;
    Y dy;
    MOE_HD void operator()(dim t, float* sum) const noexcept {
      for (dim a = 0; a < n; ++a) {
        const auto in = x[a];
        const auto* from = in.row(t);
        const auto* grad = dy[a].row(t);
        const float by = inverse(t, a);
        for (dim j = 0; j < in.cols; ++j) sum[j] += static_cast<float>(grad[j]) * (static_cast<float>(from[j]) * by);
      }
    }
  };

 private:
  template <class Y>
  using output = std::remove_cvref_t<decltype(std::declval<const Y&>()[0](0, 0))>;

  template <class B, class X, class Y>
  void add_weight_gradient(const call<B>& on, const X& x, dim n, const context& ctx, const Y& dy,
                           weights_grad& dw) const noexcept {
    if (dw.weight.empty()) return;
    const dim d = static_cast<dim>(dw.weight.size());
    scratch_frame frame(on.scratch);
    const matrix_view<float> sum = on.scratch.template matrix<float>("sum", 1, d);
    detail::sum_tokens(on, detail::token_groups(x[0].rows, 0), weight_terms<X, Y>{x, n, ctx.inverse, dy}, sum);
    add(on, sum, matrix_view<float>{dw.weight.data(), 1, d});
  }
};

}  // namespace moe
