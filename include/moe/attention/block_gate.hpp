// SPDX-License-Identifier: Apache-2.0
/// The gate of block attention.
#pragma once

#include <limits>

#include "moe/attention/input.hpp"

namespace moe {

/// scores[t,b] = <q_t, mean of the keys of block b>; the query's own block +inf, so that it is always taken; later blocks
/// not eligible. Selection carries no gradient.
///
/// MoBA, Lu et al. 2025, arXiv:2502.13189: k counts the own block.
struct block_mean_gate {
  using input = attention_input;
  using input_grad = attention_gradient;
  using weights = nothing;
  using context = nothing;
  struct scratch { matrix_view<float> centroids; };

  dim block = 64;  ///< keys per block

  void check(shape) const {
    if (block <= 0) throw shape_error("block_mean_gate: block is " + std::to_string(block) + ", expected at least 1");
  }
  scratch make_scratch(shape s, arena& mem) const noexcept { return {mem.matrix<float>("centroids", s.experts, s.d)}; }

  template <class B>
  void forward(const call<B>& on, const weights&, const input& x, matrix_view<float> scores, context&) const noexcept {
    scratch_frame frame(on.scratch);
    const auto mean = make_scratch(on.sizes, on.scratch).centroids;
    for_each_token(on, mean.rows, average{x.k, mean, block});
    fill(on, scores, 0.f);
    gemm_nt(on, x.q, matrix_view<const float>(mean), scores);
    for_each_token(on, scores.rows, mask{x, scores, block});
  }
  template <class B>
  void backward(const call<B>&, const weights&, const input&, const context&, matrix_view<const float>, input_grad,
                weights&) const noexcept {}

  // What kernels are made of is public: nvcc wants to name it.
  struct average {
    matrix_view<const float> k;
    matrix_view<float> mean;
    dim block;
    MOE_HD void operator()(dim b) const noexcept {
      const dim first = b * block, last = first + block < k.rows ? first + block : k.rows;
      for (dim j = 0; j < mean.cols; ++j) {
        float sum = 0;
        for (dim i = first; i < last; ++i) sum += k(i, j);
        mean(b, j) = last > first ? sum / static_cast<float>(last - first) : 0.f;
      }
    }
  };
  struct mask {
    attention_input x;
    matrix_view<float> scores;
    dim block;
    MOE_HD void operator()(dim t) const noexcept {
      const dim own = x.position(t) / block;
      if (own < scores.cols) scores(t, own) = detail::infinity;
      for (dim b = own + 1; b < scores.cols; ++b) scores(t, b) = -detail::infinity;
    }
  };
};

}  // namespace moe
