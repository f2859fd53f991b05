// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "moe/core/recorded_plan.hpp"
#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;

template <int K>
using ffn = moe::layer<moe::linear_gate, moe::top_k<K>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
using model = testing::model<ffn<2>>;

constexpr dim T = 19, d = 10, E = 5;
ffn<2> net() { return ffn<2>({.tokens = T, .d = d, .f = 14, .experts = E}); }

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();

/// A matrix with gaps of a known value between its rows.
struct strided {
  std::vector<float> memory;
  moe::matrix_view<float> view;

  strided(dim rows, dim cols, dim ld, const std::vector<float>& from = {})
      : memory(static_cast<std::size_t>(rows * ld), 77.f), view(memory.data(), rows, cols, ld) {
    for (dim r = 0; r < rows; ++r)
      for (dim c = 0; c < cols; ++c) view(r, c) = from.empty() ? 0.f : from[static_cast<std::size_t>(r * cols + c)];
  }
  std::vector<float> packed() const {
    std::vector<float> out;
    for (dim r = 0; r < view.rows; ++r) out.insert(out.end(), view.row(r), view.row(r) + view.cols);
    return out;
  }
  bool gaps_are_untouched() const {
    for (dim r = 0; r < view.rows; ++r)
      for (dim c = view.cols; c < view.ld; ++c)
        if (view.row(r)[c] != 77.f) return false;
    return true;
  }
};

/// Counts how often it is asked.
struct counting {
  dim* calls = nullptr;
  static constexpr int concurrency() noexcept { return 1; }
  template <class F>
  void for_each(dim n, dim grain, F&& f) const {
    ++*calls;
    moe::serial{}.for_each(n, grain, f);
  }
};

