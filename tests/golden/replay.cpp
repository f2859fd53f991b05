// SPDX-License-Identifier: Apache-2.0
// A recorded plan replayed by a whole layer: under the same weights the bits of forward and backward, under fresh weights
// the double reference with the recorded choices, those that capacity dropped counted in the norm.
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/reference_routing.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using reference::matrix;
using reference::vec;

template <class Router>
using layer =
    moe::layer<moe::linear_gate, Router, moe::basic_ffn_expert<moe::plain<moe::silu>>, moe::weighted_sum, moe::scalar<>>;

constexpr moe::shape sizes{.tokens = 24, .d = 6, .f = 5, .experts = 5};

std::vector<float> copy(std::span<const float> v) { return {v.begin(), v.end()}; }

/// The choices of each token, dropped ones as -1 - e.
std::vector<std::vector<dim>> choices(const moe::routing_plan& p) {
  std::vector<std::vector<dim>> all;
  for (dim t = 0; t < p.tokens(); ++t) {
    all.emplace_back();
    for (auto i = static_cast<std::size_t>(p.token_offsets[static_cast<std::size_t>(t)]);
         i < static_cast<std::size_t>(p.token_offsets[static_cast<std::size_t>(t + 1)]); ++i) {
      dim e = p.position[i];
      if (e >= 0) e = std::upper_bound(p.offsets.begin(), p.offsets.end(), p.position[i]) - p.offsets.begin() - 1;
      all.back().push_back(e);
    }
  }
  return all;
}
/// Weights by s(z) over the sum of all choices, without the dropped ones.
template <class Score>
reference::router_rule recorded(std::vector<std::vector<dim>> chosen, Score score) {
  return [chosen = std::move(chosen), score](const matrix& scores) {
    std::vector<reference::choices> all;
    for (dim t = 0; t < scores.rows; ++t) {
      const vec s = score(scores.row(t));
      double sum = 0;
      all.emplace_back();
      for (const dim e : chosen[static_cast<std::size_t>(t)]) sum += s[static_cast<std::size_t>(e < 0 ? -1 - e : e)];
      for (const dim e : chosen[static_cast<std::size_t>(t)])
        if (e >= 0) all.back().push_back({e, s[static_cast<std::size_t>(e)] / sum});
    }
    return all;
  };
}

template <class Router, class Score>
void expect_replay(Router router, Score score) {
  const layer<Router> net(sizes, router);
  testing::model<layer<Router>> m(net, sizes.tokens, sizes.d, 1);
  m.forward();
  m.backward();
  const moe::recorded_plan plan = moe::record(m.ctx.plan);
  REQUIRE(moe::dropped(plan.plan()) > 0);
  const auto y = m.y, dx = m.dx, dw = copy(m.gradients());

  const auto replay = [&] {
    std::fill(m.dx.begin(), m.dx.end(), 0.f);
    std::fill(m.gradients().begin(), m.gradients().end(), 0.f);
    net.replay(m.w, m.in, plan.plan(), m.y_view(), m.ctx, m.work);
    m.backward();
  };
  replay();
  CHECK(m.y == y);
  CHECK(m.dx == dx);
  CHECK(copy(m.gradients()) == dw);

  testing::randomise(net.catalogue(), m.weights(), 2);
  replay();
  CHECK(choices(m.ctx.plan) == choices(plan.plan()));
  const auto tensor = [&](const char* name) { return reference::tensor(net.catalogue(), m.weights(), name); };
  matrix x(sizes.tokens, sizes.d, m.x), gate = tensor("gate.w"), up = tensor("experts.up"), down = tensor("experts.down");
  const matrix dy(sizes.tokens, sizes.d, m.dy);
  const auto forward = [&] {
    const reference::layer same{reference::linear_gate(gate), recorded(choices(plan.plan()), score),
                                reference::feed_forward(up, {}, down)};
    return same.forward(x);
  };
  CHECK(reference::error(m.y, forward().values) < 1e-5);
  const auto loss = [&] { return reference::inner(forward(), dy); };
  const auto gradient = [&](const char* name) {
    const matrix g = reference::tensor(net.catalogue(), m.gradients(), name);
    return std::vector<float>(g.values.begin(), g.values.end());
  };
  CHECK(reference::error(m.dx, reference::gradient(x.values, loss)) < 1e-4);
  CHECK(reference::error(gradient("gate.w"), reference::gradient(gate.values, loss)) < 1e-4);
  CHECK(reference::error(gradient("experts.up"), reference::gradient(up.values, loss)) < 1e-4);
  CHECK(reference::error(gradient("experts.down"), reference::gradient(down.values, loss)) < 1e-4);
}

}  // namespace

TEST_SUITE("layer/replay") {
  TEST_CASE("under capacity, softmax over the choices") {
    using router = moe::capacity<moe::top_k<2>>;
    expect_replay(router{.limit = {.factor = 0.6}}, reference::softmax);
  }
  TEST_CASE("under capacity by score, sigmoids with a selection bias and an auxiliary loss of coefficient 0") {
    using router = moe::with_loss<moe::capacity<moe::minimax_m2_router<3>>, moe::load_balance>;
    expect_replay(router{{.limit = {.factor = 0.6}, .order = moe::drop_order::score}, {.coefficient = 0}},
                  [](const vec& z) { return reference::map(z, reference::sigmoid); });
  }
}
