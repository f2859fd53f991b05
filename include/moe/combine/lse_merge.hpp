// SPDX-License-Identifier: Apache-2.0
/// The combine of block attention.
#pragma once

#include <cmath>

#include "moe/attention/input.hpp"

namespace moe {

/// Joins a token's partial softmaxes exactly: y = sum of w_r o_r with w = softmax of the token's lse.
/// A token without rows, or whose rows saw no key, gives 0.
///
/// Not a sum by plan weights: the layer keeps the rows for backward.
/// dys: do_r = w_r dy, dlse_r = w_r (<dy, o_r> - sum of w_i <dy, o_i>)
struct lse_merge {
  using weights = nothing;
  using context = nothing;

  template <class B, class In>
  void forward(const call<B>& on, const weights&, const In&, const routing_plan& p, const attention_rows& ys,
               matrix_view<float> y, context&) const noexcept {
    for_each_token(on, p.tokens(), merge<typename B::arch>{p.token_offsets.data(), p.position.data(), ys, y});
  }
  template <class B, class In, class InGrad>
  void backward(const call<B>& on, const weights&, const In&, const routing_plan& p, const attention_rows& ys, const context&,
                matrix_view<const float> dy, attention_rows& dys, InGrad&, weights&, std::span<float>) const noexcept {
    for_each_token(on, p.tokens(), split<typename B::arch>{p.token_offsets.data(), p.position.data(), ys, dy, dys});
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct shares {
    float largest, sum;
    MOE_HD float operator()(float lse) const noexcept { return std::exp(lse - largest) / sum; }
  };
  MOE_HD static shares softmax(const idx* position, idx first, idx last, const attention_rows& ys) noexcept {
    float largest = -detail::infinity, sum = 0;
    for (idx i = first; i < last; ++i)
      if (const idx r = position[i]; r >= 0 && ys.lse(r, 0) > largest) largest = ys.lse(r, 0);
    if (!(largest > -detail::infinity)) return {0, 1};  // every w_r is exp(-inf) = 0
    for (idx i = first; i < last; ++i)
      if (const idx r = position[i]; r >= 0) sum += std::exp(ys.lse(r, 0) - largest);
    return {largest, sum};
  }
  template <class Arch>
  struct merge {
    const idx *token_offsets, *position;
    attention_rows ys;
    matrix_view<float> y;
    MOE_HD void operator()(dim t) const noexcept {
      const idx first = token_offsets[t], last = token_offsets[t + 1];
      const shares w = softmax(position, first, last, ys);
      for (dim j = 0; j < y.cols; ++j) y(t, j) = 0;
      for (idx i = first; i < last; ++i)
        if (const idx r = position[i]; r >= 0) axpy(Arch{}, w(ys.lse(r, 0)), ys.o.row(r), y.row(t), y.cols);
    }
  };
  template <class Arch>
  struct split {
    const idx *token_offsets, *position;
    attention_rows ys;
    matrix_view<const float> dy;
    attention_rows dys;
    MOE_HD void operator()(dim t) const noexcept {
      const idx first = token_offsets[t], last = token_offsets[t + 1];
      const shares w = softmax(position, first, last, ys);
      float mean = 0;
      for (idx i = first; i < last; ++i)
        if (const idx r = position[i]; r >= 0) mean += w(ys.lse(r, 0)) * part(t, r);
      for (idx i = first; i < last; ++i)
        if (const idx r = position[i]; r >= 0) {
          const float own = w(ys.lse(r, 0));
          dys.lse(r, 0) = own * (part(t, r) - mean);
          for (dim j = 0; j < dy.cols; ++j) dys.o(r, j) = own * dy(t, j);
        }
    }
    MOE_HD float part(dim t, dim r) const noexcept { return dot(Arch{}, dy.row(t), ys.o.row(r), dy.cols); }
  };
};

}  // namespace moe
