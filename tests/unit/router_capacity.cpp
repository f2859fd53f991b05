// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/backend/scalar.hpp"
#include "moe/router/capacity.hpp"
#include "moe/router/presets.hpp"
#include "moe/router/renormalised.hpp"
#include "moe/router/statistics.hpp"
#include "moe/router/threshold.hpp"
#include "moe/router/top_k.hpp"
#include "support/routing.hpp"

namespace {

using moe::dim;
using moe::idx;
using reference::matrix;
using reference::vec;
using experts = std::vector<dim>;

constexpr float infinity = std::numeric_limits<float>::infinity(), not_a_number = std::numeric_limits<float>::quiet_NaN();

template <int K, class Rule = moe::softmax_over_kept>
using given = moe::capacity<moe::top_k<K, Rule>, moe::given_capacity>;

/// Three tokens of two choices on three experts. First choices 0 0 0, second choices 1 1 2.
const std::vector<float> crowded{5, 4, 0, /**/ 6, 3, 0, /**/ 7, 0, 1};

/// A reference for one token under a rule that divides by the sum: weights of the choices `chosen`, dropped ones counted in
/// the sum and left out of the result. s: scores.
reference::choices weigh(const vec& s, const experts& chosen, double epsilon, double rho) {
  double sum = 0;
  reference::choices kept;
  for (const dim e : chosen) sum += s[static_cast<std::size_t>(e < 0 ? -1 - e : e)];
  for (const dim e : chosen)
    if (e >= 0) kept.push_back({e, rho * s[static_cast<std::size_t>(e)] / (sum + epsilon)});
  return kept;
}

template <class R>
std::vector<experts> all_experts(const testing::routing<R>& m) {
  std::vector<experts> all;
  for (dim t = 0; t < m.sizes.tokens; ++t) all.push_back(m.experts_of(t));
  return all;
}

/// Weights and gradients of a plan with drops against the reference, dropped choices in the sum.
template <class R, class Score>
void expect_weights(testing::routing<R>& m, Score score, double epsilon, double rho, std::uint64_t seed) {
  const dim T = m.sizes.tokens, E = m.sizes.experts;
  const auto g = testing::normals(T * E, seed);
  m.backward(g);
  const auto chosen = all_experts(m);
  matrix z(T, E, m.scores);
  const matrix coefficient(T, E, g);
  const auto route = [&] {
    std::vector<reference::choices> all;
    for (dim t = 0; t < T; ++t) all.push_back(weigh(score(z.row(t)), chosen[static_cast<std::size_t>(t)], epsilon, rho));
    return all;
  };
  testing::expect_choices(m.choices(), route());
  CHECK(reference::error(m.dscores, reference::gradient(z.values, [&] { return reference::loss(route(), coefficient); })) <
        1e-5);
}

template <class R>
std::string refusal(R router) {
  try {
    moe::detail::check_shape(router, {.tokens = 4, .d = 1, .experts = 4});
  } catch (const moe::shape_error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_SUITE("router/capacity") {
  TEST_CASE("the capacity of each rule") {
    const moe::shape s{.tokens = 10, .experts = 4};
    CHECK(moe::capacity_factor{}(s, 2) == 5);
    CHECK(moe::capacity_factor{.factor = 1.25}(s, 2) == 7);  // 6.25
    CHECK(moe::capacity_factor{.factor = 0.1, .at_least = 3}(s, 2) == 3);
    CHECK(moe::capacity_factor{.factor = 0.01}(s, 2) == 1);
    CHECK(moe::capacity_factor{.factor = 1e300}(s, 2) == 10);  // never more than T
    CHECK(moe::capacity_factor{.factor = 0.1, .at_least = 30}(s, 2) == 10);
    CHECK(moe::capacity_per_token{}(s, 2) == 3);                // 2.5
    CHECK(moe::capacity_per_token{.factor = 1.25}(s, 8) == 4);  // 3.125, whatever k
    CHECK(moe::given_capacity{.rows = 7}(s, 2) == 7);
    CHECK(moe::capacity_factor{}({.tokens = 0, .experts = 4}, 2) == 0);
  }
  TEST_CASE("every first choice goes before any second one") {
    // Expert 1: token 0's second choice, token 1's second choice; token 2's first choice of 1 comes before both.
    const std::vector<float> z{5, 4, 0, /**/ 6, 3, 0, /**/ 0, 9, 1};
    testing::routing m(given<2>{.limit = {.rows = 2}}, 3, 3, z);
    m.forward();
    CHECK(all_experts(m) == std::vector<experts>{{0, 1}, {0, -2}, {1, 2}});
    CHECK(moe::dropped(m.plan) == 1);
    CHECK(moe::fault(m.plan) == nullptr);
  }
  TEST_CASE("by token alone, whatever the choice") {
    const std::vector<float> z{5, 4, 0, /**/ 6, 3, 0, /**/ 0, 9, 1};
    testing::routing m(given<2>{.limit = {.rows = 2}, .order = moe::drop_order::tokens}, 3, 3, z);
    m.forward();
    CHECK(all_experts(m) == std::vector<experts>{{0, 1}, {0, 1}, {-2, 2}});
  }
  TEST_CASE("by score: the largest unbiased probabilities stay, ties to the lower token") {
    // Probability of expert 0 falls with the other logits: token 2 first, then 0 and 1 alike.
    const std::vector<float> z{2, 1, 0, /**/ 2, 1, 0, /**/ 2, -1, -2};
    for (const dim rows : {1, 2}) {
      testing::routing m(given<1>{.limit = {.rows = rows}, .order = moe::drop_order::score}, 3, 3, z);
      m.forward();
      CHECK(all_experts(m) == std::vector<experts>{{rows == 1 ? dim{-1} : dim{0}}, {-1}, {0}});
    }
  }
  TEST_CASE("by score looks past the selection bias and the groups") {
    using router = moe::capacity<moe::grouped<moe::bias_balanced<moe::top_k<1, moe::score_rule<moe::sigmoid_score>>>>,
                                 moe::given_capacity>;
    router r{.limit = {.rows = 1}, .order = moe::drop_order::score};
    testing::routing m(r, 2, 2, {0.5f, 0.4f, /**/ 0.6f, 0.1f});
    m.w.bias(1, 0) = 1;  // both choose expert 1; token 0 has the larger sigmoid there
    m.forward();
    CHECK(all_experts(m) == std::vector<experts>{{1}, {-2}});
  }
  TEST_CASE("weights stay as they were before dropping") {
    testing::routing<moe::top_k<2>> free({}, 3, 3, crowded);
    testing::routing m(given<2>{.limit = {.rows = 2}}, 3, 3, crowded);
    free.forward();
    m.forward();
    CHECK(all_experts(m) == std::vector<experts>{{0, 1}, {0, 1}, {-1, 2}});
    CHECK(m.weights_of(0) == free.weights_of(0));
    CHECK(m.weights_of(2) == std::vector<float>{free.weights_of(2)[1]});
  }
  TEST_CASE("a dropped choice keeps its share in weights and gradients, for every kind of rule and order") {
    for (const auto order : {moe::drop_order::choices, moe::drop_order::tokens, moe::drop_order::score})
      for (std::uint64_t seed = 1; seed <= 3; ++seed) {
        const auto z = testing::apart(20, 6, seed);
        testing::routing kept(moe::capacity<moe::top_k<2>>{.limit = {.factor = 0.6}, .order = order}, 20, 6, z);
        kept.forward();
        REQUIRE(moe::dropped(kept.plan) > 0);
        expect_weights(kept, reference::softmax, 0, 1, seed);
        using sigmoid = moe::top_k<3, moe::score_rule<moe::sigmoid_score, moe::sum_plus<-20>, 5, 2>>;
        testing::routing s(moe::capacity<sigmoid>{.limit = {.factor = 0.8}, .order = order}, 20, 6, z);
        s.forward();
        REQUIRE(moe::dropped(s.plan) > 0);
        expect_weights(s, [](const vec& row) { return reference::map(row, reference::sigmoid); }, 1e-20, 2.5, seed);
      }
  }
  TEST_CASE("no expert takes more than its capacity, and what is left of the choices is dropped") {
    for (const double factor : {0.25, 0.5, 1.0, 2.0}) {
      testing::routing m(moe::capacity<moe::top_k<2>>{.limit = {.factor = factor}}, 37, 5, testing::normals(37 * 5, 7));
      m.forward();
      const dim room = moe::capacity_factor{.factor = factor}(m.sizes, 2);
      for (dim e = 0; e < 5; ++e)
        CHECK(m.plan.offsets[static_cast<std::size_t>(e + 1)] - m.plan.offsets[static_cast<std::size_t>(e)] <= room);
      CHECK(m.plan.rows() + moe::dropped(m.plan) == 37 * 2);
      CHECK(moe::fault(m.plan) == nullptr);
      std::vector<dim> load(5);
      moe::count_load(m.plan, load);
      testing::routing<moe::top_k<2>> free({}, 37, 5, m.scores);
      free.forward();
      for (dim e = 0; e < 5; ++e)
        CHECK(load[static_cast<std::size_t>(e)] ==
              free.plan.offsets[static_cast<std::size_t>(e + 1)] - free.plan.offsets[static_cast<std::size_t>(e)]);
    }
  }
  TEST_CASE("with room for all it is the router itself, bit for bit in the plan") {
    const auto z = testing::normals(20 * 6, 8);
    testing::routing<moe::top_k<2>> free({}, 20, 6, z);
    testing::routing m(moe::capacity<moe::top_k<2>>{.limit = {.factor = 10}}, 20, 6, z);
    free.forward();
    m.forward();
    CHECK(testing::assignments(m.plan) == testing::assignments(free.plan));
    for (dim t = 0; t < 20; ++t) CHECK(m.weights_of(t) == free.weights_of(t));
  }
  TEST_CASE("a token that loses every choice has no row and a gradient of zero") {
    testing::routing m(given<1>{.limit = {.rows = 1}}, 3, 2, {1, 0, /**/ 2, 0, /**/ 0, 1});
    m.forward().backward({1, 1, 1, 1, 1, 1});
    CHECK(all_experts(m) == std::vector<experts>{{0}, {-1}, {1}});
    CHECK(m.dscores[2] == 0);
    CHECK(m.dscores[3] == 0);
  }
  TEST_CASE("scores that are not eligible or infinite under capacity") {
    testing::routing m(given<1, moe::score_rule<moe::softmax_score>>{.limit = {.rows = 1}, .order = moe::drop_order::score},
                       4, 2, {1, 0, /**/ not_a_number, -infinity, /**/ infinity, 0, /**/ not_a_number, 3});
    m.forward();
    CHECK(all_experts(m) == std::vector<experts>{{0}, {}, {-1}, {1}});  // a probability that is NaN gives way first
    m.router.limit.rows = 2;
    m.forward();
    CHECK(all_experts(m) == std::vector<experts>{{0}, {}, {0}, {1}});
  }
  TEST_CASE("no token, one expert") {
    testing::routing<moe::capacity<moe::top_k<2>>> none({}, 0, 4, {});
    none.forward().backward({});
    CHECK(none.plan.rows() == 0);
    testing::routing one(moe::capacity<moe::top_k<1>>{.limit = {.factor = 0.5}}, 5, 1, {1, 2, 3, 4, 5});
    one.forward();
    CHECK(one.plan.rows() == 3);
    CHECK(moe::dropped(one.plan) == 2);
  }
  TEST_CASE("a limit that cannot work is refused") {
    using by_factor = moe::capacity<moe::top_k<2>>;
    CHECK(refusal(by_factor{.limit = {.factor = 0}}) == "capacity: factor is 0.000000, expected more than 0, finite");
    CHECK(refusal(by_factor{.limit = {.factor = std::numeric_limits<double>::infinity()}}) ==
          "capacity: factor is inf, expected more than 0, finite");
    CHECK(refusal(by_factor{.limit = {.factor = -1}}) == "capacity: factor is -1.000000, expected more than 0, finite");
    CHECK(refusal(by_factor{.limit = {.at_least = -1}}) == "capacity: at_least is -1, expected at least 0");
    CHECK(refusal(given<2>{.limit = {.rows = 0}}) == "capacity: rows is 0, expected at least 1");
    CHECK(refusal(given<5>{}) == "top_k: k is 5, expected at most 4 (E)");
  }
}

TEST_SUITE("router/renormalised") {
  TEST_CASE("the survivors' weights sum to one") {
    testing::routing m(moe::renormalised<given<2>>{.inner = {.limit = {.rows = 2}}}, 3, 3, crowded);
    m.forward();
    CHECK(all_experts(m) == std::vector<experts>{{0, 1}, {0, 1}, {-1, 2}});
    CHECK(m.weights_of(0)[0] + m.weights_of(0)[1] == doctest::Approx(1));
    CHECK(m.weights_of(2) == std::vector<float>{1});
  }
  TEST_CASE("weights and gradients are those of the survivors' scores over their sum") {
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      using router = moe::renormalised<moe::capacity<moe::top_k<3, moe::score_rule<moe::softmax_score>>>>;
      testing::routing m(router{.inner = {.limit = {.factor = 0.7}}}, 20, 6, testing::apart(20, 6, seed));
      m.forward();
      const auto g = testing::normals(20 * 6, seed);
      m.backward(g);
      const auto chosen = all_experts(m);
      matrix z(20, 6, m.scores);
      const auto route = [&] {
        std::vector<reference::choices> all;
        for (dim t = 0; t < 20; ++t) {
          experts kept;
          for (const dim e : chosen[static_cast<std::size_t>(t)])
            if (e >= 0) kept.push_back(e);
          all.push_back(weigh(reference::softmax(z.row(t)), kept, 0, 1));
        }
        return all;
      };
      testing::expect_choices(m.choices(), route());
      const matrix coefficient(20, 6, g);
      CHECK(reference::error(m.dscores,
                             reference::gradient(z.values, [&] { return reference::loss(route(), coefficient); })) < 1e-5);
    }
  }
  TEST_CASE("a sum below float's epsilon divides by that, and then carries no gradient of its own") {
    using router = moe::renormalised<moe::top_k<1, moe::score_rule<moe::sigmoid_score>>>;
    testing::routing<router> m({}, 1, 2, {-20, -30});
    m.forward().backward({1, 1});
    const double s = reference::sigmoid(-20), epsilon = std::numeric_limits<float>::epsilon();
    CHECK(m.weights_of(0)[0] == doctest::Approx(s / epsilon).epsilon(1e-5));
    CHECK(m.dscores[0] == doctest::Approx(s * (1 - s) / epsilon).epsilon(1e-5));
  }
}

TEST_SUITE("router/replay") {
  /// Assignments of one router under one set of scores, replayed under the same scores and under others.
  template <class R>
  void expect_replay(R router, std::uint64_t seed) {
    const dim T = 24, E = 8;
    const auto z = testing::apart(T, E, seed), fresh = testing::apart(T, E, seed + 50),
               g = testing::normals(T * E, seed + 60);
    testing::routing<R> original(router, T, E, z), again(router, T, E, z), other(router, T, E, fresh);
    original.forward().backward(g);
    const moe::recorded_plan recorded = moe::record(original.plan);
    // The same scores: every bit of weights and gradients.
    again.replay(recorded.plan()).backward(g);
    CHECK(testing::assignments(again.plan) == testing::assignments(original.plan));
    for (dim t = 0; t < T; ++t) CHECK(again.weights_of(t) == original.weights_of(t));
    CHECK(again.dscores == original.dscores);
    // Other scores: the same assignments, other weights.
    other.replay(recorded.plan()).backward(g);
    CHECK(all_experts(other) == all_experts(original));
    CHECK(other.dscores != original.dscores);
  }

  TEST_CASE("a recorded plan under the same scores gives the bits of forward; under others it keeps its assignments") {
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      expect_replay(moe::top_k<2>{}, seed);
      expect_replay(moe::deepseek_v3_router<3>{.groups = 4, .kept = 2}, seed);
      expect_replay(moe::capacity<moe::top_k<2>>{.limit = {.factor = 0.6}}, seed);
      expect_replay(moe::capacity<moe::ernie45_router<3>>{.limit = {.factor = 0.6}, .order = moe::drop_order::score}, seed);
      expect_replay(moe::renormalised<moe::capacity<moe::top_k<2>>>{.inner = {.limit = {.factor = 0.6}}}, seed);
      expect_replay(moe::capacity<moe::threshold<>, moe::given_capacity>{.limit = {.rows = 5}}, seed);
    }
  }
  TEST_CASE("under other scores the weights and gradients of a plan with drops are those of its choices") {
    const auto z = testing::apart(20, 6, 1), fresh = testing::apart(20, 6, 2);
    const moe::capacity<moe::top_k<2>> router{.limit = {.factor = 0.6}};
    testing::routing original(router, 20, 6, z), other(router, 20, 6, fresh);
    original.forward();
    REQUIRE(moe::dropped(original.plan) > 0);
    other.replay(original.plan);
    expect_weights(other, reference::softmax, 0, 1, 3);
  }
}
