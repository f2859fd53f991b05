// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using backend = moe::scalar<>;
using trunk = moe::basic_ffn_expert<moe::plain<moe::gelu>, moe::separate, true>;
template <class Trunk, int K = 2>
using film_layer =
    moe::layer<moe::linear_gate, moe::top_k<K>, moe::film_expert, moe::mix_before_trunk<Trunk>, backend>;
constexpr moe::shape sizes{.tokens = 16, .d = 8, .f = 12, .experts = 5};

static_assert(moe::TrainableExpert<moe::film_expert, backend>);

double gelu(double z) { return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0))); }

// The trunk of `m` in double, on a vector.
template <class Model>
std::vector<double> run_trunk(const Model& m, const std::vector<double>& s) {
  const auto& w = m.w.combine;
  std::vector<double> a(static_cast<std::size_t>(w.up.rows)), y(static_cast<std::size_t>(w.down.rows));
  for (std::size_t i = 0; i < a.size(); ++i) {
    double z = w.up_bias(static_cast<moe::dim>(i), 0);
    for (std::size_t j = 0; j < s.size(); ++j) z += w.up(static_cast<moe::dim>(i), static_cast<moe::dim>(j)) * s[j];
    a[i] = gelu(z);
  }
  for (std::size_t i = 0; i < y.size(); ++i) {
    y[i] = w.down_bias(static_cast<moe::dim>(i), 0);
    for (std::size_t j = 0; j < a.size(); ++j) y[i] += w.down(static_cast<moe::dim>(i), static_cast<moe::dim>(j)) * a[j];
  }
  return y;
}

}  // namespace

TEST_SUITE("expert/film") {
  TEST_CASE("rows are mixed first and the shared trunk runs once a token") {
    testing::model<film_layer<trunk>> m(film_layer<trunk>(sizes), 16, 8, 5);
    m.forward();
    const auto& p = m.ctx.plan;
    double worst = 0;
    for (moe::dim t = 0; t < 16; ++t) {
      std::vector<double> mixed(8);
      for (moe::dim e = 0; e < 5; ++e)
        for (moe::idx r = p.offsets[static_cast<std::size_t>(e)]; r < p.offsets[static_cast<std::size_t>(e) + 1]; ++r)
          if (p.token[static_cast<std::size_t>(r)] == t)
            for (std::size_t j = 0; j < 8; ++j) {
              const auto c = static_cast<moe::dim>(j);
              mixed[j] += p.weight[static_cast<std::size_t>(r)] *
                          (double{m.w.experts.gamma(e, c)} * m.x_view()(t, c) + m.w.experts.beta(e, c));
            }
      const auto y = run_trunk(m, mixed);
      for (std::size_t j = 0; j < 8; ++j) worst = std::max(worst, std::fabs(y[j] - m.y[static_cast<std::size_t>(t) * 8 + j]));
    }
    CHECK(worst < 1e-5);
  }
  TEST_CASE("gamma 1 and beta 0 give the trunk of x for every routing") {
    testing::model<film_layer<trunk>> m(film_layer<trunk>(sizes), 16, 8, 6);
    for (moe::dim e = 0; e < 5; ++e)
      for (moe::dim j = 0; j < 8; ++j) {
        m.w.experts.gamma(e, j) = 1;
        m.w.experts.beta(e, j) = 0;
      }
    m.forward();
    double worst = 0;
    for (moe::dim t = 0; t < 16; ++t) {
      const auto y = run_trunk(m, std::vector<double>(m.x_view().row(t), m.x_view().row(t) + 8));
      for (std::size_t j = 0; j < 8; ++j) worst = std::max(worst, std::fabs(y[j] - m.y[static_cast<std::size_t>(t) * 8 + j]));
    }
    CHECK(worst < 1e-5);
  }
  TEST_CASE("gradients through the mix and the trunk match finite differences") {
    const auto g = testing::gradcheck(film_layer<trunk>(sizes), 16, 8, 7);
    INFO("worst in " << g.where << ", skipped " << g.skipped << " of " << g.probed);
    CHECK(g.worst < 1e-2);
    CHECK(g.skipped * 4 < g.probed);
  }
  TEST_CASE("experts that no token chose get no gradient") {
    testing::model<film_layer<trunk, 1>> m(film_layer<trunk, 1>({.tokens = 1, .d = 8, .f = 4, .experts = 5}), 1, 8, 8);
    m.forward();
    m.backward();
    int silent = 0;
    for (moe::dim e = 0; e < 5; ++e) {
      if (m.ctx.plan.offsets[static_cast<std::size_t>(e)] != m.ctx.plan.offsets[static_cast<std::size_t>(e) + 1]) continue;
      for (moe::dim j = 0; j < 8; ++j) CHECK(m.dw.experts.gamma(e, j) == 0);
      ++silent;
    }
    CHECK(silent == 4);
  }
}
