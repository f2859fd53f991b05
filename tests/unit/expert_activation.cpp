// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "moe/expert/activation.hpp"

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity(), huge = std::numeric_limits<float>::max();

struct reference {
  double value, slope;
};
double sigmoid(double z) { return z < 0 ? std::exp(z) / (1 + std::exp(z)) : 1 / (1 + std::exp(-z)); }
reference relu(double z) { return {z > 0 ? z : 0, z > 0 ? 1. : 0.}; }
reference relu_squared(double z) { return {z > 0 ? z * z : 0, z > 0 ? 2 * z : 0}; }
reference silu(double z) { return {z * sigmoid(z), sigmoid(z) * (1 + z * sigmoid(-z))}; }
reference gelu(double z) {
  const double normal = std::erfc(-z / std::sqrt(2.)) / 2;
  return {z * normal, normal + z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.))};
}
reference gelu_tanh(double z) {
  const double root = std::sqrt(2 / std::acos(-1.)), t = std::tanh(root * (z + 0.044715 * z * z * z));
  return {z / 2 * (1 + t), (1 + t) / 2 + z / 2 * (1 - t * t) * root * (1 + 3 * 0.044715 * z * z)};
}
reference identity(double z) { return {z, 1}; }

// Largest error of value and slope over -30 .. 30, relative to max(1, |wanted|): what a float can tell of numbers near one.
template <class Act>
double worst(Act act, reference (*want)(double)) {
  double w = 0;
  for (int i = -30000; i <= 30000; ++i) {
    const float z = static_cast<float>(i) / 1000;
    const reference r = want(z);
    w = std::max(w, std::fabs(act(z) - r.value) / std::max(1., std::fabs(r.value)));
    w = std::max(w, std::fabs(act.slope(z) - r.slope) / std::max(1., std::fabs(r.slope)));
  }
  return w;
}
template <class Act>
void check_far(Act act, float value_left, float slope_left) {
  for (const float z : {120.f, 200.f, 1e6f, 1e19f, 1e20f, 1e30f, huge}) {
    CAPTURE(z);
    CHECK(act(z) == z);
    CHECK(act.slope(z) == 1.f);
    CHECK(act(-z) == value_left);
    CHECK(act.slope(-z) == slope_left);
  }
}

struct gradient {
  float value, dg, du;
};
template <class Form>
gradient at(const Form& form, float g, float u, float da = 1) {
  gradient r{};
  r.value = form.slope(g, u, da, r.dg, r.du);
  CHECK(r.value == form(g, u));
  return r;
}

}  // namespace

