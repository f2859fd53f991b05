// SPDX-License-Identifier: Apache-2.0
/// A gate that explores while it trains.
#pragma once

#include <cmath>

#include "moe/gate/linear.hpp"

namespace moe {

/// Mean 0, deviation 1, a pure function of the generator and the counter. A test may hand in numbers of its own instead.
struct normal_noise {
  MOE_HD float operator()(const rng& random, std::uint64_t counter) const noexcept { return random.normal(counter); }
};

/// scores = G(x) + noise * (softplus(x w^T) + 0.01) while training, G(x) otherwise. The noise of expert e on token t is
/// number t E + e of `on.rng`; the scale of the noise is learned.
///
/// weights  w[E,d], zeros, after those of G      saves  x w^T, 4 T E bytes      adds to  dx, dw
/// Shazeer et al. 2017, arXiv:1701.06538
template <class G = linear_gate, class Noise = normal_noise>
struct noisy {
  static_assert(std::same_as<typename G::input, matrix_view<const float>>,
                "moe::noisy: its gate does not read a float matrix");
  using input = typename G::input;
  using input_grad = typename G::input_grad;
  struct weights {
    typename G::weights inner;
    matrix_view<float> w;
  };
  struct weights_grad {
    detail::weights_grad<G> inner;
    matrix_view<float> w;
  };
  struct context {
    typename G::context inner;
    matrix_view<float> spread;  ///< x w^T
  };

  G inner{};
  Noise noise{};

  void check(shape s) const { detail::check_shape(inner, s); }
  void check(const weights& p, shape s) const {
    detail::check_weights(inner, p.inner, s);
    expect(p.w, s.experts, s.d, "noisy: w", "E x d");
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    const auto own = detail::make_weights(inner, s, mem);
    return {own, mem.matrix<float>("noise.w", s.experts, s.d, initial::zeros)};
  }
  weights_grad make_gradients(shape s, arena& mem) const noexcept {
    const auto own = detail::make_gradients(inner, s, mem);
    return {own, mem.matrix<float>("noise.w", s.experts, s.d, initial::zeros)};
  }
  context make_context(shape s, arena& mem) const noexcept {
    const auto own = detail::make_context(inner, s, mem);
    return {own, mem.matrix<float>("spread", s.tokens, s.experts)};
  }
  void make_scratch(shape s, arena& mem) const noexcept { detail::count_scratch(inner, mem, s); }
  matrix_view<float> make_backward_scratch(shape s, arena& mem) const noexcept {
    detail::count_backward_scratch(inner, mem, s);
    return mem.matrix<float>("dspread", s.tokens, s.experts);
  }

  template <class B>
  void forward(const call<B>& on, const weights& p, const input& x, matrix_view<float> scores, context& ctx) const noexcept {
    inner.forward(on, p.inner, x, scores, ctx.inner);
    if (!on.training) return;
    gemm_nt(on, x, p.w, {}, ctx.spread);
    for_each_token(on, scores.rows, add_noise{noise, on.rng, ctx.spread, scores});
  }
  template <class B>
  void backward(const call<B>& on, const weights& p, const input& x, const context& ctx, matrix_view<const float> dscores,
                input_grad dx, weights_grad& dp) const noexcept {
    inner.backward(on, p.inner, x, ctx.inner, dscores, dx, dp.inner);
    scratch_frame frame(on.scratch);
    const auto dspread = on.scratch.template matrix<float>("dspread", dscores.rows, dscores.cols);
    for_each_token(on, dscores.rows, differentiate{noise, on.rng, ctx.spread, dscores, dspread});
    if (dx) gemm_nn(on, matrix_view<const float>(dspread), p.w, dx);
    if (dp.w) gemm_tn(on, matrix_view<const float>(dspread), x, dp.w);
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct add_noise {
    Noise noise;
    rng random;
    matrix_view<const float> spread;
    matrix_view<float> scores;
    MOE_HD void operator()(dim t) const noexcept {
      for (dim e = 0; e < scores.cols; ++e)
        scores(t, e) += noise(random, counter(t, e, scores.cols)) * deviation(spread(t, e));
    }
  };
  struct differentiate {
    Noise noise;
    rng random;
    matrix_view<const float> spread, dscores;
    matrix_view<float> dspread;
    MOE_HD void operator()(dim t) const noexcept {
      for (dim e = 0; e < dscores.cols; ++e)
        dspread(t, e) = dscores(t, e) * noise(random, counter(t, e, dscores.cols)) / (1.f + std::exp(-spread(t, e)));
    }
  };

 private:
  MOE_HD static float deviation(float z) noexcept {  // softplus(z) + 0.01
    return (z > 0 ? z : 0.f) + std::log1p(std::exp(-std::fabs(z))) + 0.01f;
  }
  MOE_HD static std::uint64_t counter(dim t, dim e, dim E) noexcept { return static_cast<std::uint64_t>(t * E + e); }
};

}  // namespace moe
