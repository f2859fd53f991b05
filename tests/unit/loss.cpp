// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/backend/scalar.hpp"
#include "moe/loss/importance.hpp"
#include "moe/loss/load_balance.hpp"
#include "moe/loss/z_loss.hpp"
#include "moe/router/presets.hpp"
#include "moe/router/top_k.hpp"
#include "support/routing.hpp"

namespace {

using moe::dim;
using reference::matrix;
using reference::vec;

constexpr float infinity = std::numeric_limits<float>::infinity();

/// Which experts each token counts for.
using selection = std::vector<std::vector<dim>>;

selection most_probable(const matrix& z, dim k) {
  selection s;
  for (dim t = 0; t < z.rows; ++t) s.push_back(reference::best(reference::softmax(z.row(t)), k));
  return s;
}
/// E^2 times the mean over groups of n tokens and experts of f P, from the published formulas.
double load_balance(const matrix& z, const selection& chosen, dim n) {
  const dim groups = (z.rows + n - 1) / n;
  double sum = 0;
  for (dim g = 0; g < groups; ++g) {
    const dim last = std::min(z.rows, (g + 1) * n);
    const double tokens = static_cast<double>(last - g * n);
    vec f(static_cast<std::size_t>(z.cols)), P(f.size());
    for (dim t = g * n; t < last; ++t) {
      const vec p = reference::softmax(z.row(t));
      for (const dim e : chosen[static_cast<std::size_t>(t)]) f[static_cast<std::size_t>(e)] += 1 / tokens;
      for (std::size_t e = 0; e < P.size(); ++e) P[e] += p[e] / tokens;
    }
    for (std::size_t e = 0; e < P.size(); ++e) sum += f[e] * P[e];
  }
  const auto E = static_cast<double>(z.cols);
  return E * E * sum / (static_cast<double>(groups) * E);
}
double z_loss(const matrix& z) {
  double sum = 0;
  for (dim t = 0; t < z.rows; ++t) {
    double exps = 0;
    for (const double v : z.row(t)) exps += std::exp(v);
    sum += std::log(exps) * std::log(exps);
  }
  return sum / static_cast<double>(z.rows);
}
double importance(const std::vector<reference::choices>& all, dim E) {
  vec I(static_cast<std::size_t>(E));
  for (const auto& c : all)
    for (const auto& j : c) I[static_cast<std::size_t>(j.expert)] += j.weight;
  double mean = 0, variance = 0;
  for (const double v : I) mean += v / static_cast<double>(E);
  for (const double v : I) variance += (v - mean) * (v - mean) / static_cast<double>(E - 1);
  return variance / (mean * mean + 1e-10);
}

/// The value of m's loss and the gradient of routing and loss together against a reference of both.
template <class R, class Route, class Auxiliary>
void expect_reference(testing::routing<R>& m, Route route, Auxiliary auxiliary) {
  const dim T = m.sizes.tokens, E = m.sizes.experts;
  const auto g = testing::normals(T * E, 77);
  m.forward().backward(g);
  matrix z(T, E, m.scores);
  const matrix coefficient(T, E, g);
  CHECK(m.ctx.loss.value() == doctest::Approx(auxiliary(z)).epsilon(1e-5));
  const vec want = reference::gradient(z.values, [&] { return reference::loss(route(z), coefficient) + auxiliary(z); });
  CHECK(reference::error(m.dscores, want) < 1e-5);
}
auto mixtral(dim k) {
  return [k](const matrix& z) { return reference::route(z, [k](const vec& row) { return reference::mixtral(row, k); }); };
}

}  // namespace

