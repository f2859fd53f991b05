// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/backend/scalar.hpp"
#include "moe/router/top_k.hpp"
#include "support/routing.hpp"

namespace {

using moe::dim;

constexpr float infinity = std::numeric_limits<float>::infinity(), not_a_number = std::numeric_limits<float>::quiet_NaN();

/// The score at z for a token with these logits.
template <class Score>
float at(Score score, float z, const std::vector<float>& row = {}) {
  return score(z, Score::over == moe::reduction::all ? moe::detail::statistics(row.data(), static_cast<moe::idx>(row.size()))
                                                     : moe::row_statistics{});
}

/// The weights of one token that keeps both experts.
template <class Norm>
std::vector<float> two_sigmoids(float a, float b) {
  using router = moe::top_k<2, moe::score_rule<moe::sigmoid_score, Norm>>;
  return testing::routing<router>({}, 1, 2, {a, b}).forward().weights_of(0);
}

/// Ranks by the distance from zero: not monotone, so that keys must be computed.
struct by_distance : moe::unnormalised {
  static constexpr moe::reduction over = moe::reduction::none;
  static constexpr bool ranks_by_score = false, keeps_scores = true;
  static constexpr float scale = 2;
  float key(float z, moe::row_statistics) const noexcept { return std::fabs(z); }
  float raw(float z, moe::row_statistics) const noexcept { return z * z; }
  float slope(float z, float) const noexcept { return 2 * z; }
};

}  // namespace

