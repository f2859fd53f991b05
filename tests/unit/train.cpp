// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/train/clip.hpp"
#include "moe/train/initialise.hpp"
#include "moe/train/optimizer.hpp"
#include "moe/train/schedule.hpp"

using namespace moe;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
const float not_a_number = std::nanf("");

/// Ranges from the last to the first, cut smaller than asked for.
struct backwards {
  static constexpr int concurrency() noexcept { return 1; }
  template <class F>
  void for_each(dim n, dim grain, F&& f) const {
    const dim cut = grain / 3 + 1;
    for (dim c = (n + cut - 1) / cut; c-- > 0;) f(c * cut, std::min((c + 1) * cut, n));
  }
};
static_assert(Executor<backwards>);

std::vector<float> normals(std::size_t n, std::uint64_t seed, float deviation = 1.f) {
  std::vector<float> v(n);
  for (std::size_t i = 0; i < n; ++i) v[i] = deviation * rng(seed).normal(i);
  return v;
}

std::string message(auto call) {
  try {
    call();
  } catch (const shape_error& e) {
    return e.what();
  }
  return "no shape_error";
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](float x, float y) { return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y); });
}

double worst_error(const std::vector<float>& got, const std::vector<double>& wanted) {
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(double{got[i]} - wanted[i]));
  return worst;
}

// The optimizers, one weight at a time, in double, with moments that are corrected as the papers write it.
struct adamw_reference {
  double beta1, beta2, epsilon, decay;
  double m = 0, v = 0;
  void step(double rate, int t, double g, double& w) {
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    const double mean = m / (1 - std::pow(beta1, t)), square = v / (1 - std::pow(beta2, t));
    w = w - rate * (mean / (std::sqrt(square) + epsilon) + decay * w);
  }
};
struct sgd_reference {
  double momentum, decay;
  double m = 0;
  void step(double rate, int, double g, double& w) {
    m = momentum * m + g;
    w = w - rate * (m + decay * w);
  }
};

/// Memory of an optimizer for n parameters.
template <class Optimizer>
struct memory_of {
  buffer bytes;
  arena mem;
  typename Optimizer::state state;

  memory_of(const Optimizer& o, dim n) : bytes(o.state_bytes(n)), mem(bytes.bytes()), state(o.make_state(n, mem)) {}
};

/// The largest distance to the reference in 400 steps of 50 weights of order one.
template <class Optimizer, class Reference>
double distance(const Optimizer& optimizer, const Reference& start) {
  constexpr std::size_t n = 50;
  std::vector<float> w = normals(n, 1);
  std::vector<double> reference(w.begin(), w.end());
  std::vector<Reference> state(n, start);
  const memory_of memory(optimizer, n);
  double worst = 0;
  for (int t = 1; t <= 400; ++t) {
    const float rate = 0.01f / static_cast<float>(t % 7 + 1), scale = t % 3 == 0 ? .25f : 1.f;
    const auto dw = normals(n, 100 + static_cast<std::uint64_t>(t), t % 5 == 0 ? 10.f : .1f);
    optimizer.step(serial{}, {.rate = rate, .step = t - 1, .scale = scale}, w, dw, memory.state);
    for (std::size_t i = 0; i < n; ++i) state[i].step(double{rate}, t, double{scale} * double{dw[i]}, reference[i]);
    worst = std::max(worst, worst_error(w, reference));
  }
  return worst;
}

/// Weights after three updates of more elements than one block has.
template <class Optimizer, Executor X>
std::vector<float> updated(const Optimizer& optimizer, const X& executor) {
  constexpr std::size_t n = 40001;
  std::vector<float> w = normals(n, 1);
  const memory_of memory(optimizer, n);
  for (dim t = 0; t < 3; ++t)
    optimizer.step(executor, {.rate = .1f, .step = t}, w, normals(n, 5 + static_cast<std::uint64_t>(t)), memory.state);
  return w;
}