TEST_SUITE("loss/load_balance") {
  TEST_CASE("an even load with even probabilities gives k, or 1 in the Switch form") {
    const std::vector<float> z(8 * 4);  // all logits equal
    testing::routing m(moe::with_loss<moe::top_k<2>, moe::load_balance>{.loss = {.coefficient = 1}}, 8, 4, z);
    CHECK(m.forward().ctx.loss.value() == doctest::Approx(2));
    testing::routing s(moe::with_loss<moe::top_k<2>, moe::switch_load_balance>{.loss = {.coefficient = 1}}, 8, 4, z);
    CHECK(s.forward().ctx.loss.value() == doctest::Approx(1));
  }
  TEST_CASE("all tokens on one expert with certainty give E") {
    std::vector<float> z;
    for (int t = 0; t < 6; ++t) z.insert(z.end(), {100, 0, 0, 0});
    testing::routing m(moe::with_loss<moe::top_k<1>, moe::load_balance>{.loss = {.coefficient = 0.5f}}, 6, 4, z);
    CHECK(m.forward().ctx.loss.value() == doctest::Approx(0.5 * 4));
  }
  TEST_CASE("the Hugging Face form: value and gradient") {
    for (const dim k : {1, 2, 3}) {
      const auto run = [&](auto router) {
        testing::routing m(router, 70, 6, testing::apart(70, 6, 31));  // more tokens than one block of a sum
        expect_reference(m, mixtral(k), [&](const matrix& z) { return 0.3 * load_balance(z, most_probable(z, k), 70); });
      };
      if (k == 1) run(moe::with_loss<moe::top_k<1>, moe::load_balance>{.loss = {.coefficient = 0.3f}});
      if (k == 2) run(moe::with_loss<moe::top_k<2>, moe::load_balance>{.loss = {.coefficient = 0.3f}});
      if (k == 3) run(moe::with_loss<moe::top_k<3>, moe::load_balance>{.loss = {.coefficient = 0.3f}});
    }
  }
  TEST_CASE("the Switch form over groups of tokens, the last one shorter") {
    for (const dim n : {1, 4, 16, 30, 50}) {
      CAPTURE(n);
      testing::routing m(moe::with_loss<moe::top_k<2>, moe::switch_load_balance>{.loss = {.coefficient = 0.3f, .group = n}},
                         30, 6, testing::apart(30, 6, 32));
      expect_reference(m, mixtral(2),
                       [&](const matrix& z) { return 0.3 * load_balance(z, most_probable(z, 1), std::min<dim>(n, 30)); });
    }
  }
  TEST_CASE(
      "the choice is that of the probabilities, or, where asked for, the router's own with its bias and what it dropped") {
    using inner = moe::capacity<moe::bias_balanced<moe::top_k<2, moe::score_rule<moe::softmax_score>>>>;
    const auto z = testing::apart(30, 5, 33);
    const inner router{.limit = {.factor = 0.7}};
    testing::routing probable(moe::with_loss<inner, moe::load_balance>{router, {.coefficient = 1}}, 30, 5, z);
    testing::routing own(moe::with_loss<inner, moe::load_balance_selected>{router, {.coefficient = 1}}, 30, 5, z);
    for (auto* bias : {&probable.w.bias, &own.w.bias}) (*bias)(4, 0) = 1;
    probable.forward();
    own.forward();
    REQUIRE(moe::dropped(own.plan) > 0);
    const matrix s(30, 5, z);
    selection chosen;
    for (dim t = 0; t < 30; ++t) {
      vec key = reference::softmax(s.row(t));
      key[4] += 1;
      chosen.push_back(reference::best(key, 2));
    }
    CHECK(probable.ctx.loss.value() == doctest::Approx(load_balance(s, most_probable(s, 2), 30)).epsilon(1e-5));
    CHECK(own.ctx.loss.value() == doctest::Approx(load_balance(s, chosen, 30)).epsilon(1e-5));
    CHECK(own.ctx.loss.value() != doctest::Approx(probable.ctx.loss.value()).epsilon(1e-3));
  }
  TEST_CASE("tokens without an eligible expert, such as padding, do not count") {
    auto z = testing::apart(10, 4, 34);
    using router = moe::with_loss<moe::with_loss<moe::top_k<2>, moe::load_balance>, moe::z_loss>;
    testing::routing<router> m({}, 10, 4, z);
    m.forward().backward(std::vector<float>(40));
    z.insert(z.begin() + 12, 4, -infinity);
    z.insert(z.end(), 8, -infinity);
    testing::routing<router> padded({}, 13, 4, z);
    padded.forward().backward(std::vector<float>(52));
    CHECK(padded.ctx.loss.value() == m.ctx.loss.value());
    CHECK(padded.ctx.inner.loss.value() == m.ctx.inner.loss.value());
    auto d = padded.dscores;
    CHECK(std::vector<float>(d.begin() + 12, d.begin() + 16) == std::vector<float>(4));
    d.erase(d.end() - 8, d.end());
    d.erase(d.begin() + 12, d.begin() + 16);
    CHECK(d == m.dscores);
  }
  TEST_CASE("several layers joined are one batch of all their tokens") {
    const auto a = testing::apart(20, 5, 35), b = testing::apart(33, 5, 36);
    auto both = a;
    both.insert(both.end(), b.begin(), b.end());
    using router = moe::with_loss<moe::top_k<2>, moe::load_balance>;
    const router r{.loss = {.coefficient = 0.2f}};
    testing::routing one(r, 20, 5, a), two(r, 33, 5, b), whole(r, 53, 5, both);
    one.forward();
    two.forward();
    whole.forward().backward(std::vector<float>(53 * 5));
    moe::load_balance::context* const layers[] = {&one.ctx.loss, &two.ctx.loss};
    CHECK(join(r.loss, layers) == doctest::Approx(whole.ctx.loss.value()).epsilon(1e-6));
    one.backward(std::vector<float>(20 * 5));
    two.backward(std::vector<float>(33 * 5));
    auto gradient = one.dscores;
    gradient.insert(gradient.end(), two.dscores.begin(), two.dscores.end());
    CHECK(reference::error(gradient, {whole.dscores.begin(), whole.dscores.end()}) < 1e-6);
  }
  TEST_CASE("layers that do not belong together are not joined") {
    using router = moe::with_loss<moe::top_k<2>, moe::load_balance>;
    testing::routing<router> one({}, 4, 5, testing::normals(20, 1)), other({}, 4, 6, testing::normals(24, 1)),
        inference({}, 4, 5, testing::normals(20, 1), false);
    testing::routing grouped(router{.loss = {.group = 2}}, 4, 5, testing::normals(20, 1));
    const auto refuse = [&](moe::load_balance::context& second, const char* message) {
      one.forward();
      moe::load_balance::context* const layers[] = {&one.ctx.loss, &second};
      CHECK_THROWS_WITH_AS(join(moe::load_balance{}, layers), message, moe::shape_error);
    };
    refuse(other.ctx.loss, "join: a layer's context is 1 x 6, expected 1 x 5 (1 x E)");
    refuse(inference.ctx.loss, "join: a layer's context is 0 x 0, expected 1 x 5 (1 x E)");
    refuse(grouped.ctx.loss, "join: a layer's context is 2 x 5, expected 1 x 5 (1 x E)");
  }
  TEST_CASE("no token, one expert") {
    using router = moe::with_loss<moe::top_k<1>, moe::load_balance>;
    testing::routing<router> none({}, 0, 3, {});
    CHECK(none.forward().backward({}).ctx.loss.value() == 0);
    testing::routing one(router{.loss = {.coefficient = 1}}, 3, 1, {1, -2, 3});
    CHECK(one.forward().backward({1, 1, 1}).ctx.loss.value() == doctest::Approx(1));
    CHECK(one.dscores == std::vector<float>{0, 0, 0});
  }
  TEST_CASE("a group of negative length is refused") {
    using router = moe::with_loss<moe::top_k<1>, moe::load_balance>;
    CHECK_THROWS_WITH_AS((testing::routing<router>(router{.loss = {.group = -1}}, 2, 2, std::vector<float>(4))),
                         "load_balance: group is -1, expected at least 0", moe::shape_error);
  }
}

