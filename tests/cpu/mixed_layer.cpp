// SPDX-License-Identifier: Apache-2.0
// Whole layers with weights of bf16 and float32 gradients: against the double-precision reference at the rounded weights, at
// every level, on every executor.
#include <doctest/doctest.h>

#include <map>
#include <memory>
#include <string>

#include "moe/backend/cpu.hpp"
#include "moe/expert/set.hpp"
#include "support/executors.hpp"
#include "support/expert_rules.hpp"
#include "support/layer_runs.hpp"
#include "support/levels.hpp"
#include "support/mixed.hpp"
#include "support/small_stack.hpp"

namespace {

using moe::dim;
template <class Ex = moe::serial>
using cpu = moe::host_backend<moe::arch::native, Ex>;
using emulated = moe::host_backend<testing::emulated_amx, moe::serial>;

/// Odd in every size; few rows an expert and many, empty experts, experts with a single row, one expert with all rows.
constexpr moe::shape shapes[] = {
    {.tokens = 1, .d = 1, .f = 1, .experts = 2},     {.tokens = 7, .d = 3, .f = 5, .experts = 4},
    {.tokens = 130, .d = 31, .f = 65, .experts = 7}, {.tokens = 9, .d = 129, .f = 67, .experts = 11},
    {.tokens = 90, .d = 37, .f = 41, .experts = 1},  {.tokens = 400, .d = 64, .f = 128, .experts = 2},
    {.tokens = 2, .d = 72, .f = 200, .experts = 50},
};

/// The largest error of y, dx and every gradient, each relative to the largest value of its tensor.
struct errors {
  double y, dx, gate, weights;
};
template <int K, class B>
errors compare(const moe::shape& s) {
  using layer = testing::bf16_layer<K, B>;
  testing::mixed_model<layer> m(layer(s), s.tokens, s.d, static_cast<std::uint64_t>(s.tokens + s.d));
  m.forward();
  m.backward();
  const reference::ffn_layer want(K, m.names, m.rounded());
  const reference::matrix x(s.tokens, s.d, m.x);
  const auto g = want.backward(x, {s.tokens, s.d, m.dy});
  const auto off = [&](std::size_t i, const reference::matrix& wanted) {
    return reference::error(m.gradients().subspan(m.names[i].offset / 4, m.names[i].bytes / 4), wanted.values);
  };
  return {reference::error(m.y, want.forward(x).values), reference::error(m.dx, g.x.values), K == 1 ? 0. : off(0, g.gate_w),
          std::max({off(1, g.up), off(2, g.gate), off(3, g.down)})};
}
template <class B>
void check_errors(double once, double twice) {
  for (const moe::shape& s : shapes) {
    CAPTURE(s.tokens);
    CAPTURE(s.d);
    const errors e = s.experts == 1 ? compare<1, B>(s) : compare<2, B>(s);
    CHECK(e.y < once);
    CHECK(e.dx < twice);
    CHECK(e.gate < 10 * twice);
    CHECK(e.weights < twice);
  }
}

template <class L>
testing::results train(const L& net, dim T, std::uint64_t seed) {
  testing::mixed_model<L> m(net, T, net.sizes().d, seed);
  return testing::run(m);
}

}  // namespace