TEST_SUITE("router/score") {
  TEST_CASE("scores are their formulas, from very small to very large logits") {
    for (const float z : {-60.f, -20.f, -3.f, -1.f, 0.f, 0.5f, 2.f, 15.f, 60.f}) {
      CAPTURE(z);
      CHECK(at(moe::sigmoid_score{}, z) == doctest::Approx(reference::sigmoid(z)).epsilon(1e-6));
      CHECK(at(moe::sqrt_softplus_score{}, z) == doctest::Approx(std::sqrt(std::log1p(std::exp(double{z})))).epsilon(1e-6));
      CHECK(at(moe::softmax_score{}, z, {z, 1.f, -2.f}) == doctest::Approx(reference::softmax({z, 1, -2})[0]).epsilon(1e-6));
      CHECK(at(moe::identity_score{}, z) == z);
    }
  }
  TEST_CASE("scores at the ends of the line are numbers") {
    CHECK(at(moe::sigmoid_score{}, -1000.f) == 0);
    CHECK(at(moe::sigmoid_score{}, 1000.f) == 1);
    CHECK(at(moe::sigmoid_score{}, infinity) == 1);
    CHECK(at(moe::sqrt_softplus_score{}, -1000.f) == 0);
    CHECK(at(moe::sqrt_softplus_score{}, 1e4f) == doctest::Approx(100));
    CHECK(moe::sqrt_softplus_score{}.slope(-1000.f, 0.f) == 0);
    CHECK(at(moe::softmax_score{}, 1000.f, {1000.f, 999.f}) == doctest::Approx(1 / (1 + std::exp(-1.0))));
    CHECK(at(moe::softmax_score{}, -1000.f, {1000.f, -1000.f}) == 0);
  }
  TEST_CASE("softmax leaves out what is not eligible") {
    CHECK(at(moe::softmax_score{}, 1.f, {1.f, -infinity, 1.f, not_a_number}) == 0.5f);
  }
  TEST_CASE("slopes are derivatives") {
    const auto slope = [](auto f, double z) { return (f(z + 1e-6) - f(z - 1e-6)) / 2e-6; };
    for (const float z : {-8.f, -1.f, 0.f, 0.5f, 4.f}) {
      CAPTURE(z);
      CHECK(moe::sigmoid_score{}.slope(z, at(moe::sigmoid_score{}, z)) ==
            doctest::Approx(slope(reference::sigmoid, z)).epsilon(1e-4));
      CHECK(moe::sqrt_softplus_score{}.slope(z, at(moe::sqrt_softplus_score{}, z)) ==
            doctest::Approx(slope(reference::sqrt_softplus, z)).epsilon(1e-4));
    }
  }

  // Four forms of a denominator that agree where the sum is near one, and differ where it is small.
  TEST_CASE("the constant in the denominator: none") {
    CHECK(two_sigmoids<moe::sum_norm>(-46, -46) == std::vector<float>{0.5f, 0.5f});
    for (const float w : two_sigmoids<moe::sum_norm>(-1000, -1000)) CHECK(std::isnan(w));  // 0 / 0, as the formula says
  }
  TEST_CASE("the constant in the denominator: added") {
    const double s = reference::sigmoid(-46);  // 1.05e-20
    CHECK(two_sigmoids<moe::sum_plus<-20>>(-46, -46)[0] == doctest::Approx(s / (2 * s + 1e-20)).epsilon(1e-5));
    CHECK(two_sigmoids<moe::sum_plus<-6>>(-46, -46)[0] == doctest::Approx(s / 1e-6).epsilon(1e-5));
    CHECK(two_sigmoids<moe::sum_plus<-20>>(-1000, -1000) == std::vector<float>{0, 0});
    const double m = reference::sigmoid(-14);  // 8.3e-7
    CHECK(two_sigmoids<moe::sum_plus<-6>>(-14, -14)[0] == doctest::Approx(m / (2 * m + 1e-6)).epsilon(1e-5));
  }
  TEST_CASE("the constant in the denominator: a floor") {
    const double s = reference::sigmoid(-46);
    CHECK(two_sigmoids<moe::sum_at_least<-12>>(-46, -46)[0] == doctest::Approx(s / 1e-12).epsilon(1e-5));
    CHECK(two_sigmoids<moe::sum_at_least<-12>>(-14, -14)[0] == doctest::Approx(0.5).epsilon(1e-6));
  }
  TEST_CASE("gradients where the sum is as small as the constant") {
    const auto check = [](auto norm, double (*divisor)(double)) {
      using rule = moe::score_rule<moe::sigmoid_score, decltype(norm)>;
      testing::routing<moe::top_k<2, rule>> m({}, 1, 2, {-13.5f, -14.f});
      m.forward().backward({3, -1});
      reference::vec z{-13.5, -14};
      const auto loss = [&] {
        const double a = reference::sigmoid(z[0]), b = reference::sigmoid(z[1]);
        return (3 * a - b) / divisor(a + b);
      };
      CHECK(reference::error(m.dscores, reference::gradient(z, loss)) < 1e-4);
    };
    check(moe::sum_norm{}, [](double sum) { return sum; });
    check(moe::sum_plus<-6>{}, [](double sum) { return sum + 1e-6; });
    check(moe::sum_at_least<-5>{}, [](double sum) { return std::max(sum, 1e-5); });
    check(moe::sum_at_least<-7>{}, [](double sum) { return std::max(sum, 1e-7); });
  }
  TEST_CASE("powers of ten are the nearest floats") {
    CHECK(moe::detail::power_of_ten(-20) == 1e-20f);
    CHECK(moe::detail::power_of_ten(-12) == 1e-12f);
    CHECK(moe::detail::power_of_ten(-6) == 1e-6f);
    CHECK(moe::detail::power_of_ten(0) == 1.f);
    CHECK(moe::detail::power_of_ten(3) == 1000.f);
  }
  TEST_CASE("a rule of one's own may rank by something else than the score") {
    testing::routing<moe::top_k<2, by_distance>> m({}, 1, 4, {-3, 1, 2, 0.5f});
    m.forward().backward({1, 10, 100, 1000});
    CHECK(m.experts_of(0) == std::vector<dim>{0, 2});
    CHECK(m.weights_of(0) == std::vector<float>{18, 8});  // scale z^2
    CHECK(m.dscores == std::vector<float>{-12, 0, 800, 0});
  }
}