template <class Optimizer>
void check_refusal_of_non_finite_scale(const Optimizer& optimizer) {
  std::vector<float> w{1, 2, 3}, dw{.5f, 1, 2};
  const memory_of memory(optimizer, 3);
  REQUIRE(optimizer.step(serial{}, {.rate = .1f}, w, dw, memory.state));
  const auto before = w;
  const auto moments = memory.state.m;
  const std::vector<float> m(moments.begin(), moments.end());
  for (const float bad : {not_a_number, infinity}) {
    dw[1] = bad;
    const float scale = clip_factor(global_norm(serial{}, dw), 1.f);
    CHECK_FALSE(optimizer.step(serial{}, {.rate = .1f, .step = 1, .scale = scale}, w, dw, memory.state));
    CHECK_FALSE(optimizer.step(serial{}, {.rate = .1f, .step = 1, .scale = bad}, w, before, memory.state));
    CHECK(w == before);
    CHECK(std::equal(m.begin(), m.end(), moments.begin()));
  }
  dw[1] = 1;
  CHECK(optimizer.step(serial{}, {.rate = .1f, .step = 1}, w, dw, memory.state));
  CHECK(w != before);
}

template <class Optimizer>
std::string refusal(const Optimizer& optimizer, update u, std::size_t n = 4, std::size_t gradients = 4, dim moments = 4) {
  std::vector<float> w(n, 1.f), dw(gradients, 1.f);
  const memory_of memory(optimizer, moments);
  const std::string said = message([&] { optimizer.step(serial{}, u, w, dw, memory.state); });
  CHECK(w == std::vector<float>(n, 1.f));
  return said;
}

}  // namespace