TEST_SUITE("loss/z_loss") {
  TEST_CASE("value and gradient") {
    testing::routing m(moe::with_loss<moe::top_k<2>, moe::z_loss>{.loss = {.coefficient = 0.1f}}, 70, 6,
                       testing::apart(70, 6, 41));
    expect_reference(m, mixtral(2), [](const matrix& z) { return 0.1 * z_loss(z); });
  }
  TEST_CASE("logits of 1000 neither overflow nor lose the value") {
    testing::routing m(moe::with_loss<moe::top_k<1>, moe::z_loss>{.loss = {.coefficient = 1}}, 1, 2, {1000, 1000});
    m.forward().backward({0, 0});
    CHECK(m.ctx.loss.value() == doctest::Approx((1000 + std::log(2)) * (1000 + std::log(2))));
    CHECK(m.dscores[0] == doctest::Approx(1000 + std::log(2)));
  }
}

TEST_SUITE("loss/importance") {
  TEST_CASE("weights as even as can be give 0") {
    testing::routing m(moe::with_loss<moe::top_k<1>, moe::importance>{.loss = {.coefficient = 1}}, 2, 2, {1, 0, 0, 1});
    CHECK(m.forward().ctx.loss.value() == 0);
  }
  TEST_CASE("all weight on one of E experts gives E") {
    testing::routing m(moe::with_loss<moe::top_k<1>, moe::importance>{.loss = {.coefficient = 0.5f}}, 3, 4,
                       {1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0});
    CHECK(m.forward().ctx.loss.value() == doctest::Approx(0.5 * 4));
  }
  TEST_CASE("value and gradient, which passes through the combine weights") {
    using sigmoid = moe::top_k<2, moe::score_rule<moe::sigmoid_score, moe::sum_plus<-20>, 5, 2>>;
    testing::routing s(moe::with_loss<sigmoid, moe::importance>{.loss = {.coefficient = 0.3f}}, 40, 6,
                       testing::apart(40, 6, 51));
    const auto kimi = [](const matrix& z) {
      return reference::route(z, [](const vec& row) { return reference::deepseek_v3(row, vec(6), 2, 1, 1, 2.5); });
    };
    expect_reference(s, kimi, [&](const matrix& z) { return 0.3 * importance(kimi(z), 6); });
    const auto olmoe = [](const matrix& z) {
      return reference::route(z, [](const vec& row) { return reference::olmoe(row, 2); });
    };
    testing::routing o(moe::with_loss<moe::olmoe_router<2>, moe::importance>{.loss = {.coefficient = 0.3f}}, 40, 6,
                       testing::apart(40, 6, 53));
    expect_reference(o, olmoe, [&](const matrix& z) { return 0.3 * importance(olmoe(z), 6); });
    testing::routing m(moe::with_loss<moe::top_k<3>, moe::importance>{.loss = {.coefficient = 0.3f}}, 40, 6,
                       testing::apart(40, 6, 52));
    expect_reference(m, mixtral(3), [&](const matrix& z) { return 0.3 * importance(mixtral(3)(z), 6); });
  }
  TEST_CASE("dropped assignments have no weight") {
    using inner = moe::capacity<moe::top_k<1>, moe::given_capacity>;
    testing::routing m(moe::with_loss<inner, moe::importance>{.loss = {.coefficient = 1}}, 3, 2, {1, 0, 1, 0, 0, 1});
    CHECK(m.forward().ctx.loss.value() == 0);  // one row each
    m.router.inner.limit.rows = 2;
    CHECK(m.forward().ctx.loss.value() == doctest::Approx(0.5 / 2.25));
  }
  TEST_CASE("one expert and no token give 0") {
    using router = moe::with_loss<moe::top_k<1>, moe::importance>;
    testing::routing<router> one({}, 2, 1, {1, 2}), none({}, 0, 3, {});
    CHECK(one.forward().backward({1, 1}).ctx.loss.value() == 0);
    CHECK(one.dscores == std::vector<float>{0, 0});
    CHECK(none.forward().backward({}).ctx.loss.value() == 0);
  }
}

