// SPDX-License-Identifier: Apache-2.0
/// A bias that only selects: balance without an auxiliary loss.
#pragma once

#include "moe/router/select.hpp"

namespace moe {

/// Ranks by key + bias[e]; the weights come from the router's own scores and the bias has no gradient. It is moved by
/// `update_bias`, once a step, from the loads that forward gave. An optimizer leaves it where it is, but for its weight
/// decay.
///
/// R selects by key (router/select.hpp).
/// weights  bias[E,1], zeros, after those of the router
/// Wang et al. 2024, arXiv:2408.15664; DeepSeek-AI 2024, arXiv:2412.19437
template <class R>
struct bias_balanced {
  static constexpr bool selects_by_key = true;
  using plan = typename R::plan;
  struct weights {
    [[no_unique_address]] typename R::weights inner;
    matrix_view<float> bias;
  };
  struct weights_grad {
    [[no_unique_address]] detail::weights_grad<R> inner;
    matrix_view<float> bias;  ///< keeps the place of the bias in the flat buffer; never written
  };
  using context = typename R::context;

  R inner{};

  void check(shape s) const { detail::check_shape(inner, s); }
  void check(const weights& w, shape s) const {
    detail::check_weights(inner, w.inner, s);
    expect(w.bias, s.experts, 1, "bias_balanced: bias", "E x 1");
  }
  dim max_rows(shape s) const noexcept { return inner.max_rows(s); }
  dim choices(shape s) const noexcept { return inner.choices(s); }
  weights make_weights(shape s, arena& mem) const noexcept {
    const auto own = detail::make_weights(inner, s, mem);
    return {own, mem.matrix<float>("bias", s.experts, 1, initial::zeros)};
  }
  weights_grad make_gradients(shape s, arena& mem) const noexcept {
    const auto own = detail::make_gradients(inner, s, mem);
    return {own, mem.matrix<float>("bias", s.experts, 1, initial::zeros)};
  }
  context make_context(shape s, arena& mem) const noexcept { return detail::make_context(inner, s, mem); }
  key_scratch make_scratch(shape s, arena& mem) const noexcept { return detail::make_keys(inner, s, mem); }
  auto make_choices(shape s, arena& mem) const noexcept { return detail::make_choice_scratch(*this, s, mem); }

  template <class B>
    requires detail::selects_by_key<R>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    select(on, w, scores, p);
    weigh(on, w, scores, p, ctx);
  }
  template <class B>
    requires detail::routes_by_key<R>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx,
               const fill_scores& fill) const noexcept {
    detail::route_by_key(on, *this, w, scores, p, ctx, fill);
  }
  template <class B>
  void select(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p) const noexcept {
    detail::select_by_key(on, *this, w, scores, p);
  }
  template <class B>
  void rank(const call<B>& on, const weights& w, matrix_view<const float> scores, matrix_view<float> keys) const noexcept {
    inner.rank(on, w.inner, scores, keys);
    for_each_token(on, keys.rows, add_bias{keys, w.bias});
  }
  template <class B>
  void assign(const call<B>& on, const weights& w, matrix_view<const float> keys, plan& p) const noexcept {
    inner.assign(on, w.inner, keys, p);
  }
  template <class B>
  void weigh(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    inner.weigh(on, w.inner, scores, p, ctx);
  }
  template <class B>
  void backward(const call<B>& on, const weights& w, const plan& p, const context& ctx, std::span<const float> dweight,
                matrix_view<float> dscores, weights_grad& dw) const noexcept {
    inner.backward(on, w.inner, p, ctx, dweight, dscores, dw.inner);
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct add_bias {
    matrix_view<float> keys;
    matrix_view<const float> bias;
    MOE_HD void operator()(dim t) const noexcept {
      for (dim e = 0; e < keys.cols; ++e) keys(t, e) += bias(e, 0);  // -inf and NaN stay not eligible
    }
  };
};

/// bias[e] += rate sign(mean load - load[e]): towards the experts that were chosen too rarely. The loads may be summed over
/// batches and layers' replicas (count_load, router/statistics.hpp).
inline void update_bias(matrix_view<float> bias, std::span<const dim> load, float rate) {
  expect(bias, static_cast<dim>(load.size()), 1, "update_bias: bias", "E x 1");
  dim sum = 0;
  for (const dim n : load) sum += n;
  for (std::size_t e = 0; e < load.size(); ++e) {
    const dim scaled = load[e] * static_cast<dim>(load.size());  // compares with the mean without rounding
    if (scaled != sum) bias(static_cast<dim>(e), 0) += scaled < sum ? rate : -rate;
  }
}

}  // namespace moe
