// SPDX-License-Identifier: Apache-2.0
/// The usual combine, with the weights or without.
#pragma once

#include "moe/concepts.hpp"

namespace moe {

/// y[t] = sum over t's rows of weight[r] ys[r], in the order of its choices. A token without rows gives 0.
///
/// Keeps no row: backward lets the experts gather dy and weigh it.
template <bool Weighed>
struct basic_sum {
  static constexpr bool weighted_rows = true;
  using weights = nothing;
  using context = nothing;

  template <class B, class In, RowSource<typename B::arch> Rows>
  void forward(const call<B>& on, const weights&, const In&, const routing_plan& p, const Rows& ys, matrix_view<float> y,
               context&) const noexcept {
    combine_rows(on, p, ys, weight_of(p), y);
  }
  template <class B, class In>
  void forward_part(const call<B>& on, const weights&, const In&, const routing_plan& p, matrix_view<float> ys, dim t,
                    dim column, float* y, dim n) const noexcept {
    combine_row(on, p, ys.columns(column, n), weight_of(p), t, y, n);
  }
  template <class B, class In, class InGrad, class Rows>
  void backward(const call<B>&, const weights&, const In&, const routing_plan& p, const Rows&, const context&,
                matrix_view<const float> dy, gathered<float>& dys, InGrad&, weights&, std::span<float>) const noexcept {
    dys = {dy, p.token.data(), weight_of(p).data()};
  }

 private:
  static std::span<const float> weight_of(const routing_plan& p) noexcept {
    return Weighed ? std::span<const float>(p.weight) : std::span<const float>();
  }
};

using weighted_sum = basic_sum<true>;
/// For experts that have weighed their input already (expert/weigh_input.hpp).
using unweighted_sum = basic_sum<false>;

}  // namespace moe
