// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/backend/scalar.hpp"
#include "moe/router/bias_balanced.hpp"
#include "moe/router/expert_choice.hpp"
#include "moe/router/grouped.hpp"
#include "moe/router/statistics.hpp"
#include "moe/router/threshold.hpp"
#include "moe/router/top_k.hpp"
#include "moe/router/top_p.hpp"
#include "support/routing.hpp"

namespace {

using moe::dim;
using reference::matrix;
using reference::vec;
using experts = std::vector<dim>;

constexpr float infinity = std::numeric_limits<float>::infinity(), not_a_number = std::numeric_limits<float>::quiet_NaN();

template <int K>
using softmax_top = moe::top_k<K, moe::score_rule<moe::softmax_score>>;
template <int K>
using sigmoid_top = moe::top_k<K, moe::score_rule<moe::sigmoid_score>>;
template <int K>
using plain_top = moe::top_k<K, moe::select_only>;

template <class R>
std::string refusal(R router, dim E, dim T = 4) {
  try {
    moe::detail::check_shape(router, {.tokens = T, .d = 1, .experts = E});
  } catch (const moe::shape_error& e) {
    return e.what();
  }
  return "";
}

/// Logits whose softmax is p.
std::vector<float> logits(std::vector<float> p) {
  for (float& v : p) v = std::log(v);
  return p;
}

/// Choices, weights and the gradient of the logits against a reference for all tokens.
template <class R, class Route>
void expect_reference(testing::routing<R>& m, Route route) {
  const dim T = m.sizes.tokens, E = m.sizes.experts;
  const auto g = testing::normals(T * E, 99);
  m.forward().backward(g);
  REQUIRE(moe::fault(m.plan) == nullptr);
  matrix z(T, E, m.scores);
  const matrix coefficient(T, E, g);
  testing::expect_choices(m.choices(), route(z));
  CHECK(reference::error(m.dscores, reference::gradient(z.values, [&] { return reference::loss(route(z), coefficient); })) <
        1e-5);
}

}  // namespace

