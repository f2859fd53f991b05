// SPDX-License-Identifier: Apache-2.0
/// Layers whose experts are packed from float32 ones, and their formulas in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/expert/packed_ffn.hpp"
#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace testing {

template <bool Biased = false>
using dense_layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::basic_ffn_expert<moe::glu<moe::silu>, moe::separate, Biased>,
                               moe::weighted_sum, moe::cpu<>>;
template <class T, class B = moe::cpu<>, bool Biased = false>
using packed_layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::packed_ffn_expert<T, moe::glu<moe::silu>, Biased>,
                                moe::weighted_sum, B>;

/// Relative to the largest result, what products with weights of T may be off: their activations are rounded to bytes or
/// halves once per product.
template <class T>
constexpr double packed_tolerance = moe::packing<T>::scaled ? 0.03 : 1e-2;
template <>
inline constexpr double packed_tolerance<float> = 2e-6;
template <>
inline constexpr double packed_tolerance<moe::f16> = 2e-6;

/// A layer with packed weights and everything it runs with, its result for x.
template <class T, class B = moe::cpu<>, bool Biased = false>
struct packed_model {
  packed_layer<T, B, Biased> net;
  moe::buffer params, work;
  typename packed_layer<T, B, Biased>::weights w;
  typename packed_layer<T, B, Biased>::context ctx;
  std::vector<float> y;

  packed_model(model<dense_layer<Biased>>& from, moe::dim tokens, B b = {}) : net(from.net.sizes(), b), params(net.weight_bytes()) {
    moe::arena p(params.bytes());
    w = net.make_weights(p);
    for (moe::dim r = 0; r < w.gate.w.rows; ++r) std::copy_n(from.w.gate.w.row(r), w.gate.w.cols, w.gate.w.row(r));
    net.experts().pack(from.w.experts, net.sizes(), w.experts);
    run({from.x.data(), tokens, from.d});
  }
  void run(moe::matrix_view<const float> x) {
    y.assign(static_cast<std::size_t>(x.rows * x.cols), -1.f);
    work = moe::buffer(net.inference_context_bytes(x.rows) + net.scratch_bytes(x.rows));
    moe::arena mem(work.bytes());
    ctx = net.make_inference_context(x.rows, mem);
    net.forward(w, x, {y.data(), x.rows, x.cols}, ctx, mem);
  }
};

/// The layer's result in double, from the weights as they were packed and the plan.
template <class T, class B, bool Biased>
std::vector<double> reference_of(const packed_model<T, B, Biased>& m, moe::matrix_view<const float> x) {
  using moe::dim;
  const auto at = [](dim i) { return static_cast<std::size_t>(i); };
  const moe::shape s = m.net.sizes();
  const dim hidden = (s.f + 31) / 32, out = (s.d + 31) / 32;
  const auto& w = m.w.experts;
  const auto bias = [&](const auto& of, dim panel, dim lane) {
    if constexpr (Biased) return double{of[at(panel * 32 + lane)]};
    else return 0.;
  };
  std::vector<double> y(at(x.rows * s.d)), a(at(s.f));
  for (dim e = 0; e < s.experts; ++e)
    for (dim r = m.ctx.plan.offsets[at(e)]; r < m.ctx.plan.offsets[at(e + 1)]; ++r) {
      const dim t = m.ctx.plan.token[at(r)];
      for (dim j = 0; j < s.f; ++j) {
        const dim panel = (e * hidden + j / 32) * 2;
        double g = bias(w.gate_up_bias, panel, j % 32), u = bias(w.gate_up_bias, panel + 1, j % 32);
        for (dim k = 0; k < s.d; ++k) {
          g += double{x(t, k)} * w.gate_up.weight(panel, j % 32, k);
          u += double{x(t, k)} * w.gate_up.weight(panel + 1, j % 32, k);
        }
        a[at(j)] = g / (1 + std::exp(-g)) * u;
      }
      for (dim j = 0; j < s.d; ++j) {
        double sum = bias(w.down_bias, e * out + j / 32, j % 32);
        for (dim k = 0; k < s.f; ++k) sum += a[at(k)] * w.down.weight(e * out + j / 32, j % 32, k);
        y[at(t * s.d + j)] += m.ctx.plan.weight[at(r)] * sum;
      }
    }
  return y;
}

/// Largest difference over the largest wanted value.
inline double distance(const std::vector<float>& y, const std::vector<double>& wanted) {
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    worst = std::isfinite(y[i]) ? std::max(worst, std::fabs(double{y[i]} - wanted[i])) : HUGE_VAL;
    largest = std::max(largest, std::fabs(wanted[i]));
  }
  return worst / largest;
}

}  // namespace testing