TEST_SUITE("expert/activation") {
  TEST_CASE("values and slopes at points checked by hand") {
    CHECK(moe::identity{}(-2.5f) == -2.5f);
    CHECK(moe::identity{}.slope(-2.5f) == 1);
    CHECK(moe::relu{}(3.f) == 3);
    CHECK(moe::relu{}(-3.f) == 0);
    CHECK(moe::relu{}.slope(3.f) == 1);
    CHECK(moe::relu{}.slope(-3.f) == 0);
    CHECK(moe::relu_squared{}(3.f) == 9);
    CHECK(moe::relu_squared{}.slope(3.f) == 6);
    CHECK(moe::relu_squared{}(-3.f) == 0);
    CHECK(moe::relu_squared{}.slope(-3.f) == 0);
    CHECK(moe::silu{}(1.f) == doctest::Approx(0.7310585786));
    CHECK(moe::silu{}.slope(1.f) == doctest::Approx(0.9276705118));
    CHECK(moe::gelu{}(1.f) == doctest::Approx(0.8413447461));
    CHECK(moe::gelu{}.slope(1.f) == doctest::Approx(1.0833154706));
    CHECK(moe::gelu_tanh{}(1.f) == doctest::Approx(0.8411919906));
    CHECK(moe::gelu_tanh{}.slope(1.f) == doctest::Approx(1.0829640839));
  }
  TEST_CASE("at zero all are zero, and the slope of relu is 0") {
    CHECK(moe::relu{}(0.f) == 0);
    CHECK(moe::relu{}.slope(0.f) == 0);
    CHECK(moe::relu{}.slope(-0.f) == 0);
    CHECK(moe::relu_squared{}.slope(0.f) == 0);
    CHECK(moe::silu{}(0.f) == 0);
    CHECK(moe::silu{}.slope(0.f) == 0.5f);
    CHECK(moe::gelu{}(0.f) == 0);
    CHECK(moe::gelu{}.slope(0.f) == 0.5f);
    CHECK(moe::gelu_tanh{}(0.f) == 0);
    CHECK(moe::gelu_tanh{}.slope(0.f) == 0.5f);
  }
  TEST_CASE("values and slopes agree with double to a few roundings over -30 .. 30") {
    CHECK(worst(moe::identity{}, identity) == 0);
    CHECK(worst(moe::relu{}, relu) == 0);
    CHECK(worst(moe::relu_squared{}, relu_squared) < 1e-7);
    CHECK(worst(moe::silu{}, silu) < 1.2e-6);  // the slope has z times the rounding of 1 - s
    CHECK(worst(moe::gelu{}, gelu) < 4e-7);
    CHECK(worst(moe::gelu_tanh{}, gelu_tanh) < 1e-6);
  }
  TEST_CASE("far from zero values and slopes reach their limits, without NaN") {
    check_far(moe::relu{}, 0, 0);
    check_far(moe::silu{}, 0, 0);
    check_far(moe::gelu{}, 0, 0);
    check_far(moe::gelu_tanh{}, 0, 0);
    CHECK(moe::silu{}(-50.f) == doctest::Approx(silu(-50).value).epsilon(1e-5));
    CHECK(moe::silu{}.slope(-50.f) == doctest::Approx(silu(-50).slope).epsilon(1e-5));
    CHECK(moe::gelu{}(-50.f) == 0);
    CHECK(moe::gelu{}.slope(-50.f) == 0);
  }
  TEST_CASE("NaN stays NaN: a layer that has diverged does not look healthy") {
    const float nan = std::nanf("");
    CHECK(std::isnan(moe::relu{}(nan)));
    CHECK(std::isnan(moe::relu_squared{}(nan)));
    CHECK(std::isnan(moe::silu{}(nan)));
    CHECK(std::isnan(moe::gelu{}(nan)));
    CHECK(std::isnan(moe::gelu_tanh{}(nan)));
    CHECK(std::isnan(moe::gelu_tanh{}.slope(nan)));
    CHECK(std::isnan(moe::gpt_oss_glu{}(nan, 1.f)));
    CHECK(std::isnan(moe::gpt_oss_glu{}(1.f, nan)));
  }
  TEST_CASE("the rules are generic on the value: a double keeps its digits") {
    CHECK(moe::relu{}(0.1) == 0.1);
    CHECK(moe::silu{}(0.1) == doctest::Approx(silu(0.1).value).epsilon(1e-15));
    double dz = 0;
    CHECK(moe::plain<moe::relu>{}.slope(0.1, 0.7, dz) == 0.1);
    CHECK(dz == 0.7);
  }
  TEST_CASE("a plain form multiplies the slope, a gated one multiplies both factors") {
    float dz = 0;
    CHECK(moe::plain<moe::relu_squared>{}.slope(3.f, 0.5f, dz) == 9);
    CHECK(dz == 3);
    const auto r = at(moe::glu<moe::relu_squared>{}, 3, 5, 2);
    CHECK(r.value == 45);
    CHECK(r.dg == 2 * 5 * 6);
    CHECK(r.du == 2 * 9);
  }
  TEST_CASE("the shifted gate is (u + 1) g sigmoid(1.702 g)") {
    const double s = sigmoid(1.702 * 0.5);
    const auto r = at(moe::shifted_glu{}, 0.5f, 2, 3);
    CHECK(r.value == doctest::Approx(3 * 0.5 * s).epsilon(1e-6));
    CHECK(r.du == doctest::Approx(3 * 0.5 * s).epsilon(1e-6));
    CHECK(r.dg == doctest::Approx(3 * 3 * (s + 1.702 * 0.5 * s * (1 - s))).epsilon(1e-6));
    CHECK(at(moe::shifted_glu{}, 0.5f, -1).value == 0);
    CHECK(at(moe::shifted_glu{}, -200.f, 1).value == 0);
    CHECK(at(moe::shifted_glu{}, -200.f, 1).dg == 0);
  }
  TEST_CASE("a clamp bounds the gate from above and the other factor on both sides") {
    const moe::clamped<moe::glu<moe::identity>> form{.form = {}, .limit = 2};
    CHECK(form(5.f, 1.f) == 2);
    CHECK(form(-5.f, 1.f) == -5);
    CHECK(form(1.f, 5.f) == 2);
    CHECK(form(1.f, -5.f) == -2);
    CHECK(form(infinity, infinity) == 4);
    CHECK(form(1.f, -infinity) == -2);
  }
  TEST_CASE("a clamp passes the gradient at the limit itself and stops it beyond") {
    const moe::clamped<moe::glu<moe::identity>> form{.form = {}, .limit = 2};
    const float above = std::nextafter(2.f, 3.f);
    CHECK(at(form, 2, 2).dg == 2);
    CHECK(at(form, 2, 2).du == 2);
    CHECK(at(form, 1, -2).du == 1);
    CHECK(at(form, above, 1).dg == 0);
    CHECK(at(form, above, 1).du == 2);
    CHECK(at(form, 1, above).du == 0);
    CHECK(at(form, 1, above).dg == 2);
    CHECK(at(form, 1, -above).du == 0);
    CHECK(at(form, -100, 1).dg == 1);
  }
  TEST_CASE("gpt-oss: limit 7, alpha 1.702, the clamp before the product") {
    const moe::gpt_oss_glu form{};
    CHECK(form.limit == 7);
    CHECK(form.form.alpha == 1.702f);
    const double top = 8 * 7 * sigmoid(1.702 * 7);
    CHECK(form(1000.f, 1000.f) == doctest::Approx(top).epsilon(1e-6));
    CHECK(form(1000.f, -1000.f) == doctest::Approx(-6 * 7 * sigmoid(1.702 * 7)).epsilon(1e-6));
    CHECK(at(form, 7, 7).dg > 0);
    CHECK(at(form, 7, 7).du > 0);
    CHECK(at(form, 7.01f, 7.01f).dg == 0);
    CHECK(at(form, 7.01f, 7.01f).du == 0);
    CHECK(at(form, infinity, infinity).dg == 0);
    CHECK(at(form, -huge, -huge).value == 0);
  }
}