TEST_SUITE("router/grouped") {
  TEST_CASE("only experts of the best groups are chosen") {
    // Groups {0,1} {2,3} {4,5}; largest: 5, 4, 3; sums of two: 5, 8, 4.
    const std::vector<float> z{5, 0, 4, 4, 3, 1};
    moe::grouped<plain_top<2>, moe::largest_key> largest{.groups = 3, .kept = 1};
    moe::grouped<plain_top<2>> sums{.groups = 3, .kept = 1};
    CHECK(testing::routing(largest, 1, 6, z).forward().experts_of(0) == experts{0, 1});
    CHECK(testing::routing(sums, 1, 6, z).forward().experts_of(0) == experts{2, 3});
    largest.kept = sums.kept = 2;
    CHECK(testing::routing(largest, 1, 6, z).forward().experts_of(0) == experts{0, 2});
    CHECK(testing::routing(sums, 1, 6, z).forward().experts_of(0) == experts{0, 2});
  }
  TEST_CASE("equal groups: the lower one") {
    moe::grouped<plain_top<1>, moe::largest_key> r{.groups = 3, .kept = 1};
    CHECK(testing::routing(r, 1, 6, {0, 1, 2, 0, 0, 2}).forward().experts_of(0) == experts{2});
    r.kept = 2;
    testing::routing m(r, 1, 6, {1, 0, 1, 0, 1, 3});
    CHECK(m.forward().experts_of(0) == experts{5});
  }
  TEST_CASE("one group of all experts, and all groups kept, change nothing") {
    const auto z = testing::normals(9 * 12, 4);
    testing::routing<softmax_top<3>> plain({}, 9, 12, z);
    plain.forward();
    for (const dim groups : {1, 3, 12}) {
      testing::routing m(moe::grouped<softmax_top<3>>{.groups = groups, .kept = groups}, 9, 12, z);
      m.forward();
      CHECK(testing::assignments(m.plan) == testing::assignments(plain.plan));
      for (dim t = 0; t < 9; ++t) CHECK(m.weights_of(t) == plain.weights_of(t));
    }
  }
  TEST_CASE("what is not eligible does not count for its group, and a group of such experts is never kept") {
    moe::grouped<plain_top<2>> r{.groups = 3, .kept = 1};
    CHECK(testing::routing(r, 1, 6, {9, -infinity, 4, 4, not_a_number, 20}).forward().experts_of(0) == experts{5});
    CHECK(testing::routing(r, 1, 6, {-infinity, -infinity, 1, not_a_number, -infinity, -infinity}).forward().experts_of(0) ==
          experts{2});
    r.kept = 2;
    CHECK(testing::routing(r, 1, 6, {-infinity, not_a_number, -5, -6, -infinity, -infinity}).forward().experts_of(0) ==
          experts{2, 3});
  }
  TEST_CASE("the masked keys: never chosen, or 0 as in the Hugging Face port, which differs where kept keys are negative") {
    // Keys sigmoid + bias = .5 -.4 | -.1 -.2: the first group is kept, and its second key is below 0.
    using router = moe::grouped<moe::bias_balanced<sigmoid_top<2>>>;
    const auto chosen = [](moe::group_mask mask) {
      testing::routing m(router{.groups = 2, .kept = 1, .mask = mask}, 1, 4, {0, 0, 0, 0});
      const float bias[] = {0, -0.9f, -0.6f, -0.7f};
      std::copy(bias, bias + 4, m.w.bias.data);
      m.forward();
      CHECK(m.weights_of(0) == std::vector<float>{0.5f, 0.5f});  // of the unbiased scores
      return m.experts_of(0);
    };
    CHECK(chosen(moe::group_mask::never) == experts{0, 1});
    CHECK(chosen(moe::group_mask::zero) == experts{0, 2});
  }
  TEST_CASE("a masked key of 0 does not make eligible what is not") {
    using router = moe::grouped<plain_top<2>>;
    testing::routing m(router{.groups = 2, .kept = 1, .mask = moe::group_mask::zero}, 1, 4,
                       {3, -1, -infinity, not_a_number});
    CHECK(m.forward().experts_of(0) == experts{0, 1});
  }
  TEST_CASE("groups limit routers of any number of choices") {
    using router = moe::grouped<moe::top_p<4>, moe::largest_key>;
    router r{.inner = {.p = 0.9f}, .groups = 2, .kept = 1};
    testing::routing m(r, 1, 8, logits({0.3f, 0.2f, 0.1f, 0.05f, 0.25f, 0.05f, 0.03f, 0.02f}));
    CHECK(m.forward().experts_of(0) == experts{0, 1, 2, 3});
  }
  TEST_CASE("groups that cannot work are refused") {
    using router = moe::grouped<plain_top<3>>;
    CHECK(refusal(router{.groups = 4, .kept = 2}, 16) == "");
    CHECK(refusal(router{.groups = 3, .kept = 2}, 16) == "grouped: groups is 3, expected 1 to 64, a divisor of 16 (E)");
    CHECK(refusal(router{.groups = 0, .kept = 2}, 16) == "grouped: groups is 0, expected 1 to 64, a divisor of 16 (E)");
    CHECK(refusal(router{.groups = 128, .kept = 2}, 256) ==
          "grouped: groups is 128, expected 1 to 64, a divisor of 256 (E)");
    CHECK(refusal(router{.groups = 4, .kept = 5}, 16) == "grouped: kept is 5, expected 1 to 4 (groups)");
    CHECK(refusal(router{.groups = 4, .kept = 0}, 16) == "grouped: kept is 0, expected 1 to 4 (groups)");
    CHECK(refusal(router{.groups = 8, .kept = 1}, 16) == "grouped: k is 3, expected at most 2 (experts of the kept groups)");
    CHECK(refusal(router{.groups = 8, .kept = 1, .mask = moe::group_mask::zero}, 16) == "");
    CHECK(refusal(router{.groups = 1, .kept = 1}, 2) == "top_k: k is 3, expected at most 2 (E)");
  }
}