TEST_SUITE("loss/with_loss") {
  using stacked =
      moe::with_loss<moe::with_loss<moe::with_loss<moe::top_k<2>, moe::importance>, moe::load_balance>, moe::z_loss>;
  static_assert(moe::TrainableRouter<stacked, testing::backend_of_routing>);
  static_assert(moe::ReplayableRouter<stacked, testing::backend_of_routing>);

  TEST_CASE("losses stack: each has its value, and their gradients add") {
    testing::routing m(stacked{{{.loss = {.coefficient = 0.2f}}, {.coefficient = 0.3f}}, {.coefficient = 0.1f}}, 30, 5,
                       testing::apart(30, 5, 61));
    const auto g = testing::normals(150, 62);
    m.forward().backward(g);
    matrix z(30, 5, m.scores);
    const matrix coefficient(30, 5, g);
    const auto balance = [&] { return 0.3 * load_balance(z, most_probable(z, 2), 30); };
    const auto even = [&] { return 0.2 * importance(mixtral(2)(z), 5); };
    CHECK(m.ctx.loss.value() == doctest::Approx(0.1 * z_loss(z)).epsilon(1e-5));
    CHECK(m.ctx.inner.loss.value() == doctest::Approx(balance()).epsilon(1e-5));
    CHECK(m.ctx.inner.inner.loss.value() == doctest::Approx(even()).epsilon(1e-5));
    const vec want = reference::gradient(
        z.values, [&] { return reference::loss(mixtral(2)(z), coefficient) + 0.1 * z_loss(z) + balance() + even(); });
    CHECK(reference::error(m.dscores, want) < 1e-5);
  }
  TEST_CASE("a loss does not change the routing, and an inference context measures none") {
    const auto z = testing::normals(60, 63);
    testing::routing<moe::top_k<2>> plain({}, 12, 5, z);
    testing::routing<stacked> m({}, 12, 5, z), inference({}, 12, 5, z, false);
    plain.forward();
    m.forward();
    inference.forward();
    for (const auto* plan : {&m.plan, &inference.plan})
      CHECK(testing::assignments(*plan) == testing::assignments(plain.plan));
    for (dim t = 0; t < 12; ++t) CHECK(m.weights_of(t) == plain.weights_of(t));
    CHECK(m.ctx.loss.value() > 0);
    CHECK(inference.ctx.loss.value() == 0);
  }
  TEST_CASE("a replayed plan is measured too") {
    testing::routing<stacked> m({}, 12, 5, testing::normals(60, 64)), again({}, 12, 5, m.scores);
    m.forward();
    again.replay(m.plan);
    CHECK(again.ctx.loss.value() == m.ctx.loss.value());
    CHECK(again.ctx.inner.loss.value() == m.ctx.inner.loss.value());
    CHECK(again.ctx.inner.inner.loss.value() == m.ctx.inner.inner.loss.value());
  }
  TEST_CASE("scores are kept once: by the router where it needs them, else by the loss") {
    testing::routing<moe::with_loss<moe::olmoe_router<2>, moe::load_balance>> shared({}, 4, 3, std::vector<float>(12));
    CHECK(shared.ctx.scores.data == shared.ctx.inner.scores.data);
    testing::routing<moe::with_loss<moe::top_k<2>, moe::load_balance>> own({}, 4, 3, std::vector<float>(12));
    CHECK(own.ctx.scores);
    CHECK_FALSE(own.ctx.inner.scores);
    testing::routing<moe::with_loss<moe::top_k<2>, moe::importance>> none({}, 4, 3, std::vector<float>(12));
    CHECK_FALSE(none.ctx.scores);
  }
}