TEST_SUITE("router/top_k") {
  TEST_CASE("the best first, ties to the lower expert") {
    testing::routing<moe::top_k<3>> m({}, 2, 5, {1, 3, 2, 3, 0, /**/ 7, 7, 7, 7, 7});
    m.forward();
    CHECK(m.experts_of(0) == std::vector<dim>{1, 3, 2});
    CHECK(m.experts_of(1) == std::vector<dim>{0, 1, 2});
    CHECK(m.weights_of(1)[0] == doctest::Approx(1. / 3));
  }
  TEST_CASE("what is not eligible is never chosen, and a token with fewer keeps fewer") {
    testing::routing<moe::top_k<2>> m({}, 4, 3,
                                      {-infinity, 5, -infinity, /**/ not_a_number, 1, 2, /**/ not_a_number, -infinity,
                                       -infinity, /**/ -1, not_a_number, not_a_number});
    m.forward().backward(std::vector<float>(12, 1));
    CHECK(m.experts_of(0) == std::vector<dim>{1});
    CHECK(m.weights_of(0) == std::vector<float>{1});
    CHECK(m.experts_of(1) == std::vector<dim>{2, 1});
    CHECK(m.experts_of(2).empty());
    CHECK(m.experts_of(3) == std::vector<dim>{0});
    CHECK(m.plan.rows() == 4);
    CHECK(moe::fault(m.plan) == nullptr);
    for (const float d : m.dscores) CHECK(std::isfinite(d));  // no NaN leaks from an expert that was not chosen
  }
  TEST_CASE("not-a-number beside chosen experts does not reach weights or gradients of a softmax over all") {
    testing::routing<moe::top_k<1, moe::score_rule<moe::softmax_score>>> m({}, 1, 4, {1, not_a_number, -infinity, 0});
    m.forward().backward({1, 1, 1, 1});
    const double p = 1 / (1 + std::exp(-1.0));
    CHECK(m.weights_of(0)[0] == doctest::Approx(p));
    CHECK(m.dscores[0] == doctest::Approx(p * (1 - p)));
    CHECK(m.dscores[1] == 0);
    CHECK(m.dscores[2] == 0);
    CHECK(m.dscores[3] == doctest::Approx(-p * (1 - p)));
  }
  TEST_CASE("plus infinity is taken before all others; a sigmoid weighs it by 1, a softmax by NaN") {
    using sigmoid = moe::top_k<2, moe::score_rule<moe::sigmoid_score>>;
    testing::routing<sigmoid> m({}, 1, 3, {4, 0, infinity});
    m.forward();
    CHECK(m.experts_of(0) == std::vector<dim>{2, 0});
    CHECK(m.weights_of(0)[0] == 1);
    testing::routing<moe::top_k<2>> s({}, 1, 3, {4, 0, infinity});
    s.forward();
    CHECK(s.experts_of(0) == std::vector<dim>{2, 0});
    CHECK(std::isnan(s.weights_of(0)[0]));
    testing::routing<moe::top_k<2, moe::select_only>> o({}, 1, 3, {4, 0, infinity});
    CHECK(o.forward().weights_of(0) == std::vector<float>{1, 1});
  }
  TEST_CASE("one expert, all experts, no token") {
    testing::routing<moe::top_k<1>> one({}, 2, 1, {-5, 8});
    one.forward().backward({1, 2});
    CHECK(one.weights_of(0) == std::vector<float>{1});
    CHECK(one.dscores == std::vector<float>{0, 0});
    testing::routing<moe::top_k<3, moe::score_rule<moe::softmax_score>>> all({}, 1, 3, {0, 1, 2});
    double sum = 0;
    for (const float w : all.forward().weights_of(0)) sum += w;
    CHECK(sum == doctest::Approx(1));
    testing::routing<moe::top_k<2, moe::score_rule<moe::softmax_score>>> none({}, 0, 4, {});
    none.forward().backward({});
    CHECK(none.plan.rows() == 0);
    CHECK(moe::fault(none.plan) == nullptr);
  }
  TEST_CASE("an inference context keeps nothing and gives the same plan") {
    using router = moe::top_k<2, moe::score_rule<moe::sigmoid_score, moe::sum_norm>>;
    const auto z = testing::normals(7 * 5, 3);
    testing::routing<router> training({}, 7, 5, z), inference({}, 7, 5, z, false);
    training.forward();
    inference.forward();
    CHECK(testing::assignments(training.plan) == testing::assignments(inference.plan));
    for (dim t = 0; t < 7; ++t) CHECK(training.weights_of(t) == inference.weights_of(t));
    CHECK_FALSE(inference.ctx.scores);
  }
  TEST_CASE("more choices than experts are refused") {
    CHECK_THROWS_WITH_AS((testing::routing<moe::top_k<5>>({}, 2, 4, std::vector<float>(8))),
                         "top_k: k is 5, expected at most 4 (E)", moe::shape_error);
  }
}