TEST_SUITE("router/bias_balanced") {
  using router = moe::bias_balanced<softmax_top<2>>;

  TEST_CASE("the bias moves the choice and not the weights") {
    testing::routing<router> m({}, 1, 3, logits({0.5f, 0.3f, 0.2f}));
    m.w.bias(2, 0) = 0.2f;  // .5 .3 .4
    m.forward();
    CHECK(m.experts_of(0) == experts{0, 2});
    CHECK(m.weights_of(0)[1] == doctest::Approx(0.2));
  }
  TEST_CASE("a bias of zeros changes nothing, and the bias gets no gradient") {
    const auto z = testing::normals(8 * 6, 9), g = testing::normals(8 * 6, 10);
    testing::routing<softmax_top<2>> plain({}, 8, 6, z);
    testing::routing<router> m({}, 8, 6, z);
    plain.forward().backward(g);
    m.forward().backward(g);
    CHECK(testing::assignments(m.plan) == testing::assignments(plain.plan));
    CHECK(m.dscores == plain.dscores);
    for (dim e = 0; e < 6; ++e) CHECK(m.dw.bias(e, 0) == 0);
  }
  TEST_CASE("a bias cannot make an expert eligible; one of -inf or NaN takes it out") {
    testing::routing<router> m({}, 1, 4, {-infinity, not_a_number, 1, 2});
    m.w.bias(0, 0) = m.w.bias(1, 0) = 100;
    CHECK(m.forward().experts_of(0) == experts{3, 2});
    m.w.bias(0, 0) = m.w.bias(1, 0) = infinity;
    CHECK(m.forward().experts_of(0) == experts{3, 2});
    m.w.bias(3, 0) = -infinity;
    CHECK(m.forward().experts_of(0) == experts{2});
    m.w.bias(2, 0) = not_a_number;
    CHECK(m.forward().experts_of(0).empty());
  }
  TEST_CASE("the bias is a weight of its own, zero at first, with its place in the gradients") {
    std::vector<moe::slot> list;
    moe::arena catalogue(list), weights, gradients;
    (void)router{}.make_weights({.tokens = 1, .experts = 6}, catalogue);
    (void)router{}.make_weights({.tokens = 1, .experts = 6}, weights);
    (void)router{}.make_gradients({.tokens = 1, .experts = 6}, gradients);
    REQUIRE(list.size() == 1);
    CHECK(list[0].name == "bias");
    CHECK(list[0].start == moe::initial::zeros);
    CHECK(weights.used() == gradients.used());
    CHECK_THROWS_WITH_AS(router{}.check(router::weights{}, {.tokens = 1, .experts = 6}),
                         "bias_balanced: bias is 0 x 0, expected 6 x 1 (E x 1)", moe::shape_error);
  }
  TEST_CASE("update_bias moves towards the mean load by the sign alone") {
    float bias[] = {1, 1, 1, 1};
    const dim load[] = {10, 2, 4, 0};  // mean 4
    moe::update_bias({bias, 4, 1}, load, 0.25f);
    CHECK(std::vector<float>(bias, bias + 4) == std::vector<float>{0.75f, 1.25f, 1, 1.25f});
    const dim uneven[] = {1, 1, 1, 2};  // mean 1.25, between whole numbers
    moe::update_bias({bias, 4, 1}, uneven, 0.25f);
    CHECK(std::vector<float>(bias, bias + 4) == std::vector<float>{1, 1.5f, 1.25f, 1});
    CHECK_THROWS_WITH_AS(moe::update_bias({bias, 3, 1}, load, 0.25f), "update_bias: bias is 3 x 1, expected 4 x 1 (E x 1)",
                         moe::shape_error);
  }
  TEST_CASE("updates of the bias even out a skewed load") {
    std::vector<float> z = testing::normals(200 * 8, 11);
    for (std::size_t i = 0; i < z.size(); ++i) z[i] += i % 8 < 2 ? 3.f : 0.f;  // two experts that everybody prefers
    testing::routing<router> m({}, 200, 8, z);
    const double before = moe::routing_statistics(m.forward().plan).imbalance;
    for (int step = 0; step < 300; ++step) {
      std::vector<dim> load(8);
      moe::count_load(m.forward().plan, load);
      moe::update_bias(m.w.bias, load, 2e-3f);
    }
    CHECK(before > 3);
    CHECK(moe::routing_statistics(m.plan).imbalance < 1.2);
  }
}

