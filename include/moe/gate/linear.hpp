// SPDX-License-Identifier: Apache-2.0
/// The usual gate: one row of logits a token.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// scores = x w^T
///
/// weights  w[E,d]      saves  nothing      adds to  dx, dw
struct linear_gate {
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  struct weights { matrix_view<float> w; };
  using weights_grad = weights;
  using context = nothing;

  void check(const weights& p, shape s) const { expect(p.w, s.experts, s.d, "linear_gate: w", "E x d"); }
  weights make_weights(shape s, arena& mem) const noexcept { return {mem.matrix<float>("w", s.experts, s.d)}; }

  template <class B>
  void forward(const call<B>& on, const weights& p, const input& x, matrix_view<float> scores, context&) const noexcept {
    gemm_nt(on, x, p.w, {}, scores);
  }
  template <class B>
  void backward(const call<B>& on, const weights& p, const input& x, const context&, matrix_view<const float> dscores,
                input_grad dx, weights_grad& dp) const noexcept {
    if (dx) gemm_nn(on, dscores, p.w, dx);
    if (dp.w) gemm_tn(on, dscores, x, dp.w);
  }
};

}  // namespace moe