std::vector<float> copy(std::span<const float> v) { return {v.begin(), v.end()}; }

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE("x, y, dy and dx may be strided, and nothing is written between their rows") {
    model packed(net(), T, d, 1), m(net(), T, d, 1);
    packed.forward();
    packed.backward();
    const strided x(T, d, d + 3, m.x), y(T, d, d + 1), dy(T, d, 2 * d, m.dy), dx(T, d, d + 5);
    m.net.forward(m.w, x.view, y.view, m.ctx, m.work);
    m.net.backward(m.w, x.view, m.ctx, dy.view, dx.view, m.dw, m.work);
    CHECK(y.packed() == packed.y);
    CHECK(dx.packed() == packed.dx);
    CHECK(copy(m.gradients()) == copy(packed.gradients()));
    CHECK(y.gaps_are_untouched());
    CHECK(dx.gaps_are_untouched());
  }
  TEST_CASE("weights may lie anywhere, each in memory of its own") {
    model flat(net(), T, d, 2);
    flat.forward();
    const auto from = [](moe::matrix_view<float> w) {
      return strided(w.rows, w.cols, w.cols + 3, std::vector<float>(w.data, w.data + w.rows * w.cols));
    };
    const strided gate_w = from(flat.w.gate.w), up = from(flat.w.experts.up), gate = from(flat.w.experts.gate),
                  down = from(flat.w.experts.down);
    ffn<2>::weights w{};
    w.gate.w = gate_w.view;
    w.experts.up = up.view;
    w.experts.gate = gate.view;
    w.experts.down = down.view;
    std::vector<float> y(flat.y.size());
    flat.net.forward(w, flat.x_view(), {y.data(), T, d}, flat.ctx, flat.work);
    CHECK(y == flat.y);
  }
  TEST_CASE("gradients that are replaced leave frozen ones alone, and dx is added to") {
    model once(net(), T, d, 3), m(net(), T, d, 3);
    once.forward();
    once.backward();
    for (float& v : m.dx) v = 8;
    for (float& v : m.gradients()) v = 8;
    m.dw.gate.w = {};
    m.dw.experts.up = {};
    m.forward();
    m.backward(moe::gradient_mode::replace);
    for (std::size_t i = 0; i < m.dx.size(); ++i) CHECK(m.dx[i] == doctest::Approx(8 + once.dx[i]).epsilon(1e-5));
    for (const moe::slot& s : m.net.catalogue())
      for (std::size_t i = s.offset / 4; i < (s.offset + s.bytes) / 4; ++i) {
        INFO(s.name);
        REQUIRE(m.gradients()[i] == (s.name == "gate.w" || s.name == "experts.up" ? 8 : once.gradients()[i]));
      }
  }
  TEST_CASE("forward overwrites y, backward adds to dx and to every gradient") {
    model once(net(), T, d, 3), m(net(), T, d, 3);
    once.forward();
    once.backward();
    for (float& v : m.y) v = 5;
    for (float& v : m.dx) v = 8;
    for (float& v : m.gradients()) v = 8;
    m.forward();
    m.backward();
    CHECK(m.y == once.y);
    for (std::size_t i = 0; i < m.dx.size(); ++i) CHECK(m.dx[i] == doctest::Approx(8 + once.dx[i]).epsilon(1e-5));
    for (const moe::slot& s : m.net.catalogue())
      for (std::size_t i = s.offset / 4; i < (s.offset + s.bytes) / 4; ++i) {
        INFO(s.name);
        REQUIRE(m.gradients()[i] == doctest::Approx(8 + once.gradients()[i]).epsilon(1e-5));
      }
  }
  TEST_CASE("backward leaves the context as it is: twice from zero gives the same bits") {
    model m(net(), T, d, 4);
    m.forward();
    m.backward();
    const auto dx = m.dx, dw = copy(m.gradients());
    std::fill(m.dx.begin(), m.dx.end(), 0.f);
    std::fill(m.gradients().begin(), m.gradients().end(), 0.f);
    m.backward();
    CHECK(m.dx == dx);
    CHECK(copy(m.gradients()) == dw);
  }
  TEST_CASE("an empty dw view is frozen: it is not computed, and the other gradients keep their bits") {
    model all(net(), T, d, 5);
    all.forward();
    all.backward();
    using view = moe::matrix_view<float>;
    const auto freeze = [&](auto pick, const char* name) {
      model m(net(), T, d, 5);
      view& frozen = pick(m.dw);
      frozen = {};
      m.forward();
      m.backward();
      CHECK(m.dx == all.dx);
      for (const moe::slot& s : m.net.catalogue()) {
        CAPTURE(s.name);
        const auto got = m.gradients().subspan(s.offset / 4, s.bytes / 4);
        const auto want =
            s.name == name ? std::vector<float>(got.size()) : copy(all.gradients().subspan(s.offset / 4, s.bytes / 4));
        CHECK(copy(got) == want);
      }
    };
    freeze([](auto& dw) -> view& { return dw.gate.w; }, "gate.w");
    freeze([](auto& dw) -> view& { return dw.experts.up; }, "experts.up");
    freeze([](auto& dw) -> view& { return dw.experts.gate; }, "experts.gate");
    freeze([](auto& dw) -> view& { return dw.experts.down; }, "experts.down");
  }
  TEST_CASE("an empty dx is not computed, and the gradients of the weights keep their bits") {
    model all(net(), T, d, 6), m(net(), T, d, 6);
    all.forward();
    all.backward();
    m.din = {};
    m.forward();
    m.backward();
    CHECK(copy(m.gradients()) == copy(all.gradients()));
    CHECK(m.dx == std::vector<float>(m.dx.size()));
  }
  TEST_CASE("with everything frozen backward writes nothing") {
    model m(net(), T, d, 7);
    m.dw = {};
    m.din = {};
    m.forward();
    m.backward();
    CHECK(copy(m.gradients()) == std::vector<float>(m.gradients().size()));
    CHECK(m.dx == std::vector<float>(m.dx.size()));
  }
  TEST_CASE("an inference context gives the bits of a training one") {
    model training(net(), T, d, 8), inference(net(), T, d, 8, false);
    training.forward();
    inference.forward();
    CHECK(inference.y == training.y);
    CHECK_FALSE(inference.ctx.experts.z);
  }
  TEST_CASE("a context made for fewer tokens than the bound serves just those") {
    model whole(net(), T, d, 9), part(net(), 4, d, 9);
    std::copy(whole.x.begin(), whole.x.begin() + 4 * d, part.x.begin());
    std::copy(whole.weights().begin(), whole.weights().end(), part.weights().begin());
    whole.forward();
    part.forward();
    CHECK(part.y == std::vector<float>(whole.y.begin(), whole.y.begin() + 4 * d));
  }
  TEST_CASE("a bound of 0 tokens means any number") {
    const ffn<2> open({.d = d, .f = 14, .experts = E});
    model bounded(net(), T, d, 10), m(open, T, d, 10);
    bounded.forward();
    m.forward();
    CHECK(m.y == bounded.y);
  }
  TEST_CASE("without tokens nothing is read or written") {
    model m(net(), 0, d, 11);
    m.forward();
    m.backward();
    moe::check(m.ctx.plan);
    CHECK(m.ctx.plan.rows() == 0);
    CHECK(copy(m.gradients()) == std::vector<float>(m.gradients().size()));
    CHECK_NOTHROW(m.net.forward(m.w, {nullptr, 0, d}, {nullptr, 0, d}, m.ctx, m.work));
  }
  TEST_CASE("experts that no token chose get no gradient, and one that all chose gets everything") {
    testing::model<ffn<1>> m(ffn<1>({.tokens = T, .d = d, .f = 14, .experts = E}), T, d, 12);
    for (dim t = 0; t < T; ++t) m.x[static_cast<std::size_t>(t * d)] = 1;
    for (dim e = 0; e < E; ++e)
      for (dim c = 0; c < d; ++c) m.w.gate.w(e, c) = e == 3 && c == 0 ? 100.f : 0.f;
    m.forward();
    m.backward();
    for (idx e = 0; e <= 3; ++e) CHECK(m.ctx.plan.offsets[static_cast<std::size_t>(e)] == 0);
    CHECK(m.ctx.plan.offsets[4] == T);
    const auto touched = [&](moe::matrix_view<float> v, dim e, dim rows) {
      bool any = false;
      for (dim r = e * rows; r < (e + 1) * rows; ++r)
        for (dim c = 0; c < v.cols; ++c) any = any || v(r, c) != 0;
      return any;
    };
    for (dim e = 0; e < E; ++e) {
      CHECK(touched(m.dw.experts.up, e, 14) == (e == 3));
      CHECK(touched(m.dw.experts.gate, e, 14) == (e == 3));
      CHECK(touched(m.dw.experts.down, e, d) == (e == 3));
    }
  }
  TEST_CASE("parts with a configuration are given to the constructor in any order") {
    using backend = moe::scalar<counting>;
    using layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, backend>;
    dim calls = 0;
    testing::model<layer> m(layer({.d = d, .f = 14, .experts = E}, moe::ffn_expert{}, backend{counting{&calls}}), T, d, 13);
    m.forward();
    CHECK(calls > 0);
    CHECK(m.net.backend().executor().calls == &calls);
  }

  TEST_CASE("a token with a NaN goes to no expert: its y is 0 and no other token changes") {
    model clean(net(), T, d, 14), m(net(), T, d, 14);
    clean.forward();
    m.x[static_cast<std::size_t>(3 * d + 2)] = not_a_number;
    m.forward();
    moe::check(m.ctx.plan);
    CHECK(m.ctx.plan.token_offsets[4] == m.ctx.plan.token_offsets[3]);
    for (dim t = 0; t < T; ++t)
      for (dim c = 0; c < d; ++c) CHECK(m.y_view()(t, c) == (t == 3 ? 0.f : clean.y_view()(t, c)));
  }
  TEST_CASE("a NaN in x reaches the gate's gradient, and no other: it does not vanish") {
    model clean(net(), T, d, 14), m(net(), T, d, 14);
    m.x[static_cast<std::size_t>(3 * d + 2)] = not_a_number;
    std::fill(clean.dy.begin() + 3 * d, clean.dy.begin() + 4 * d, 0.f);
    clean.forward();
    clean.backward();
    m.forward();
    m.backward();
    for (dim e = 0; e < E; ++e)
      for (dim c = 0; c < d; ++c) CHECK(std::isnan(m.dw.gate.w(e, c)) == (c == 2));
    for (dim t = 0; t < T; ++t)
      for (dim c = 0; c < d; ++c)
        CHECK(m.dx[static_cast<std::size_t>(t * d + c)] == (t == 3 ? 0.f : clean.dx[static_cast<std::size_t>(t * d + c)]));
    for (std::size_t i = 0; i < m.gradients().size(); ++i)
      if (i >= static_cast<std::size_t>(E * d)) REQUIRE(std::isfinite(m.gradients()[i]));
  }
  TEST_CASE("an infinity in x makes that token's y NaN or 0, never a number, and no other token changes") {
    model clean(net(), T, d, 15), m(net(), T, d, 15);
    clean.forward();
    m.x[static_cast<std::size_t>(3 * d + 2)] = infinity;  // scores are +inf and -inf by the sign of the gate's weight
    m.forward();
    moe::check(m.ctx.plan);
    for (dim t = 0; t < T; ++t)
      for (dim c = 0; c < d; ++c) {
        if (t == 3)
          CHECK(std::isnan(m.y_view()(t, c)));
        else
          CHECK(m.y_view()(t, c) == clean.y_view()(t, c));
      }
    for (dim e = 0; e < E; ++e) m.w.gate.w(e, 2) = -1;  // every score -inf: nobody is eligible
    m.forward();
    for (dim c = 0; c < d; ++c) CHECK(m.y_view()(3, c) == 0.f);
  }
  TEST_CASE("a NaN in the weights of one expert stays with the tokens that chose it") {
    model m(net(), T, d, 16);
    m.w.experts.up(2 * 14 + 1, 3) = not_a_number;
    m.forward();
    const auto& p = m.ctx.plan;
    for (dim t = 0; t < T; ++t) {
      bool chose = false;
      for (idx r = p.offsets[2]; r < p.offsets[3]; ++r) chose = chose || p.token[static_cast<std::size_t>(r)] == t;
      CHECK(std::isnan(m.y_view()(t, 0)) == chose);
    }
  }

  TEST_CASE("replaying a context's own plan gives the bits of forward, and of backward after it") {
    model first(net(), T, d, 17), second(net(), T, d, 17);
    first.forward();
    first.backward();
    const auto recorded = moe::record(first.ctx.plan);
    second.net.replay(second.w, second.in, recorded.plan(), second.y_view(), second.ctx, second.work);
    second.backward();
    CHECK(second.y == first.y);
    CHECK(second.dx == first.dx);
    CHECK(copy(second.gradients()) == copy(first.gradients()));
  }
  TEST_CASE("replay keeps the assignments and weighs them by today's scores") {
    model m(net(), T, d, 18);
    m.forward();
    const testing::assignments before(m.ctx.plan);
    const auto weights_before = copy(m.ctx.plan.weight);
    const auto recorded = moe::record(m.ctx.plan);
    for (float& v : m.weights()) v = -v;  // today's scores choose others
    m.forward();
    CHECK_FALSE(testing::assignments(m.ctx.plan) == before);
    m.net.replay(m.w, m.in, recorded.plan(), m.y_view(), m.ctx, m.work);
    CHECK(testing::assignments(m.ctx.plan) == before);
    // Scores with the sign turned: the two weights of a token change places.
    for (dim t = 0; t < T; ++t) {
      const auto first = static_cast<std::size_t>(m.ctx.plan.position[static_cast<std::size_t>(2 * t)]);
      const auto second = static_cast<std::size_t>(m.ctx.plan.position[static_cast<std::size_t>(2 * t + 1)]);
      CHECK(m.ctx.plan.weight[first] == doctest::Approx(weights_before[second]).epsilon(1e-5));
    }
  }
}