TEST_SUITE("router/top_p") {
  TEST_CASE("the expert that crosses p is kept, and none after it") {
    const auto kept = [](float p, const std::vector<float>& probabilities) {
      testing::routing m(moe::top_p<4>{.p = p}, 1, 4, logits(probabilities));
      return m.forward().experts_of(0).size();
    };
    const std::vector<float> p{0.15f, 0.5f, 0.05f, 0.3f};
    CHECK(kept(1e-4f, p) == 1);
    CHECK(kept(0.49f, p) == 1);
    CHECK(kept(0.51f, p) == 2);
    CHECK(kept(0.79f, p) == 2);
    CHECK(kept(0.81f, p) == 3);
    CHECK(kept(1, p) == 4);
    // Exact sums: 1/2 is not below 1/2.
    CHECK(kept(0.5f, {0.5f, 0.5f, 0, 0}) == 1);
    CHECK(kept(0.75f, {0.5f, 0.5f, 0, 0}) == 2);
  }
  TEST_CASE("best first, ties to the lower expert, KMax cuts") {
    testing::routing m(moe::top_p<2>{.p = 1}, 2, 4, {1, 3, 2, 0, /**/ 5, 5, 5, 5});
    m.forward();
    CHECK(m.experts_of(0) == experts{1, 2});
    CHECK(m.experts_of(1) == experts{0, 1});
  }
  TEST_CASE("weights are probabilities, or divided by their sum") {
    const auto z = logits({0.5f, 0.3f, 0.15f, 0.05f});
    testing::routing raw(moe::top_p<4>{.p = 0.6f}, 1, 4, z);
    testing::routing normed(moe::top_p<4, moe::softmax_over_kept>{.p = 0.6f}, 1, 4, z);
    CHECK(raw.forward().weights_of(0)[1] == doctest::Approx(0.3));
    CHECK(normed.forward().weights_of(0)[1] == doctest::Approx(0.3 / 0.8));
  }
  TEST_CASE("what is not eligible has no probability; a token without eligible experts keeps none") {
    testing::routing m(moe::top_p<3>{.p = 1}, 3, 3,
                       {0, -infinity, not_a_number, /**/ not_a_number, not_a_number, -infinity, /**/ 1, 2, 3});
    m.forward();
    CHECK(m.experts_of(0) == experts{0});
    CHECK(m.weights_of(0) == std::vector<float>{1});
    CHECK(m.experts_of(1).empty());
    CHECK(m.experts_of(2).size() == 3);
  }
  TEST_CASE("choices, weights and gradients are those of the reference") {
    for (const float p : {0.3f, 0.7f, 0.95f}) {
      testing::routing m(moe::top_p<5>{.p = p}, 20, 9, testing::apart(20, 9, 21));
      expect_reference(m, [&](const matrix& z) {
        return reference::route(z, [&](const vec& row) { return reference::top_p(row, double{p}, 5); });
      });
    }
  }
  TEST_CASE("a p out of range and too many choices are refused") {
    CHECK(refusal(moe::top_p<2>{.p = 0}, 4) == "top_p: p is 0.000000, expected more than 0 and at most 1");
    CHECK(refusal(moe::top_p<2>{.p = 1.5f}, 4) == "top_p: p is 1.500000, expected more than 0 and at most 1");
    CHECK(refusal(moe::top_p<2>{.p = not_a_number}, 4).starts_with("top_p: p is"));
    CHECK(refusal(moe::top_p<5>{}, 4) == "top_p: k is 5, expected at most 4 (E)");
  }
}