TEST_SUITE("train/optimizer") {
  TEST_CASE("AdamW follows a reference in double over many steps") {
    // 400 roundings of weights of order one, 6e-8 each and mostly of opposite sign, stay below 1e-5; so in the next case.
    CHECK(distance(adamw{}, adamw_reference{.9, .999, 1e-8, .01}) < 1e-5);
    CHECK(distance(adamw{.decay = .5f}, adamw_reference{.9, .999, 1e-8, .5}) < 1e-5);
    CHECK(distance(adamw{.beta1 = .5f, .beta2 = .75f, .epsilon = .125f, .decay = 0},
                   adamw_reference{.5, .75, .125, 0}) < 1e-5);
    CHECK(distance(adamw{.beta1 = 0, .beta2 = 0, .epsilon = .125f}, adamw_reference{0, 0, .125, .01}) < 1e-5);
  }
  TEST_CASE("SGD with momentum follows a reference in double over many steps") {
    CHECK(distance(sgd{}, sgd_reference{.9, 0}) < 1e-5);
    CHECK(distance(sgd{.momentum = 0}, sgd_reference{0, 0}) < 1e-5);
    CHECK(distance(sgd{.momentum = .5f, .decay = .25f}, sgd_reference{.5, .25}) < 1e-5);
  }
  TEST_CASE("first steps, worked out by hand") {
    std::vector<float> w{1, 1, 0}, dw{.5f, -4.f, 0};
    const memory_of adam(adamw{.decay = .1f}, 3);
    adamw{.decay = .1f}.step(serial{}, {.rate = .1f}, w, dw, adam.state);
    CHECK(w[0] == doctest::Approx(1 - .1 * (1 + .1)));  // whatever the size of the gradient: its sign
    CHECK(w[1] == doctest::Approx(1 - .1 * (-1 + .1)));
    CHECK(w[2] == 0);  // padding stays zero
    w = {1, 1, 0};
    const memory_of heavy(sgd{.momentum = .5f}, 3);
    sgd{.momentum = .5f}.step(serial{}, {.rate = .25f}, w, dw, heavy.state);
    sgd{.momentum = .5f}.step(serial{}, {.rate = .25f, .step = 1, .scale = .5f}, w, dw, heavy.state);
    CHECK(w == std::vector<float>{1 - .125f - .125f, 1 + 1 + 1, 0});
  }
  TEST_CASE("the decay does not pass through the moments") {
    std::vector<float> w{2}, none{0};
    const memory_of memory(adamw{.decay = .5f}, 1);
    adamw{.decay = .5f}.step(serial{}, {.rate = .5f}, w, none, memory.state);
    CHECK(w[0] == 1.5f);
    CHECK(memory.state.m[0] == 0);
    CHECK(memory.state.v[0] == 0);
  }
  TEST_CASE("results are the same to the last bit on every executor") {
    const thread_pool pool(3);
    const auto adam = updated(adamw{}, serial{}), heavy = updated(sgd{}, serial{});
    CHECK(same_bits(updated(adamw{}, pool_executor(pool)), adam));
    CHECK(same_bits(updated(adamw{}, backwards{}), adam));
    CHECK(same_bits(updated(adamw{}, default_executor{}), adam));
    CHECK(same_bits(updated(sgd{}, pool_executor(pool)), heavy));
    CHECK(same_bits(updated(sgd{}, backwards{}), heavy));
  }
  TEST_CASE("a gradient that is not finite leads to a step that returns false and changes nothing") {
    SUBCASE("AdamW") { check_refusal_of_non_finite_scale(adamw{}); }
    SUBCASE("SGD") { check_refusal_of_non_finite_scale(sgd{}); }
  }
  TEST_CASE("without the norm such a gradient reaches its own weight and no other") {
    std::vector<float> w{1, 1, 1}, dw{.5f, not_a_number, .5f};
    const memory_of memory(adamw{}, 3);
    CHECK(adamw{}.step(serial{}, {.rate = .1f}, w, dw, memory.state));
    CHECK(std::isnan(w[1]));
    CHECK(w[0] == w[2]);
    CHECK(std::isfinite(w[0]));
  }
  TEST_CASE("moments are carved under their names, start at zero, and no parameters need none") {
    std::vector<slot> list;
    arena names(list);
    (void)adamw{}.make_state(70, names);
    REQUIRE(list.size() == 2);
    CHECK(list[0].name == "m");
    CHECK(list[1].name == "v");
    CHECK(list[1].start == initial::zeros);
    CHECK(adamw{}.state_bytes(70) == names.used());
    CHECK(sgd{}.state_bytes(70) == 280);
    std::vector<float> none;
    const memory_of memory(adamw{}, 0);
    CHECK(adamw{}.step(serial{}, {.rate = .1f}, none, none, memory.state));
  }
  TEST_CASE("lengths that differ are refused before anything is written") {
    CHECK(refusal(adamw{}, {.rate = 1}, 4, 3) == "adamw: dw has 3 elements, expected 4 (as many as parameters)");
    CHECK(refusal(adamw{}, {.rate = 1}, 4, 4, 5) == "adamw: m has 5 elements, expected 4 (as many as parameters)");
    CHECK(refusal(sgd{}, {.rate = 1}, 4, 5) == "sgd: dw has 5 elements, expected 4 (as many as parameters)");
    CHECK(refusal(sgd{}, {.rate = 1}, 4, 4, 3) == "sgd: m has 3 elements, expected 4 (as many as parameters)");
    std::vector<float> w(2), m(2), v(1);
    CHECK(message([&] { adamw{}.step(serial{}, {.rate = 1}, w, w, {m, v}); }) ==
          "adamw: v has 1 elements, expected 2 (as many as parameters)");
  }
  TEST_CASE("hyper-parameters that cannot work are refused before anything is written") {
    CHECK(refusal(adamw{.beta1 = 1}, {.rate = 1}) == "adamw: beta1 is 1.000000, expected 0 <= beta1 < 1");
    CHECK(refusal(adamw{.beta2 = -.5f}, {.rate = 1}) == "adamw: beta2 is -0.500000, expected 0 <= beta2 < 1");
    CHECK(refusal(adamw{.epsilon = 0}, {.rate = 1}) == "adamw: epsilon is 0.000000, expected 0 < epsilon, finite");
    CHECK(refusal(adamw{.decay = infinity}, {.rate = 1}) == "adamw: decay is inf, expected 0 <= decay, finite");
    CHECK(refusal(adamw{}, {.rate = -1}) == "adamw: rate is -1.000000, expected 0 <= rate, finite");
    CHECK(refusal(adamw{}, {.rate = not_a_number}) == "adamw: rate is nan, expected 0 <= rate, finite");
    CHECK(refusal(adamw{}, {.rate = 1, .step = -1}) == "adamw: step is -1, expected 0 <= step");
    CHECK(refusal(sgd{.momentum = not_a_number}, {.rate = 1}) == "sgd: momentum is nan, expected 0 <= momentum < 1");
    CHECK(refusal(sgd{.decay = -1}, {.rate = 1}) == "sgd: decay is -1.000000, expected 0 <= decay, finite");
    CHECK(refusal(sgd{}, {.rate = infinity}) == "sgd: rate is inf, expected 0 <= rate, finite");
  }
  TEST_CASE("with a schedule and clipping AdamW finds the minimum of a quadratic") {
    std::vector<float> w = normals(20, 1), dw(20);
    const warmup_cosine schedule{.peak = .1f, .warmup = 10, .steps = 300};
    const adamw optimizer{.decay = 0};
    const memory_of memory(optimizer, 20);
    for (dim t = 0; t < 300; ++t) {
      for (std::size_t i = 0; i < 20; ++i) dw[i] = static_cast<float>(i + 1) * (w[i] - 3.f);
      const float factor = clip_factor(global_norm(serial{}, dw), 1.f);
      REQUIRE(optimizer.step(serial{}, {.rate = schedule(t), .step = t, .scale = factor}, w, dw, memory.state));
    }
    CHECK(worst_error(w, std::vector<double>(20, 3.)) < 1e-3);
  }
}

