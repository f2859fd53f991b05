// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/moe.hpp"
#include "moe/train/mixed.hpp"
#include "moe/train/optimizer.hpp"
#include "support/testing.hpp"

using namespace moe;

namespace {

using net_type = layer<linear_gate, top_k<2>, bf16_ffn_expert, weighted_sum, scalar<serial>>;
constexpr shape sizes{.tokens = 8, .d = 65, .f = 129, .experts = 4};

/// Masters, gradients and weights of a layer with bf16 experts, and the copy between them.
struct trainee {
  net_type net{sizes};
  std::size_t n = net.gradient_bytes() / sizeof(float);
  buffer weights{net.weight_bytes()};
  std::vector<float> masters = std::vector<float>(n), gradients = std::vector<float>(n);
  weight_copy copy{net.gradient_catalogue(), net.catalogue(), weights.bytes()};

  trainee() {
    testing::randomise(net.gradient_catalogue(), masters, 1);
    copy.write(masters);
  }
  /// Elements of the copy that are not their masters, rounded to nearest even where they are bf16.
  int strangers() const {
    int count = 0;
    const auto from = net.gradient_catalogue(), to = net.catalogue();
    for (std::size_t i = 0; i < to.size(); ++i)
      for (std::size_t j = 0; j < from[i].bytes / 4; ++j) {
        const float master = masters[from[i].offset / 4 + j];
        if (to[i].type == element::bf16)
          count += !(weights.as<bf16>()[to[i].offset / 2 + j] == bf16(master));
        else
          count += weights.as<float>()[to[i].offset / 4 + j] != master;
      }
    return count;
  }
};

std::string message(auto call) {
  try {
    call();
  } catch (const shape_error& e) {
    return e.what();
  }
  return "no shape_error";
}

template <class Optimizer, class Step>
void check_training(const Optimizer& optimizer, Step reference) {
  trainee t;
  CHECK(t.strangers() == 0);
  buffer memory(optimizer.state_bytes(static_cast<dim>(t.n)));
  arena mem(memory.bytes());
  const auto state = optimizer.make_state(static_cast<dim>(t.n), mem);
  std::vector<double> w(t.masters.begin(), t.masters.end()), m(t.n), v(t.n);
  for (int step = 0; step < 10; ++step) {
    testing::randomise(t.net.gradient_catalogue(), t.gradients, 7 + static_cast<std::uint64_t>(step));
    const auto before = t.masters;
    optimizer.step(serial{}, {.rate = 1e-3f, .step = step}, t.masters, t.gradients, state, t.copy);
    for (std::size_t i = 0; i < t.n; ++i) reference(step + 1, double{t.gradients[i]}, w[i], m[i], v[i]);
    CHECK(t.strangers() == 0);
    CHECK(t.masters != before);
  }
  double worst = 0;
  for (std::size_t i = 0; i < t.n; ++i) worst = std::max(worst, std::abs(w[i] - t.masters[i]));
  CHECK(worst < 1e-6);  // 10 roundings of weights of order one, 6e-8 each
}

}  // namespace