TEST_SUITE("router/threshold") {
  TEST_CASE("every expert at the threshold or above, best first; none is allowed") {
    testing::routing m(moe::threshold<>{}, 4, 3,
                       {0, -1, 2, /**/ -1, -2, -3, /**/ 1, 1, 1, /**/ infinity, -infinity, not_a_number});
    m.forward();
    CHECK(m.experts_of(0) == experts{2, 0});  // sigmoid(0) is 1/2
    CHECK(m.experts_of(1).empty());
    CHECK(m.experts_of(2) == experts{0, 1, 2});
    CHECK(m.experts_of(3) == experts{0});
    CHECK(m.weights_of(0)[1] == 0.5f);
    CHECK(m.plan.rows() == 6);
  }
  TEST_CASE("at least the best, where asked for, and where one is eligible") {
    testing::routing m(moe::threshold<>{.at_least_one = true}, 3, 3,
                       {-3, -1, -1, /**/ -infinity, not_a_number, -infinity, /**/ 1, 2, -1});
    m.forward();
    CHECK(m.experts_of(0) == experts{1});
    CHECK(m.experts_of(1).empty());
    CHECK(m.experts_of(2) == experts{1, 0});
  }
  TEST_CASE("choices, weights and gradients are those of the reference") {
    testing::routing sigmoid(moe::threshold<>{.tau = 0.6f}, 15, 8, testing::apart(15, 8, 22));
    expect_reference(sigmoid, [](const matrix& z) {
      return reference::route(
          z, [](const vec& row) { return reference::threshold(reference::map(row, reference::sigmoid), 0.6); });
    });
    testing::routing softmax(moe::threshold<moe::score_rule<moe::softmax_score>>{.tau = 0.12f}, 15, 8,
                             testing::apart(15, 8, 23));
    expect_reference(softmax, [](const matrix& z) {
      return reference::route(z, [](const vec& row) { return reference::threshold(reference::softmax(row), 0.12f); });
    });
  }
  TEST_CASE("a threshold that is not a number is refused") {
    CHECK(refusal(moe::threshold<>{.tau = not_a_number}, 4) == "threshold: tau is NaN, expected a number");
  }
}