TEST_SUITE("train/schedule") {
  TEST_CASE("the rate warms up in a line, falls in half a cosine and stays at the floor") {
    const warmup_cosine rate{.peak = 1.f, .floor = .25f, .warmup = 4, .steps = 12};
    CHECK(rate(0) == .25f);
    CHECK(rate(1) == .5f);
    CHECK(rate(3) == 1.f);
    CHECK(rate(4) == 1.f);
    CHECK(rate(6) == doctest::Approx(.25 + .75 * (1 + std::sqrt(.5)) / 2));
    CHECK(rate(8) == doctest::Approx(.625));
    CHECK(rate(10) == doctest::Approx(.25 + .75 * (1 - std::sqrt(.5)) / 2));
    CHECK(rate(12) == .25f);
    CHECK(rate(std::numeric_limits<dim>::max()) == .25f);
    for (dim t = 4; t < 12; ++t) CHECK(rate(t + 1) < rate(t));
  }
  TEST_CASE("corners: no warm-up, nothing but warm-up, no step at all, a floor as high as the peak") {
    CHECK(warmup_cosine{.peak = 2.f, .steps = 8}(0) == 2.f);
    CHECK(warmup_cosine{.peak = 2.f, .steps = 8}(8) == 0.f);
    CHECK(warmup_cosine{.peak = 2.f, .warmup = 8, .steps = 8}(7) == 2.f);
    CHECK(warmup_cosine{.peak = 2.f, .warmup = 8, .steps = 8}(8) == 0.f);
    CHECK(warmup_cosine{.peak = 2.f, .floor = 1.f}(0) == 1.f);
    const warmup_cosine constant{.peak = 2.f, .floor = 2.f, .warmup = 2, .steps = 9};
    CHECK(constant(0) == 1.f);
    for (dim t = 1; t < 12; ++t) CHECK(constant(t) == 2.f);
  }
  TEST_CASE("what cannot be a schedule is refused") {
    const auto said = [](warmup_cosine s, dim step = 0) { return message([=] { (void)s(step); }); };
    const std::string rates = "expected 0 <= floor <= peak, finite", steps = "expected 0 <= warmup <= steps";
    CHECK(said({.peak = 1, .floor = 2, .steps = 4}) == "warmup_cosine: floor is 2.000000 and peak 1.000000, " + rates);
    CHECK(said({.peak = not_a_number, .steps = 4}) == "warmup_cosine: floor is 0.000000 and peak nan, " + rates);
    CHECK(said({.peak = infinity, .steps = 4}) == "warmup_cosine: floor is 0.000000 and peak inf, " + rates);
    CHECK(said({.peak = 1, .floor = -1, .steps = 4}) == "warmup_cosine: floor is -1.000000 and peak 1.000000, " + rates);
    CHECK(said({.peak = 1, .warmup = 5, .steps = 4}) == "warmup_cosine: warmup is 5 and steps 4, " + steps);
    CHECK(said({.peak = 1, .warmup = -1, .steps = 4}) == "warmup_cosine: warmup is -1 and steps 4, " + steps);
    CHECK(said({.peak = 1, .steps = 4}, -1) == "warmup_cosine: step is -1, expected 0 <= step");
  }
}

