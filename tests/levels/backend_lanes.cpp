// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "moe/backend/cpu/at_level.hpp"
#include "moe/expert/activation.hpp"
#include "support/levels.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
constexpr float infinity = std::numeric_limits<float>::infinity();

/// y[i] = rule(x[i]) in lanes of the level in use.
template <class Rule>
std::vector<float> map(const std::vector<float>& x, Rule rule) {
  std::vector<float> y(x.size());
  const dim n = static_cast<dim>(x.size());
  moe::arch::at_level_in_use<moe::detail::build_level>([&](auto level) {
    using V = typename decltype(level)::type;
    for (dim j = 0; j < n; j += V::width) {
      const moe::arch::lanes_of_row<V> lane{n - j};
      lane.store(y.data() + j, rule(lane.load(x.data() + j)));
    }
  });
  return y;
}
/// Largest error of rule over x relative to the wanted value, in units of the last place of a float.
template <class Rule>
double worst(const std::vector<float>& x, Rule rule, double (*want)(double)) {
  const std::vector<float> y = map(x, rule);
  double w = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double r = want(x[i]), e = std::abs(y[i] - r) / std::abs(r);
    if (!(e <= w)) w = e;
  }
  return w / std::ldexp(1., -23);
}
std::vector<float> between(float low, float high, int n) {
  std::vector<float> x;
  for (int i = 0; i < n; ++i) x.push_back(low + (high - low) * (static_cast<float>(i) + 0.5f) / static_cast<float>(n));
  return x;
}
const auto exponential = [](auto v) {
  using std::exp;
  return exp(v);
};
const auto hyperbolic = [](auto v) {
  using std::tanh;
  return tanh(v);
};
const auto error_function = [](auto v) {
  using std::erf;
  return erf(v);
};

}  // namespace

TEST_SUITE("backend/lanes") {
  TEST_CASE("exp, tanh and erf are within a few units in the last place at every level") {
    testing::at_every_level([] {
      CHECK(worst(between(-87, 88, 200000), exponential, std::exp) <= 2);
      CHECK(worst(between(-12, 12, 200001), hyperbolic, std::tanh) <= 4);
      CHECK(worst(between(-1e-3f, 1e-3f, 2000), hyperbolic, std::tanh) <= 4);
      CHECK(worst(between(-6, 6, 200001), error_function, std::erf) <= 2);
      CHECK(worst(between(-1e-3f, 1e-3f, 2000), error_function, std::erf) <= 2);
    });
  }
  TEST_CASE("beyond their range they are what they tend to, and NaN of NaN") {
    testing::at_every_level([] {
      const float nan = std::numeric_limits<float>::quiet_NaN(), huge = std::numeric_limits<float>::max();
      const std::vector<float> x{-infinity, -huge, -100, 0, 100, huge, infinity};
      CHECK(map(x, exponential) == std::vector<float>{0, 0, 0, 1, infinity, infinity, infinity});
      CHECK(map(x, hyperbolic) == std::vector<float>{-1, -1, -1, 0, 1, 1, 1});
      CHECK(map(x, error_function) == std::vector<float>{-1, -1, -1, 0, 1, 1, 1});
      for (const float v : {map({nan}, exponential)[0], map({nan}, hyperbolic)[0], map({nan}, error_function)[0]})
        CHECK(std::isnan(v));
    });
  }
  TEST_CASE("rules compute in lanes what they compute with floats") {
    const auto x = testing::normals(103, 1);  // a last, shorter part at every width
    testing::at_every_level([&] {
      const auto same = [&](auto rule) {
        const std::vector<float> y = map(x, rule);
        for (std::size_t i = 0; i < x.size(); ++i) CHECK(y[i] == doctest::Approx(rule(x[i])).epsilon(1e-6));
      };
      same(moe::relu{});
      same(moe::relu_squared{});
      same(moe::silu{});
      same(moe::gelu{});
      same(moe::gelu_tanh{});
      same([](auto v) { return moe::gpt_oss_glu{}(v, v); });
      same([](auto v) { return moe::gelu_tanh{}.slope(v); });
      same([](auto v) { return v - v * v / decltype(v)(3); });
    });
  }
  TEST_CASE("a row's last part leaves what follows it alone, and sums are of that part") {
    testing::at_every_level([] {
      moe::arch::at_level_in_use<moe::detail::build_level>([](auto level) {
        using V = typename decltype(level)::type;
        for (dim n = 1; n <= V::width; ++n) {
          std::vector<float> to(V::width + 1, 7.f);
          const moe::arch::lanes_of_row<V> lane{n};
          lane.store(to.data(), V(2));
          for (dim j = 0; j <= V::width; ++j) CHECK(to[static_cast<std::size_t>(j)] == (j < n ? 2.f : 7.f));
          CHECK(lane.sum(V(2)) == static_cast<float>(2 * n));
          CHECK(lane.sum(lane.load(to.data())) == static_cast<float>(2 * n));
        }
      });
    });
  }
  TEST_CASE("minus zero stays minus zero") {
    CHECK(std::signbit(map({1.f}, [](auto v) { return decltype(v)(-0.f); })[0]));
  }
}