TEST_SUITE("router/expert_choice") {
  TEST_CASE("every expert takes its C best tokens, ties to the lower token") {
    // Two experts, four tokens, C = ceil(1 * 4 * 1 / 2) = 2.
    testing::routing m(moe::expert_choice<1, moe::select_only>{}, 4, 2, {1, 5, /**/ 3, 5, /**/ 3, 0, /**/ 3, 5});
    m.forward();
    CHECK(m.experts_of(0) == experts{1});
    CHECK(m.experts_of(1) == experts{0, 1});
    CHECK(m.experts_of(2) == experts{0});
    CHECK(m.experts_of(3).empty());
  }
  TEST_CASE("zero and minus zero are a tie") {
    testing::routing m(moe::expert_choice<1, moe::select_only>{}, 4, 2, {-0.f, -1, /**/ 0, -1, /**/ 0, 2, /**/ -1, 3});
    m.forward();
    CHECK(m.experts_of(0) == experts{0});
    CHECK(m.experts_of(1) == experts{0});
    CHECK(m.experts_of(2) == experts{1});
  }
  TEST_CASE("an expert takes fewer where fewer are eligible") {
    testing::routing m(moe::expert_choice<1, moe::select_only>{}, 4, 2,
                       {-infinity, 5, /**/ not_a_number, 5, /**/ 3, -infinity, /**/ -infinity, infinity});
    m.forward();
    CHECK(m.plan.offsets[1] == 1);
    CHECK(m.experts_of(2) == experts{0});
    CHECK(m.experts_of(3) == experts{1});
    CHECK(m.experts_of(0) == experts{1});
  }
  TEST_CASE("the capacity is ceil(factor T k / E), at most T") {
    const auto rows = [](double factor, dim T, dim E) {
      testing::routing m(moe::expert_choice<2>{.factor = factor}, T, E, testing::normals(T * E, 3));
      return m.forward().plan.rows();
    };
    CHECK(rows(1, 10, 4) == 4 * 5);
    CHECK(rows(1.1, 10, 4) == 4 * 6);
    CHECK(rows(100, 10, 4) == 4 * 10);
    CHECK(rows(0.01, 10, 4) == 4 * 1);
    CHECK(rows(1, 0, 4) == 0);
    CHECK(rows(1, 1, 4) == 4);
  }
  TEST_CASE("choices, weights and gradients are those of the reference") {
    testing::routing m(moe::expert_choice<2>{.factor = 1.5}, 14, 6, testing::apart(14, 6, 24));
    expect_reference(m, [](const matrix& z) { return reference::expert_choice(z, 7); });
  }
  TEST_CASE("ties and many equal keys keep exactly C tokens") {
    testing::routing m(moe::expert_choice<1>{}, 100, 4, std::vector<float>(400, 0.25f));
    m.forward();
    for (dim e = 0; e < 4; ++e) CHECK(m.plan.offsets[static_cast<std::size_t>(e + 1)] == 25 * (e + 1));
    CHECK(m.experts_of(24).size() == 4);
    CHECK(m.experts_of(25).empty());
  }
  TEST_CASE("a factor that is not positive is refused") {
    CHECK(refusal(moe::expert_choice<2>{.factor = 0}, 4) == "capacity: factor is 0.000000, expected more than 0, finite");
  }
}

TEST_SUITE("router/statistics") {
  TEST_CASE("loads, idle experts, imbalance and entropy of a plan") {
    testing::routing<plain_top<2>> m({}, 3, 4, {2, 1, 0, 0, /**/ 2, 1, 0, 0, /**/ 2, 0, 1, 0});
    const moe::routing_statistics s(m.forward().plan);
    CHECK(s.rows == 6);
    CHECK(s.dropped == 0);
    CHECK(s.busiest == 3);
    CHECK(s.idle == 1);
    CHECK(s.imbalance == doctest::Approx(3 / 1.5));
    CHECK(s.entropy == doctest::Approx(-0.5 * std::log(0.5) - std::log(1. / 3) / 3 - std::log(1. / 6) / 6));
    std::vector<dim> load(4, 10);
    moe::count_load(m.plan, load);
    CHECK(load == std::vector<dim>{13, 12, 11, 10});  // adds
    std::vector<dim> wrong(3);
    CHECK_THROWS_WITH_AS(moe::count_load(m.plan, wrong), "count_load: load has 3 elements, expected 4 (E)",
                         moe::shape_error);
  }
  TEST_CASE("an even load has imbalance 1 and entropy log E; no row has none") {
    testing::routing<plain_top<1>> m({}, 4, 4, {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1});
    CHECK(moe::routing_statistics(m.forward().plan).imbalance == doctest::Approx(1));
    CHECK(moe::routing_statistics(m.plan).entropy == doctest::Approx(std::log(4)));
    testing::routing<plain_top<1>> none({}, 0, 4, {});
    CHECK(moe::routing_statistics(none.forward().plan).imbalance == 0);
    CHECK(moe::routing_statistics(none.plan).entropy == 0);
    CHECK(moe::routing_statistics(none.plan).idle == 4);
  }
}