TEST_SUITE("expert/ffn") {
#if defined(MOE_TEST_SMALL_STACK)
  TEST_CASE("with bf16 weights forward and backward run on the small stack that some C libraries give a thread") {
    const testing::bf16_layer<2, cpu<>> net({.d = 320, .f = 700, .experts = 2});
    testing::at_every_level([&] {
      const testing::results wanted = train(net, 600, 1);
      testing::results small;
      testing::on_a_small_stack([&] { small = train(net, 600, 1); });
      CHECK(small == wanted);
    });
  }
#endif
  TEST_CASE("with bf16 weights a layer agrees with the reference at the rounded weights, at every level") {
    static_assert(moe::TrainableExpert<moe::bf16_ffn_expert, cpu<>>);
    check_errors<moe::scalar<moe::serial>>(1e-5, 1e-4);
    testing::at_every_level([] {
      const bool rounds = testing::halves_in_use();
      // All is float32 but for the weights, which the reference has too: the bounds of float32 weights. Tiles round rows to
      // bf16: as the next case.
      rounds ? check_errors<cpu<>>(1. / 128, 1. / 64) : check_errors<cpu<>>(1e-5, 1e-4);
    });
  }
#if defined(MOE_X86)
  TEST_CASE("where tiles multiply, a layer agrees with the reference within the rounding of rows to bf16") {
    if (!includes(testing::highest_level(), moe::cpu_level::avx512)) return;
    // Each product rounds its rows by 2^-8 of themselves at most, 2^-9.8 in the root mean square; forward has two products in
    // a row, backward four. Sums average that out; what is left is relative to the tensor's largest value.
    check_errors<emulated>(1. / 128, 1. / 64);
    CHECK(compare<2, emulated>(shapes[5]).weights > 1e-4);
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("where tiles multiply, rows are rounded without a join of its own, into memory that the layer has anyway") {
    if (!includes(testing::highest_level(), moe::cpu_level::avx512)) return;
    dim joins = 0;
    using counted = moe::host_backend<testing::emulated_amx, testing::counting>;
    const moe::shape s{.d = 80, .f = 48, .experts = 8};
    testing::mixed_model<testing::bf16_layer<2, counted>> m(
        testing::bf16_layer<2, counted>(s, counted(testing::counting{&joins})), 512, s.d, 1);
    joins = 0;
    m.forward();
    CHECK(joins == 3);
    const auto grown = [&](const auto& net) { return net.scratch_bytes(8192) - net.scratch_bytes(4096); };
    CHECK(grown(testing::bf16_layer<2, emulated>(s)) == grown(testing::bf16_layer<2, moe::scalar<moe::serial>>(s)));
  }
  TEST_CASE("tiles give equal bits in whatever order they are computed") {
    if (!includes(testing::highest_level(), moe::cpu_level::avx512)) return;
    for (const moe::shape& s : shapes) {
      CAPTURE(s.tokens);
      const auto alone = train(testing::bf16_layer<1, emulated>(s), s.tokens, 1);
      for (std::uint64_t seed = 0; seed < 3; ++seed) {
        using shuffled = moe::host_backend<testing::emulated_amx, testing::shuffling>;
        CHECK(train(testing::bf16_layer<1, shuffled>(s, shuffled(testing::shuffling{seed})), s.tokens, 1) == alone);
      }
    }
  }
#endif
  TEST_CASE("with bf16 weights all executors give equal bits, forward and backward, run to run") {
    for (const moe::shape& s : shapes) {
      CAPTURE(s.tokens);
      testing::expect_same_bits_from_every_executor<moe::arch::native>(
          [&]<class B>(const B& backend) { return train(testing::bf16_layer<1, B>(s, backend), s.tokens, 1); });
      const moe::thread_pool pool(64);
      using many = cpu<moe::pool_executor>;
      CHECK(train(testing::bf16_layer<1, many>(s, many(moe::pool_executor(pool))), s.tokens, 1) ==
            train(testing::bf16_layer<1, cpu<>>(s), s.tokens, 1));
    }
  }
  TEST_CASE("weights that bf16 can hold give the results of a layer with float32 weights") {
    const moe::shape s{.tokens = 150, .d = 40, .f = 48, .experts = 3};
    testing::mixed_model<testing::bf16_layer<2, cpu<>>> half(testing::bf16_layer<2, cpu<>>(s), s.tokens, s.d, 5);
    testing::model<testing::ffn_layer<2, cpu<>>> whole(testing::ffn_layer<2, cpu<>>(s), s.tokens, s.d, 5);
    const auto w = half.rounded();
    std::copy(w.begin(), w.end(), whole.weights().begin());
    const moe::cpu_level before = moe::cpu_level_in_use();
    if (testing::halves_in_use()) moe::use_cpu_level(moe::cpu_level::avx512_vnni);
    const auto got = testing::run(half), want = testing::run(whole);
    moe::use_cpu_level(before);
    double worst = 0;
    for (std::size_t i = 0; i < got.dw.size(); ++i) worst = std::max(worst, std::abs(double{got.dw[i]} - want.dw[i]));
    for (std::size_t i = 0; i < got.y.size(); ++i) worst = std::max(worst, std::abs(double{got.y[i]} - want.y[i]));
    for (std::size_t i = 0; i < got.dx.size(); ++i) worst = std::max(worst, std::abs(double{got.dx[i]} - want.dx[i]));
    CHECK(worst < 1e-3);  // gradients are sums over 100 tokens
  }
  TEST_CASE("every form, layout and bias agrees with formulas in double at the rounded weights, at every level and on tiles") {
    const auto check = []<class X>(const X& expert, golden::form_rule form, golden::order order) {
      const moe::shape s{.tokens = 40, .d = 5, .f = 7, .experts = 2};  // 40 rows an expert
      const auto model = [&]<class B>(const B&) {
        using layer = testing::bf16_layer<2, B, X>;
        auto m = std::make_unique<testing::mixed_model<layer>>(layer(s, expert), s.tokens, s.d, 11);
        m->forward();
        m->backward();
        return m;
      };
      const auto kept = model(moe::scalar<moe::serial>{});
      const auto& first = *kept;
      const auto rule = golden::routed(2, golden::weigh_rows(golden::feed_forward(form, order)));
      golden::tensors w;
      const auto flat = first.rounded();
      for (const moe::slot& t : first.names) w[t.name] = reference::tensor(first.names, flat, t.name);
      golden::matrix x(s.tokens, s.d, first.x);
      const golden::matrix dy(s.tokens, s.d, first.dy);
      const auto loss = [&] { return reference::inner(rule(w, x), dy); };
      const auto y = rule(w, x).values;
      const auto dx = reference::gradient(x.values, loss);
      std::map<std::string, golden::vec> dw;
      for (const moe::slot& t : first.names) dw[t.name] = reference::gradient(w.at(t.name).values, loss);
      const auto expect_near = [&](const auto& m, double bound) {
        CHECK(golden::off(m.y, y) < bound);
        CHECK(golden::off(m.dx, dx) < bound);
        for (const moe::slot& t : m.names) {
          CAPTURE(t.name);
          CHECK(golden::off(m.gradients().subspan(t.offset / 4, t.bytes / 4), dw.at(t.name)) < (t.name == "gate.w" ? 4 : 1) * bound);
        }
      };
      expect_near(first, golden::tolerance);
      testing::at_every_level([&] {
        const bool rounds = testing::halves_in_use();
        expect_near(*model(cpu<>{}), rounds ? 1. / 64 : golden::tolerance);
      });
#if defined(MOE_X86)
      if (includes(testing::highest_level(), moe::cpu_level::avx512)) expect_near(*model(emulated{}), 1. / 64);
#endif
    };
    using moe::basic_ffn_expert, moe::bf16;
    check(basic_ffn_expert<moe::plain<moe::gelu>, moe::separate, true, bf16>{}, golden::plain(golden::gelu), golden::order::separate);
    check(basic_ffn_expert<moe::glu<moe::silu>, moe::chunked, false, bf16>{}, golden::glu(golden::silu), golden::order::chunked);
    check(basic_ffn_expert<moe::glu<moe::gelu>, moe::interleaved, true, bf16>{}, golden::glu(golden::gelu), golden::order::interleaved);
#if defined(MOE_X86)
    CHECK(testing::emulated_tiles::faults == 0);
#endif
  }
  TEST_CASE("gradients of frozen bf16 tensors are not computed, and those of the others are the same") {
    const moe::shape s{.tokens = 60, .d = 24, .f = 40, .experts = 3};
    testing::mixed_model<testing::bf16_layer<2, cpu<>>> all(testing::bf16_layer<2, cpu<>>(s), s.tokens, s.d, 5),
        some(testing::bf16_layer<2, cpu<>>(s), s.tokens, s.d, 5);
    some.dw.experts.up = {};
    some.dw.experts.down = {};
    const auto want = testing::run(all), got = testing::run(some);
    CHECK(got.dx == want.dx);
    for (const moe::slot& t : all.names) {
      CAPTURE(t.name);
      const bool frozen = t.name == "experts.up" || t.name == "experts.down";
      for (std::size_t i = t.offset / 4; i < (t.offset + t.bytes) / 4; ++i) REQUIRE(got.dw[i] == (frozen ? 0.f : want.dw[i]));
    }
  }
  TEST_CASE("with bf16 weights gradients that replace what was there are those added to zeros, at every level") {
    const auto check = []<class L>(const L& net, dim T) {
      testing::mixed_model<L> m(net, T, net.sizes().d, 3);
      m.forward();
      m.backward();
      return testing::replaces_gradients(m);
    };
    using biased = moe::basic_ffn_expert<moe::glu<moe::silu>, moe::interleaved, true, moe::bf16>;
    const moe::thread_pool pool(3);
    using pooled = cpu<moe::pool_executor>;
    for (const moe::shape& s : shapes) {
      CAPTURE(s.tokens);
      testing::at_every_level([&] {
        CHECK(check(testing::bf16_layer<1, cpu<>>(s), s.tokens));
        CHECK(check(testing::bf16_layer<1, cpu<>, biased>(s), s.tokens));
        CHECK(check(testing::bf16_layer<1, pooled>(s, pooled(moe::pool_executor(pool))), s.tokens));
      });
#if defined(MOE_X86)
      if (includes(moe::report_cpu_level().machine, moe::cpu_level::avx512))
        CHECK(check(testing::bf16_layer<1, emulated>(s), s.tokens));
#endif
    }
    CHECK(check(testing::bf16_layer<1, cpu<>>({.d = 64, .f = 48, .experts = 1}), 600));  // more rows than a cut of the depth
  }
  TEST_CASE("gradients are float32 and lie where those of float32 weights do") {
    const moe::shape s{.tokens = 8, .d = 24, .f = 40, .experts = 3};
    const testing::bf16_layer<2, cpu<>> half(s);
    const testing::ffn_layer<2, cpu<>> whole(s);
    CHECK(half.gradient_bytes() == whole.weight_bytes());
    CHECK(whole.gradient_bytes() == whole.weight_bytes());
    CHECK(half.weight_bytes() < whole.weight_bytes());
    const auto got = half.gradient_catalogue(), want = whole.catalogue(), rounded = half.catalogue();
    REQUIRE(got.size() == want.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      CHECK(got[i].name == want[i].name);
      CHECK(got[i].offset == want[i].offset);
      CHECK(got[i].bytes == want[i].bytes);
      CHECK(got[i].start == want[i].start);
      CHECK(rounded[i].type == (i == 0 ? moe::element::f32 : moe::element::bf16));
    }
  }
  TEST_CASE("bf16 weights that do not fit are refused before anything is written") {
    const moe::shape s{.tokens = 8, .d = 24, .f = 40, .experts = 3};
    testing::mixed_model<testing::bf16_layer<2, cpu<>>> m(testing::bf16_layer<2, cpu<>>(s), s.tokens, s.d, 5);
    m.w.experts.up.rows = 119;
    CHECK_THROWS_WITH_AS(m.forward(), "ffn_expert: up is 119 x 24, expected 120 x 24 (E*f x d)", moe::shape_error);
    CHECK(m.y == std::vector<float>(m.y.size()));
  }
  TEST_CASE("experts with bf16 weights and with float32 weights are banks of one set") {
    using set = moe::expert_set<moe::bf16_ffn_expert, moe::ffn_expert>;
    using layer = testing::bf16_layer<2, cpu<>, set>;
    const moe::shape s{.tokens = 40, .d = 12, .experts = 4};
    const layer net(s, set{{.count = 2, .f = 20}, {.count = 2, .f = 20}});
    testing::mixed_model<layer> m(net, s.tokens, s.d, 3);
    m.forward();
    m.backward();
    const auto types = net.catalogue();
    REQUIRE(types.size() == m.names.size());
    const auto w = m.rounded();
    const auto both = [&](const char* tensor) {
      const auto a = reference::tensor(m.names, w, std::string("experts.0.") + tensor),
                 b = reference::tensor(m.names, w, std::string("experts.1.") + tensor);
      reference::matrix all(a.rows + b.rows, a.cols);
      std::copy(a.values.begin(), a.values.end(), all.values.begin());
      std::copy(b.values.begin(), b.values.end(), all.values.begin() + static_cast<std::ptrdiff_t>(a.values.size()));
      return all;
    };
    const reference::layer want{reference::linear_gate(reference::tensor(m.names, w, "gate.w")), reference::top_k(2),
                                reference::feed_forward(both("up"), both("gate"), both("down"))};
    const double bound = testing::halves_in_use() ? 1. / 128 : 1e-5;
    CHECK(reference::error(m.y, want.forward({s.tokens, s.d, m.x}).values) < bound);
  }
}