TEST_SUITE("train/mixed") {
  TEST_CASE("over many steps masters follow a reference in double, and the weights are the masters rounded") {
    check_training(adamw{.decay = .1f}, [](int t, double g, double& w, double& m, double& v) {
      m = .9f * m + (1 - .9f) * g;
      v = .999f * v + (1 - .999f) * g * g;
      const double mean = m / (1 - std::pow(double{.9f}, t)), square = v / (1 - std::pow(double{.999f}, t));
      w -= 1e-3f * (mean / (std::sqrt(square) + 1e-8) + double{.1f} * w);
    });
    check_training(sgd{}, [](int, double g, double& w, double& m, double&) {
      m = .9f * m + g;
      w -= 1e-3f * m;
    });
  }
  TEST_CASE("steps too small for bf16 add up in the masters") {
    trainee t;
    const std::size_t first = t.net.gradient_catalogue()[1].offset / 4, at = t.net.catalogue()[1].offset / 2;
    t.masters[first] = 1;
    t.copy.write(t.masters);
    t.gradients[first] = 1;
    const sgd plain{.momentum = 0};
    buffer memory(plain.state_bytes(static_cast<dim>(t.n)));
    arena mem(memory.bytes());
    const auto state = plain.make_state(static_cast<dim>(t.n), mem);
    const auto weight = [&] { return static_cast<float>(t.weights.as<bf16>()[at]); };
    for (int step = 1; step <= 32; ++step) {
      plain.step(serial{}, {.rate = 0x1p-11f}, t.masters, t.gradients, state, t.copy);
      if (step < 4) CHECK(weight() == 1);  // the next bf16 is 2^-8 below
    }
    CHECK(t.masters[first] == 1 - 0x1p-6f);
    CHECK(weight() == 1 - 0x1p-6f);
  }
  TEST_CASE("ties round to even, and NaN and infinity stay") {
    trainee t;
    const auto names = t.net.gradient_catalogue(), types = t.net.catalogue();
    float* const w = t.masters.data() + names[1].offset / 4;
    w[0] = 1 + 0x1p-8f;
    w[1] = 1 + 0x1p-7f + 0x1p-8f;
    w[2] = NAN;
    w[3] = -HUGE_VALF;
    t.copy.write(t.masters);
    const bf16* const got = t.weights.as<bf16>().data() + types[1].offset / 2;
    CHECK(static_cast<float>(got[0]) == 1);
    CHECK(static_cast<float>(got[1]) == 1 + 0x1p-6f);
    CHECK(std::isnan(static_cast<float>(got[2])));
    CHECK(static_cast<float>(got[3]) == -HUGE_VALF);
  }
  TEST_CASE("masters and weights are the same bits on every executor") {
    const auto run = [](const auto& executor) {
      trainee t;
      testing::randomise(t.net.gradient_catalogue(), t.gradients, 7);
      const adamw optimizer{};
      buffer memory(optimizer.state_bytes(static_cast<dim>(t.n)));
      arena mem(memory.bytes());
      optimizer.step(executor, {.rate = .1f}, t.masters, t.gradients, optimizer.make_state(static_cast<dim>(t.n), mem), t.copy);
      CHECK(t.strangers() == 0);
      return t.masters;
    };
    const thread_pool pool(3);
    CHECK(run(serial{}) == run(pool_executor(pool)));
  }
  TEST_CASE("a step that is refused leaves the weights as they were") {
    trainee t;
    const auto bytes = t.weights.bytes();
    const std::vector<std::byte> before(bytes.begin(), bytes.end());
    buffer memory(sgd{}.state_bytes(static_cast<dim>(t.n)));
    arena mem(memory.bytes());
    const auto state = sgd{}.make_state(static_cast<dim>(t.n), mem);
    t.gradients[0] = 1;
    CHECK_FALSE(sgd{}.step(serial{}, {.rate = 1, .scale = NAN}, t.masters, t.gradients, state, t.copy));
    CHECK(std::equal(before.begin(), before.end(), t.weights.bytes().begin()));
  }
  TEST_CASE("without a catalogue nothing is copied, and nothing is asked for") {
    const weight_copy none;
    CHECK(none.masters() == 0);
    CHECK_NOTHROW(none.write({}));
  }
  TEST_CASE("catalogues and memory that do not fit are refused") {
    const trainee t;
    const auto masters = t.net.gradient_catalogue();
    auto list = t.net.catalogue();
    const auto refused = [&] { return message([&] { weight_copy(masters, list, t.weights.bytes()); }); };
    CHECK(refused() == "no shape_error");
    list.pop_back();
    CHECK(refused() == "weight_copy: masters has 4 tensors, expected 3 (the weights)");
    list = t.net.catalogue();
    list[1].rows = 3;
    CHECK(refused() == "weight_copy: master experts.up is f32 516 x 65, expected f32 3 x 65 (weight experts.up)");
    list = t.net.catalogue();
    list[1].type = element::i8;
    CHECK(refused() == "weight_copy: experts.up is i8, expected f32, bf16 or f16");
    list = t.net.catalogue();
    list[1].offset = t.weights.size();
    CHECK(refused() == "weight_copy: experts.up ends at byte " + std::to_string(t.weights.size() + list[1].bytes) +
                           ", expected at most " + std::to_string(t.weights.size()) + " (the memory)");
    std::vector<float> few(t.copy.masters() - 1), m(few.size());
    CHECK(message([&] { sgd{}.step(serial{}, {.rate = 1}, few, few, {m}, t.copy); }) ==
          "sgd: w: there are " + std::to_string(few.size()) + " masters, expected at least " +
              std::to_string(t.copy.masters()) + " (the catalogue)");
    CHECK(message([&] { t.copy.write(few); }).starts_with("weight_copy: there are"));
  }
  TEST_CASE("what a layer's gradients are called, where they lie and how they start agrees with its weights") {
    const auto check = [](const auto& net) {
      const auto weights = net.catalogue(), gradients = net.gradient_catalogue();
      REQUIRE(weights.size() == gradients.size());
      CHECK(net.gradient_bytes() == net.weight_bytes());
      for (std::size_t i = 0; i < weights.size(); ++i) {
        CHECK(gradients[i].name == weights[i].name);
        CHECK(gradients[i].offset == weights[i].offset);
        CHECK(gradients[i].bytes == weights[i].bytes);
        CHECK(gradients[i].start == weights[i].start);
      }
    };
    using B = scalar<serial>;
    using set = expert_set<ffn_expert, film_expert, constant_expert>;
    using routed = layer<noisy<linear_gate>, bias_balanced<top_k<2, score_rule<sigmoid_score>>>, set, residual<>, B>;
    const shape s{.tokens = 4, .d = 6, .f = 5, .experts = 5};
    const set experts{{.count = 2, .f = 5}, {.count = 2}, {.count = 1}};
    check(layer<linear_gate, top_k<2>, gpt_oss_expert, weighted_sum, B>(s));
    check(routed(s, experts));
    check(sum(layer<linear_gate, top_k<2>, ffn_expert, weighted_sum, B>(s), gated_dense<ffn_expert, B>(s)));
  }
}