TEST_SUITE("train/clip") {
  TEST_CASE("the global norm spans all buffers") {
    const std::vector<float> a{3, 0, 0}, b{4}, none;
    CHECK(global_norm(serial{}, {a, b}) == 5.);
    CHECK(global_norm(serial{}, {none, a}) == 3.);
    CHECK(global_norm(serial{}, a) == 3.);
    CHECK(global_norm(serial{}, none) == 0.);
  }
  TEST_CASE("it agrees with a plain sum in double, for lengths around the blocks") {
    for (const std::size_t n : {1u, 7u, 8u, 9u, 4095u, 4096u, 4097u, 524287u, 524288u, 528385u}) {
      const auto g = normals(n, 3);
      long double sum = 0;
      for (const float v : g) sum += static_cast<long double>(v) * v;
      CHECK(global_norm(serial{}, g) == doctest::Approx(std::sqrt(static_cast<double>(sum))).epsilon(1e-12));
    }
  }
  TEST_CASE("it is the same to the last bit on every executor") {
    const thread_pool pool(3);
    const auto a = normals(600001, 4), b = normals(10001, 5);
    const double norm = global_norm(serial{}, {a, b});
    CHECK(global_norm(pool_executor(pool), {a, b}) == norm);
    CHECK(global_norm(backwards{}, {a, b}) == norm);
    CHECK(global_norm(default_executor{}, {a, b}) == norm);
  }
  TEST_CASE("the factor brings a larger norm down to the bound and leaves a smaller one") {
    CHECK(clip_factor(5., 2.5f) == .5f);
    CHECK(clip_factor(2.5, 2.5f) == 1.f);
    CHECK(clip_factor(1., 2.5f) == 1.f);
    CHECK(clip_factor(0., 2.5f) == 1.f);
    CHECK(clip_factor(1e30, infinity) == 1.f);
  }
  TEST_CASE("the largest finite gradients have a finite norm, and one NaN or infinity shows in it") {
    std::vector<float> g(5000, std::numeric_limits<float>::max());
    CHECK(global_norm(serial{}, g) == doctest::Approx(std::sqrt(5000.) * double{g[0]}));
    CHECK(clip_factor(global_norm(serial{}, g), 1.f) > 0);
    for (const std::size_t place : {0u, 4095u, 4999u})
      for (const float bad : {not_a_number, infinity, -infinity}) {
        std::vector<float> broken(5000, 1.f);
        broken[place] = bad;
        CHECK_FALSE(std::isfinite(global_norm(serial{}, broken)));
        CHECK(std::isnan(clip_factor(global_norm(serial{}, broken), 1.f)));
      }
  }
  TEST_CASE("a bound that is not above zero is refused") {
    CHECK(message([] { (void)clip_factor(1., 0.f); }) == "clip_factor: max_norm is 0.000000, expected above 0");
    CHECK(message([] { (void)clip_factor(1., -1.f); }) == "clip_factor: max_norm is -1.000000, expected above 0");
    CHECK(message([] { (void)clip_factor(1., not_a_number); }) == "clip_factor: max_norm is nan, expected above 0");
  }
}

namespace {

/// up[300,400] by fan-in, bias[70] zeros, scale[5] ones, down[3,8] by fan-in.
template <class T>
struct parameters {
  std::vector<slot> list;
  buffer memory;
  matrix_view<T> up, down;
  std::span<T> bias, scale;

  parameters() : memory(carve_bytes()) {
    arena mem(memory.bytes());
    carve(mem);
    std::fill(memory.bytes().begin(), memory.bytes().end(), std::byte{0x11});
  }
  std::vector<float> values(const T* first, std::size_t n) const {
    std::vector<float> v(n);
    for (std::size_t i = 0; i < n; ++i) v[i] = static_cast<float>(first[i]);
    return v;
  }
  std::vector<float> up_values() const { return values(up.data, 300 * 400); }

