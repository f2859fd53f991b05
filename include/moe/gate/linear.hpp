// SPDX-License-Identifier: Apache-2.0
/// The usual gate: one row of logits a token.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// scores = x w^T, or x w^T + bias. Logits are float32 whatever the type of the tokens, and so are weights and gradients;
/// tokens of another type are converted once, into scratch.
///
/// weights  w[E,d]  bias[E,1]      saves  nothing      adds to  dx, dw, dbias
template <class Token = float, bool Biased = false>
struct basic_linear_gate {
  using input = matrix_view<const Token>;
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
  /// The tokens in float.
  matrix_view<float> make_scratch(shape s, arena& mem) const noexcept {
    return converts ? mem.matrix<float>("x", s.tokens, s.d) : matrix_view<float>{};
  }
  void make_backward_scratch(shape s, arena& mem) const noexcept {
    (void)make_scratch(s, mem);
    if constexpr (Biased) (void)mem.vector<idx>("offsets", 2);  // dense_rows
  }

  template <class B>
  void forward(const call<B>& on, const weights& p, const input& x, matrix_view<float> scores, context&) const noexcept {
    scratch_frame frame(on.scratch);
    gemm_nt(on, in_float(on, x), p.w, p.bias, scores);
  }
  template <class B>
  void backward(const call<B>& on, const weights& p, const input& x, const context&, matrix_view<const float> dscores,
                input_grad dx, weights_grad& dp) const noexcept {
    scratch_frame frame(on.scratch);
    if (dx) gemm_nn(on, dscores, p.w, dx);
    if (dp.w) gemm_tn(on, dscores, in_float(on, x), dp.w);
    if constexpr (Biased)
      if (dp.bias) sum_rows(on, dense_rows(on), gathered<float>{dscores}, matrix_stack<float>{dp.bias, 0});
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct convert_token {
    input x;
    matrix_view<float> to;
    MOE_HD void operator()(dim t) const noexcept {
      for (dim j = 0; j < to.cols; ++j) to(t, j) = static_cast<float>(x(t, j));
    }
  };

 private:
  static constexpr bool converts = !std::same_as<Token, float>;

  template <class B>
  matrix_view<const float> in_float(const call<B>& on, const input& x) const noexcept {
    if constexpr (converts) {
      const matrix_view<float> to = make_scratch(on.sizes, on.scratch);
      for_each_token(on, to.rows, convert_token{x, to});
      return to;
    } else {
      return x;
    }
  }
};

using linear_gate = basic_linear_gate<>;
/// With a bias of each expert (gpt-oss).
using biased_linear_gate = basic_linear_gate<float, true>;

}  // namespace moe
