// SPDX-License-Identifier: Apache-2.0
/// Feature-wise linear modulation as an expert.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// ys[r] = gamma_e * x + beta_e, elementwise. With `mix_before_trunk` the rows of a token are mixed first and pass one
/// shared trunk.
///
/// weights  gamma[E,d] beta[E,d]      saves  nothing      adds to  dx, dgamma, dbeta, dweight
/// Perez et al. 2018, arXiv:1709.07871; mixed before the trunk as in MoFME, arXiv:2312.16610, with free vectors.
struct film_expert {
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  using output = matrix_view<float>;
  struct weights { matrix_view<float> gamma, beta; };
  using weights_grad = weights;
  using context = nothing;
  struct backward_scratch { matrix_view<float> rows; };

  void check(const weights& w, shape s) const {
    expect(w.gamma, s.experts, s.d, "film_expert: gamma", "E x d");
    expect(w.beta, s.experts, s.d, "film_expert: beta", "E x d");
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    return {mem.matrix<float>("gamma", s.experts, s.d, initial::ones), mem.matrix<float>("beta", s.experts, s.d, initial::zeros)};
  }
  output make_output(shape s, dim rows, arena& mem) const noexcept { return mem.matrix<float>("ys", rows, s.d); }
  backward_scratch make_backward_scratch(shape s, dim rows, arena& mem) const noexcept {
    return {mem.matrix<float>("rows", rows, s.d)};
  }

  template <class B>
  void forward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, output ys, context&) const noexcept {
    map_rows(on, rows, ys, modulate{w.gamma, w.beta, rows.gather(x)});
  }
  template <class B>
  void backward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, const context&,
                gathered<float> dys, input_grad dx, weights_grad& dw, std::span<float> dweight) const noexcept {
    scratch_frame frame(on.scratch);
    const auto tmp = make_backward_scratch(on.sizes, rows.room(on.sizes), on.scratch).rows;
    if (!dweight.empty()) {
      map_rows(on, rows, tmp, modulate{w.gamma, w.beta, rows.gather(x)});
      dot_rows(on, rows, dys, gathered<float>{tmp}, dweight);
    }
    if (dw.beta) sum_rows(on, rows, dys, dw.beta);
    if (dw.gamma) {
      map_rows(on, rows, tmp, product{dys, rows.gather(x)});
      sum_rows(on, rows, gathered<float>{tmp}, dw.gamma);
    }
    if (!dx) return;
    map_rows(on, rows, tmp, modulate_gradient{w.gamma, dys});
    scatter_add_rows(on, rows, gathered<float>{tmp}, dx);
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct modulate {
    matrix_view<const float> gamma, beta;
    gathered<float> x;
    MOE_HD float operator()(dim e, dim r, dim j) const noexcept { return gamma(e, j) * x.row(r)[j] + beta(e, j); }
  };
  struct modulate_gradient {
    matrix_view<const float> gamma;
    gathered<float> dy;
    MOE_HD float operator()(dim e, dim r, dim j) const noexcept { return gamma(e, j) * dy.scale(r) * dy.row(r)[j]; }
  };
  struct product {
    gathered<float> dy, x;
    MOE_HD float operator()(dim, dim r, dim j) const noexcept { return dy.scale(r) * dy.row(r)[j] * x.row(r)[j]; }
  };
};

}  // namespace moe
