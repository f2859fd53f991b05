// SPDX-License-Identifier: Apache-2.0
/// A loss that is least where every expert has the same weight in the output.
#pragma once

#include "moe/loss/with_loss.hpp"

namespace moe {

/// loss = coefficient var(I) / (mean(I)^2 + 1e-10), I_e = sum of the combine weights of expert e's rows, the variance
/// unbiased; 0 for one expert. Its gradient goes to the weights, not around them.
///
/// saves    I[E] and one value
/// Shazeer et al. 2017, arXiv:1701.06538
struct importance {
  static constexpr bool on_weights = true;
  float coefficient = 1e-2f;

  struct context : loss_value {
    matrix_view<float> pull;  ///< [1,E] dloss / dI_e
  };

  context make_context(shape s, arena& mem) const noexcept {
    return {{mem.matrix<float>("loss", 1, 1).data}, mem.matrix<float>("pull", 1, s.experts)};
  }

  template <class B>
  void measure(const call<B>& on, const routed_tokens& r, context& ctx) const noexcept {
    for_each_token(on, ctx.pull.cols, sum_weights{detail::plan_pointers(r.plan), ctx.pull});
    for_each_token(on, 1, finish{coefficient, ctx.pull, ctx.memory});
  }
  template <class B>
  void add_gradient(const call<B>& on, const routing_plan& p, const context& ctx, std::span<float> dweight) const noexcept {
    for_each_row(on, p.all(), differentiate{ctx.pull, dweight.data()});
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct sum_weights {
    detail::plan_pointers plan;
    matrix_view<float> sums;
    MOE_HD void operator()(dim e) const noexcept {
      double sum = 0;
      for (idx r = plan.offsets[e]; r < plan.offsets[e + 1]; ++r) sum += plan.weight[r];
      sums(0, e) = static_cast<float>(sum);
    }
  };
  struct finish {
    float coefficient;
    matrix_view<float> pull;  // I on entry
    float* value;
    MOE_HD void operator()(dim) const noexcept {
      const double E = static_cast<double>(pull.cols);
      double mean = 0, variance = 0;
      for (dim e = 0; e < pull.cols; ++e) mean += pull(0, e) / E;
      for (dim e = 0; e < pull.cols; ++e) variance += (pull(0, e) - mean) * (pull(0, e) - mean);
      variance = E > 1 ? variance / (E - 1) : 0;
      const double square = mean * mean + 1e-10;
      *value = static_cast<float>(coefficient * variance / square);
      for (dim e = 0; e < pull.cols; ++e) {
        const double spread = E > 1 ? (pull(0, e) - mean) / (E - 1) : 0;
        pull(0, e) = static_cast<float>(2 * coefficient / square * (spread - variance / square * mean / E));
      }
    }
  };
  struct differentiate {
    matrix_view<const float> pull;
    float* dweight;
    MOE_HD void operator()(dim e, dim r) const noexcept { dweight[r] += pull(0, e); }
  };
};

}  // namespace moe
