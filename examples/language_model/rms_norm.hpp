// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <span>

#include "moe/core/call.hpp"

namespace demo {

/// y[t] = gain * x[t] / rms(x[t]), rms(v) = sqrt(mean of v_j^2 + epsilon)
///
/// weights  gain[d]      saves  inverse[T] = 1 / rms(x[t])      adds to  dx, dgain
/// Zhang and Sennrich 2019, arXiv:1910.07467
struct rms_norm {
  static constexpr float epsilon = 1e-5f;

  struct weights { std::span<float> gain; };
  struct context { std::span<float> inverse; };

  weights make_weights(moe::dim d, moe::arena& mem) const noexcept {
    return {mem.vector<float>("gain", d, moe::initial::ones)};
  }
  context make_context(moe::dim tokens, moe::arena& mem) const noexcept { return {mem.vector<float>("inverse", tokens)}; }

  template <class B>
  void forward(const moe::call<B>& on, const weights& w, moe::matrix_view<const float> x, moe::matrix_view<float> y,
               context& ctx) const noexcept {
    for_each_token(on, x.rows, [&](moe::dim t) {
      const float *in = x.row(t), *gain = w.gain.data();
      const float inverse = 1.f / std::sqrt(dot(typename B::arch{}, in, in, x.cols) / static_cast<float>(x.cols) + epsilon);
      float* out = y.row(t);
      for (moe::dim j = 0; j < x.cols; ++j) out[j] = gain[j] * in[j] * inverse;
      ctx.inverse[static_cast<std::size_t>(t)] = inverse;
    });
  }
  /// dx += inverse * (gain * dy) - inverse^3 * mean of (gain * dy * x) * x
  template <class B>
  void backward(const moe::call<B>& on, const weights& w, moe::matrix_view<const float> x, const context& ctx,
                moe::matrix_view<const float> dy, moe::matrix_view<float> dx, weights& dw) const noexcept {
    for_each_token(on, x.rows, [&](moe::dim t) {
      const float *in = x.row(t), *grad = dy.row(t), *gain = w.gain.data();
      const float inverse = ctx.inverse[static_cast<std::size_t>(t)];
      float along = 0;
      for (moe::dim j = 0; j < x.cols; ++j) along += gain[j] * grad[j] * in[j];
      along *= inverse * inverse / static_cast<float>(x.cols);
      float* out = dx.row(t);
      for (moe::dim j = 0; j < x.cols; ++j) out[j] += inverse * (gain[j] * grad[j] - along * in[j]);
    });
    on.executor().for_each(x.cols, 16, [&](moe::dim j0, moe::dim j1) {
      for (moe::dim t = 0; t < x.rows; ++t)
        for (moe::dim j = j0; j < j1; ++j)
          dw.gain[static_cast<std::size_t>(j)] += dy(t, j) * x(t, j) * ctx.inverse[static_cast<std::size_t>(t)];
    });
  }
};

}  // namespace demo