 private:
  void carve(arena& mem) {
    up = mem.matrix<T>("up", 300, 400);
    bias = mem.vector<T>("bias", 70, initial::zeros);
    scale = mem.vector<T>("scale", 5, initial::ones);
    down = mem.matrix<T>("down", 3, 8);
  }
  std::size_t carve_bytes() {
    arena names(list);
    carve(names);
    return names.used();
  }
};

template <class T, Executor X>
parameters<T> initialised(const X& executor, std::uint64_t seed, float gain = 1.f) {
  parameters<T> p;
  initialise(executor, p.memory.bytes(), p.list, rng(seed), gain);
  return p;
}

}  // namespace

TEST_SUITE("train/initialise") {
  TEST_CASE("fan-in is normal with deviation gain over the root of the columns") {
    for (const float gain : {1.f, .5f}) {
      const auto p = initialised<float>(serial{}, 1, gain);
      double sum = 0, square = 0, fourth = 0;
      for (const float v : p.up_values()) {
        sum += v;
        square += double{v} * v;
        fourth += double{v} * v * v * v;
      }
      const double n = 300 * 400, deviation = gain / 20.;
      CHECK(std::abs(sum / n) < 5 * deviation / std::sqrt(n));
      CHECK(square / n == doctest::Approx(deviation * deviation).epsilon(.02));
      CHECK(fourth / n == doctest::Approx(3 * std::pow(deviation, 4)).epsilon(.07));
    }
  }
  TEST_CASE("constants are what they say, and what lies between tensors is left alone") {
    const auto p = initialised<float>(serial{}, 1);
    CHECK(p.values(p.bias.data(), 70) == std::vector<float>(70, 0.f));
    CHECK(p.values(p.scale.data(), 5) == std::vector<float>(5, 1.f));
    CHECK(p.memory.bytes()[p.list[1].offset + p.list[1].bytes] == std::byte{0x11});
    CHECK(p.memory.bytes()[p.list[3].offset - 1] == std::byte{0x11});
  }
  TEST_CASE("numbers depend on the seed and the tensor, never on the executor") {
    const thread_pool pool(3);
    const auto p = initialised<float>(serial{}, 1);
    CHECK(same_bits(initialised<float>(pool_executor(pool), 1).up_values(), p.up_values()));
    CHECK(same_bits(initialised<float>(backwards{}, 1).up_values(), p.up_values()));
    CHECK_FALSE(same_bits(initialised<float>(serial{}, 2).up_values(), p.up_values()));
    const auto up = p.values(p.up.data, 24), down = p.values(p.down.data, 24);
    for (std::size_t i = 0; i < 24; ++i) CHECK(up[i] / down[i] != doctest::Approx(std::sqrt(8. / 400)));
  }
  TEST_CASE("bf16 and f16 are the rounded numbers of float") {
    const auto exact = initialised<float>(serial{}, 1).up_values();
    const auto rounded = initialised<bf16>(serial{}, 1).up_values();
    const auto half = initialised<f16>(serial{}, 1).up_values();
    int wrong = 0;
    for (std::size_t i = 0; i < exact.size(); ++i)
      wrong += rounded[i] != static_cast<float>(bf16(exact[i])) || half[i] != static_cast<float>(f16(exact[i]));
    CHECK(wrong == 0);
  }
  TEST_CASE("memory that does not suffice, other element types and a gain that is no number are refused unwritten") {
    parameters<float> p;
    const auto whole = p.memory.bytes();
    const auto said = [&](std::span<std::byte> memory, float gain = 1.f) {
      return message([&] { initialise(serial{}, memory, p.list, rng(1), gain); });
    };
    CHECK(said(whole.first(whole.size() - 4)) == "initialise: down ends at byte " + std::to_string(whole.size()) +
                                                     ", expected at most " + std::to_string(whole.size() - 4) +
                                                     " (the memory)");
    CHECK(said(whole, not_a_number) == "initialise: gain is nan, expected a finite number");
    p.list[3].type = element::ternary;
    CHECK(said(whole) == "initialise: down is ternary, expected f32, bf16 or f16");
    CHECK(std::all_of(whole.begin(), whole.end(), [](std::byte b) { return b == std::byte{0x11}; }));
  }
}
