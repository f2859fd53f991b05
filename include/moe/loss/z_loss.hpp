// SPDX-License-Identifier: Apache-2.0
/// A loss that keeps logits small.
#pragma once

#include "moe/loss/sum_tokens.hpp"
#include "moe/loss/with_loss.hpp"

namespace moe {

/// loss = coefficient mean_t(log sum_e exp(scores[t,e])^2)
///
/// Tokens without an eligible expert (padding, all scores -inf) do not count.
/// saves    three values
/// Zoph et al. 2022, ST-MoE, arXiv:2202.08906
struct z_loss {
  float coefficient = 1e-3f;

  struct context : loss_value {
    matrix_view<float> sums;  ///< [1,2] of the squares; tokens
  };

  context make_context(shape, arena& mem) const noexcept {
    return {{mem.matrix<float>("loss", 1, 1).data}, mem.matrix<float>("sums", 1, 2)};
  }
  matrix_view<float> make_scratch(shape s, arena& mem) const noexcept {
    return detail::make_partial_sums({s.tokens, 0}, 2, mem);
  }

  template <class B>
  void measure(const call<B>& on, const routed_tokens& r, context& ctx) const noexcept {
    detail::sum_tokens(on, {r.scores.rows, 0}, observe{r.scores}, ctx.sums);
    for_each_token(on, 1, finish{coefficient, ctx.sums, ctx.memory});
  }
  template <class B>
  void add_gradient(const call<B>& on, matrix_view<const float> scores, const context& ctx,
                    matrix_view<float> dscores) const noexcept {
    for_each_token(on, scores.rows, differentiate{coefficient, scores, ctx.sums, dscores});
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct observe {
    matrix_view<const float> scores;
    MOE_HD void operator()(dim t, float* sums) const noexcept {
      const row_statistics row = detail::statistics(scores.row(t), static_cast<idx>(scores.cols));
      if (!eligible(row.largest)) return;
      const float z = row.largest + std::log(row.sum);
      sums[0] += z * z;
      sums[1] += 1;
    }
  };
  struct finish {
    float coefficient;
    matrix_view<const float> sums;
    float* value;
    MOE_HD void operator()(dim) const noexcept { *value = sums(0, 1) > 0 ? coefficient * sums(0, 0) / sums(0, 1) : 0.f; }
  };
  struct differentiate {
    float coefficient;
    matrix_view<const float> scores, sums;
    matrix_view<float> dscores;
    MOE_HD void operator()(dim t) const noexcept {
      const float* z = scores.row(t);
      const row_statistics row = detail::statistics(z, static_cast<idx>(scores.cols));
      if (!eligible(row.largest)) return;
      const float pull = 2 * coefficient * (row.largest + std::log(row.sum)) / sums(0, 1);
      for (dim e = 0; e < scores.cols; ++e)
        if (eligible(z[e])) dscores(t, e) += pull * softmax_score{}(z[e], row);
    }
  };
};

}  // namespace moe
