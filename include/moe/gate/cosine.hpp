// SPDX-License-Identifier: Apache-2.0
/// A gate that compares directions.
#pragma once

#include <cmath>

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// scores[t,e] = min(exp(log_scale), 100) <u_t, m_e> / (max(|u_t|, 1e-12) max(|m_e|, 1e-12)), u = x project^T
///
/// weights  project[p,d]  directions[E,p]  log_scale[1,1]      saves  u / |u| and |u|, 4 T (p + 1) bytes
/// adds to  dx and all three
/// errors   shape_error when width is below 1
/// Chi et al. 2022, X-MoE, arXiv:2204.09179; as in Tutel, arXiv:2206.03382
struct cosine_gate {
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  struct weights {
    matrix_view<float> project, directions, log_scale;
  };
  using weights_grad = weights;
  struct rows {  ///< of unit length, and the length they had
    matrix_view<float> unit, length;
  };
  struct context {
    rows tokens;  ///< [T,p] and [T,1]
  };

  dim width = 256;  ///< p

  void check(shape) const {
    if (width < 1) throw shape_error("cosine_gate: width is " + std::to_string(width) + ", expected at least 1");
  }
  void check(const weights& p, shape s) const {
    expect(p.project, width, s.d, "cosine_gate: project", "p x d");
    expect(p.directions, s.experts, width, "cosine_gate: directions", "E x p");
    expect(p.log_scale, 1, 1, "cosine_gate: log_scale", "1 x 1");
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    const auto project = mem.matrix<float>("project", width, s.d);
    const auto directions = mem.matrix<float>("directions", s.experts, width);
    return {project, directions, mem.matrix<float>("log_scale", 1, 1, initial::ones)};
  }
  context make_context(shape s, arena& mem) const noexcept { return {make_rows(s.tokens, mem)}; }
  void make_scratch(shape s, arena& mem) const noexcept {
    (void)make_rows(s.experts, mem);
    (void)make_rows(s.tokens, mem);
  }
  struct backward_scratch {
    rows directions;
    rows dtokens;  ///< length: the share of the scale
    matrix_view<float> ddirections, dcosine;
  };
  backward_scratch make_backward_scratch(shape s, arena& mem) const noexcept {
    const rows directions = make_rows(s.experts, mem), dtokens = make_rows(s.tokens, mem);
    const auto ddirections = mem.matrix<float>("ddirections", s.experts, width);
    const auto dcosine = mem.matrix<float>("dcosine", s.tokens, s.experts);
    scratch_frame for_sum(mem);
    (void)mem.vector<idx>("offsets", 2);
    return {directions, dtokens, ddirections, dcosine};
  }

  template <class B>
  void forward(const call<B>& on, const weights& p, const input& x, matrix_view<float> scores, context& ctx) const noexcept {
    scratch_frame frame(on.scratch);
    const rows directions = unit_directions(on, p, make_rows(p.directions.rows, on.scratch));
    const rows tokens = ctx.tokens.unit ? ctx.tokens : make_rows(x.rows, on.scratch);
    gemm_nt(on, x, p.project, {}, tokens.unit);
    for_each_token(on, x.rows, normalise{tokens});
    gemm_nt(on, tokens.unit, directions.unit, {}, scores);
    for_each_token(on, x.rows, rescale{p.log_scale, scores, scores});
  }
  template <class B>
  void backward(const call<B>& on, const weights& p, const input& x, const context& ctx, matrix_view<const float> dscores,
                input_grad dx, weights_grad& dp) const noexcept {
    scratch_frame frame(on.scratch);
    const backward_scratch s = make_backward_scratch(on.sizes, on.scratch);
    const rows directions = unit_directions(on, p, s.directions);
    for_each_token(on, x.rows, rescale{p.log_scale, dscores, s.dcosine});
    fill(on, s.dtokens.unit, 0.f);
    gemm_nn(on, s.dcosine, directions.unit, s.dtokens.unit);
    for_each_token(on, x.rows, differentiate{ctx.tokens, s.dtokens.unit, s.dtokens.length});
    if (dp.directions) {
      fill(on, s.ddirections, 0.f);
      gemm_tn(on, s.dcosine, ctx.tokens.unit, s.ddirections);
      for_each_token(on, p.directions.rows, differentiate{directions, s.ddirections, {}});
      add(on, s.ddirections, dp.directions);
    }
    if (dp.log_scale) add_scale_gradient(on, p, s.dtokens.length, dp.log_scale);
    if (dx) gemm_nn(on, s.dtokens.unit, p.project, dx);
    if (dp.project) gemm_tn(on, s.dtokens.unit, x, dp.project);
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct normalise {
    rows of;
    MOE_HD void operator()(dim r) const noexcept {
      double square = 0;
      for (dim j = 0; j < of.unit.cols; ++j) square += double{of.unit(r, j)} * double{of.unit(r, j)};
      const float length = static_cast<float>(std::sqrt(square));
      of.length(r, 0) = length < shortest ? shortest : length;
      for (dim j = 0; j < of.unit.cols; ++j) of.unit(r, j) /= of.length(r, 0);
    }
  };
  struct rescale {
    matrix_view<const float> log_scale, from;
    matrix_view<float> to;
    MOE_HD void operator()(dim t) const noexcept {
      const float scale = std::exp(log_scale(0, 0)), capped = scale > largest_scale ? largest_scale : scale;
      for (dim e = 0; e < to.cols; ++e) to(t, e) = capped * from(t, e);
    }
  };
  /// d from the gradient of v / max(|v|, shortest), in place; share = <d, unit>.
  struct differentiate {
    rows of;
    matrix_view<float> d, share;
    MOE_HD void operator()(dim r) const noexcept {
      float along = 0;
      for (dim j = 0; j < d.cols; ++j) along += d(r, j) * of.unit(r, j);
      if (share) share(r, 0) = along;
      const float turn = of.length(r, 0) > shortest ? along : 0.f;
      for (dim j = 0; j < d.cols; ++j) d(r, j) = (d(r, j) - turn * of.unit(r, j)) / of.length(r, 0);
    }
  };
  struct cap_share {
    matrix_view<const float> log_scale;
    matrix_view<float> share;
    MOE_HD void operator()(dim t) const noexcept {
      if (std::exp(log_scale(0, 0)) > largest_scale) share(t, 0) = 0;
    }
  };

 private:
  static constexpr float shortest = 1e-12f, largest_scale = 100;

  rows make_rows(dim n, arena& mem) const noexcept {
    const auto unit = mem.matrix<float>("unit", n, width);
    return {unit, mem.matrix<float>("length", n, 1)};
  }
  template <class B>
  static rows unit_directions(const call<B>& on, const weights& p, rows to) noexcept {
    copy(on, matrix_view<const float>(p.directions), to.unit);
    for_each_token(on, to.unit.rows, normalise{to});
    return to;
  }
  /// d log_scale = sum of dscores scores = sum over tokens of <dunit, unit>; none where the cap holds.
  template <class B>
  static void add_scale_gradient(const call<B>& on, const weights& p, matrix_view<float> shares,
                                 matrix_view<float> to) noexcept {
    for_each_token(on, shares.rows, cap_share{p.log_scale, shares});
    sum_rows(on, dense_rows(on), matrix_view<const float>(shares), to);
  }
};

}  // namespace moe
