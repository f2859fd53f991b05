// SPDX-License-Identifier: Apache-2.0
/// The usual gate: one row of logits a token.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// scores = x w^T, or x w^T + bias. Logits, weights and gradients are float32 whatever the type of the experts' weights.
///
/// weights  w[E,d]  bias[E,1]      saves  nothing      adds to  dx, dw, dbias
template <bool Biased = false>
struct basic_linear_gate {
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  struct weights {
    matrix_view<float> w, bias;  ///< no bias: empty
  };
  using weights_grad = weights;
  using context = nothing;

  void check(const weights& p, shape s) const {
    expect(p.w, s.experts, s.d, "linear_gate: w", "E x d");
    if constexpr (Biased) expect(p.bias, s.experts, 1, "linear_gate: bias", "E x 1");
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    weights p;
    p.w = mem.matrix<float>("w", s.experts, s.d);
    if constexpr (Biased) p.bias = mem.matrix<float>("bias", s.experts, 1, initial::zeros);
    return p;
  }
  void make_backward_scratch(shape, arena& mem) const noexcept {
    if constexpr (Biased) (void)mem.vector<idx>("offsets", 2);  // dense_rows
  }

  template <class B, class... Then>
  void forward(const call<B>& on, const weights& p, const input& x, matrix_view<float> scores, context&,
               const Then&... then) const noexcept {
    gemm_nt(on, x, p.w, p.bias, scores, then...);
  }
  template <class B>
  void backward(const call<B>& on, const weights& p, const input& x, const context&, matrix_view<const float> dscores,
                input_grad dx, weights_grad& dp) const noexcept {
    scratch_frame frame(on.scratch);
    if (dx) gemm_nn(on, dscores, p.w, dx);
    if (dp.w) gemm_tn(on, dscores, x, dp.w);
    if constexpr (Biased)
      if (dp.bias) sum_rows(on, dense_rows(on), gathered<float>{dscores}, matrix_stack<float>{dp.bias, 0});
  }
};

using linear_gate = basic_linear_gate<>;
/// With a bias of each expert (gpt-oss).
using biased_linear_gate = basic_linear_gate<true>;

}  // namespace moe
