// SPDX-License-Identifier: Apache-2.0
// Every public function of a layer with arguments that do not fit: the message, and that nothing was written.
#include <doctest/doctest.h>

#include <limits>
#include <string>

#include "moe/core/recorded_plan.hpp"
#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;
using moe::shape_error;

using ffn = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
using view = moe::matrix_view<float>;

constexpr dim T = 6, d = 4, f = 8, E = 3;

ffn net_of_test() { return ffn({.tokens = T, .d = d, .f = f, .experts = E}); }

/// A layer after one forward, with every output set to a value that a write would change.
struct model : testing::model<ffn> {
  model() : testing::model<ffn>(net_of_test(), T, ::d, 1) {
    forward();
    for (float& v : y) v = 3;
    for (float& v : dx) v = 3;
    for (float& v : gradients()) v = 3;
    plan_before = std::vector<float>(ctx.plan.weight.begin(), ctx.plan.weight.end());
    z_before = std::vector<float>(ctx.experts.z.data, ctx.experts.z.data + 2 * T * 2 * f);
  }
  bool is_unchanged() const {
    const auto all_three = [](std::span<const float> v) {
      for (const float x : v)
        if (x != 3) return false;
      return true;
    };
    return all_three(y) && all_three(dx) && all_three(gradients()) &&
           plan_before == std::vector<float>(ctx.plan.weight.begin(), ctx.plan.weight.end()) &&
           z_before == std::vector<float>(ctx.experts.z.data, ctx.experts.z.data + 2 * T * 2 * f);
  }
  std::vector<float> plan_before, z_before;
};

/// Calls f on a fresh model; its message, or "nothing was thrown", or that something was written all the same.
template <class F>
std::string refusal(F call) {
  model m;
  try {
    call(m);
  } catch (const shape_error& e) {
    return m.is_unchanged() ? e.what() : std::string("something was written before: ") + e.what();
  }
  return "nothing was thrown";
}
template <class F>
std::string refusal_of_forward(F change) {
  return refusal([&](model& m) {
    auto w = m.w;
    moe::matrix_view<const float> x = m.x_view();
    view y = m.y_view();
    change(w, x, y);
    m.net.forward(w, x, y, m.ctx, m.work);
  });
}
template <class F>
std::string refusal_of_backward(F change) {
  return refusal([&](model& m) {
    moe::matrix_view<const float> x = m.x_view(), dy = m.dy_view();
    view dx = m.din;
    change(x, dy, dx, m.dw);
    m.net.backward(m.w, x, m.ctx, dy, dx, m.dw, m.work);
  });
}
template <class F>
std::string refusal_of_replay(F change) {
  return refusal([&](model& m) {
    moe::recorded_plan recorded = moe::record(m.ctx.plan);
    moe::routing_plan plan = recorded.plan();
    change(plan);
    m.net.replay(m.w, m.in, plan, m.y_view(), m.ctx, m.work);
  });
}
std::string refusal_of_shape(moe::shape s) {
  try {
    (void)ffn(s);
  } catch (const shape_error& e) {
    return e.what();
  }
  return "nothing was thrown";
}

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE("the model of these tests is accepted as it is, and then it changes") {
    model m;
    CHECK(m.is_unchanged());
    m.forward();
    CHECK_FALSE(m.is_unchanged());
    CHECK(refusal_of_forward([](auto&, auto&, auto&) {}) == "nothing was thrown");
    CHECK(refusal_of_backward([](auto&, auto&, auto&, auto&) {}) == "nothing was thrown");
    CHECK(refusal_of_replay([](auto&) {}) == "nothing was thrown");
  }

  TEST_CASE("sizes that cannot be a layer are refused by its constructor") {
    CHECK(refusal_of_shape({.d = 0, .f = 8, .experts = 4}) == "moe::layer: d is 0, expected at least 1");
    CHECK(refusal_of_shape({.d = -1, .f = 8, .experts = 4}) == "moe::layer: d is -1, expected at least 1");
    CHECK(refusal_of_shape({.d = 4, .f = 8, .experts = 0}) == "moe::layer: experts is 0, expected at least 1");
    CHECK(refusal_of_shape({.d = 4, .f = 8, .experts = -3}) == "moe::layer: experts is -3, expected at least 1");
    CHECK(refusal_of_shape({.tokens = -2, .d = 4, .f = 8, .experts = 4}) == "moe::layer: tokens is -2, expected at least 0");
    CHECK(refusal_of_shape({.d = 4, .f = -8, .experts = 4}) == "moe::layer: f is -8, expected at least 0");
    CHECK(refusal_of_shape({.d = 4, .f = 0, .experts = 4}) == "ffn_expert: f is 0, expected at least 1");
  }
  TEST_CASE("more choices than experts are refused by the constructor") {
    CHECK(refusal_of_shape({.d = 4, .f = 8, .experts = 1}) == "top_k: k is 2, expected at most 1 (E)");
  }
  TEST_CASE("sizes whose products overflow are refused, not wrapped around") {
    constexpr dim huge = std::numeric_limits<dim>::max();
    const std::string end = " are too large to be counted";
    CHECK(refusal_of_shape({.d = huge, .f = 8, .experts = 4}) ==
          "moe: tokens = 0, d = " + std::to_string(huge) + ", f = 8, experts = 4" + end);
    CHECK(refusal_of_shape({.d = 4, .f = huge, .experts = 4}).ends_with(end));
    CHECK(refusal_of_shape({.d = 4, .f = 8, .experts = huge}).ends_with(end));
    CHECK(refusal_of_shape({.tokens = huge, .d = 4, .f = 8, .experts = 4}).ends_with(end));
    CHECK(refusal_of_shape({.d = dim{1} << 30, .f = dim{1} << 30, .experts = 8}).ends_with(end));
    CHECK(refusal_of_shape({.d = 1 << 16, .f = 1 << 18, .experts = 1 << 12}) == "nothing was thrown");  // 256 TiB of weights
    const ffn open({.d = d, .f = f, .experts = E});
    CHECK_THROWS_AS((void)open.context_bytes(huge), shape_error);
    CHECK_THROWS_WITH_AS((void)open.context_bytes(dim{1} << 30),
                         "moe::layer: T is 1073741824, which may give 2147483648 assignments, expected at most 2147483647",
                         shape_error);
    CHECK(open.context_bytes((dim{1} << 30) - 1) > std::size_t{1} << 30);
  }
  TEST_CASE("a negative number of tokens, or more than the bound, is refused wherever T is asked for") {
    const ffn net = net_of_test();
    const moe::buffer memory(1 << 16);
    moe::arena mem(memory.bytes());
    const char* negative = "moe::layer: T is -1, expected at least 0";
    const char* many = "moe::layer: T is 7, expected at most 6 (tokens)";
    CHECK_THROWS_WITH_AS((void)net.context_bytes(-1), negative, shape_error);
    CHECK_THROWS_WITH_AS((void)net.context_bytes(7), many, shape_error);
    CHECK_THROWS_WITH_AS((void)net.inference_context_bytes(7), many, shape_error);
    CHECK_THROWS_WITH_AS((void)net.scratch_bytes(-1), negative, shape_error);
    CHECK_THROWS_WITH_AS((void)net.make_context(7, mem), many, shape_error);
    CHECK_THROWS_WITH_AS((void)net.make_inference_context(-1, mem), negative, shape_error);
    CHECK_THROWS_WITH_AS((void)ffn({.d = d, .f = f, .experts = E}).context_bytes(-1),
                         "moe::layer: T is -1, expected at least 0", shape_error);
    CHECK(mem.used() == 0);
  }

  TEST_CASE("an arena that is too small is refused, whatever is carved from it") {
    const ffn net = net_of_test();
    const auto short_of = [](std::size_t needed, const char* what, const char* sizer, auto make) {
      const moe::buffer memory(needed - 1);
      moe::arena mem(memory.bytes());
      CHECK_THROWS_WITH_AS(make(mem),
                           (std::string(what) + " has " + std::to_string(needed - 1) + " bytes left, needs " +
                            std::to_string(needed) + " (" + sizer + ')')
                               .c_str(),
                           shape_error);
      CHECK(mem.used() == 0);
    };
    short_of(net.weight_bytes(), "moe::layer::make_weights: the arena", "weight_bytes()",
             [&](moe::arena& mem) { (void)net.make_weights(mem); });
    short_of(net.weight_bytes(), "moe::layer::make_gradients: the arena", "gradient_bytes()",
             [&](moe::arena& mem) { (void)net.make_gradients(mem); });
    short_of(net.context_bytes(T), "moe::layer::make_context: the arena", "context_bytes(T)",
             [&](moe::arena& mem) { (void)net.make_context(T, mem); });
    short_of(net.inference_context_bytes(T), "moe::layer::make_inference_context: the arena", "inference_context_bytes(T)",
             [&](moe::arena& mem) { (void)net.make_inference_context(T, mem); });
  }
  TEST_CASE("an arena that ends inside the padding before a context is refused") {
    const ffn net = net_of_test();
    const moe::buffer memory(40);
    moe::arena mem(memory.bytes());
    (void)mem.matrix<float>("one", 1, 1);
    CHECK_THROWS_WITH_AS((void)net.make_context(1, mem), doctest::Contains("has 0 bytes left"), shape_error);
  }
  TEST_CASE("too little scratch is refused by forward, replay and backward") {
    const auto without_scratch = [](const char* where, auto call) {
      const std::string message = refusal([&](model& m) {
        const moe::buffer memory(m.net.scratch_bytes(T) - 1);
        moe::arena mem(memory.bytes());
        call(m, mem);
      });
      const ffn net = net_of_test();
      const std::size_t needed = net.scratch_bytes(T);
      CHECK(message == std::string(where) + ": the arena has " + std::to_string(needed - 1) + " bytes left, needs " +
                           std::to_string(needed) + " (scratch_bytes(T))");
    };
    without_scratch("moe::layer::forward",
                    [](model& m, moe::arena& mem) { m.net.forward(m.w, m.in, m.y_view(), m.ctx, mem); });
    without_scratch("moe::layer::backward",
                    [](model& m, moe::arena& mem) { m.net.backward(m.w, m.in, m.ctx, m.dy_view(), m.din, m.dw, mem); });
    without_scratch("moe::layer::replay", [](model& m, moe::arena& mem) {
      const auto plan = moe::record(m.ctx.plan);
      m.net.replay(m.w, m.in, plan.plan(), m.y_view(), m.ctx, mem);
    });
  }
  TEST_CASE("an arena that only counts is refused as scratch, and so is a context made with one") {
    CHECK(refusal([](model& m) {
            moe::arena count;
            m.net.forward(m.w, m.in, m.y_view(), m.ctx, count);
          }) == "moe::layer::forward: the arena has no memory, it only counts");
    CHECK(refusal([](model& m) {
            moe::arena count;
            m.net.backward(m.w, m.in, m.ctx, m.dy_view(), m.din, m.dw, count);
          }) == "moe::layer::backward: the arena has no memory, it only counts");
    CHECK(refusal([](model& m) {
            moe::arena count;
            auto ctx = m.net.make_context(T, count);
            m.net.forward(m.w, m.in, m.y_view(), ctx, m.work);
          }) == "moe::layer::forward: ctx has no memory");
    CHECK(refusal([](model& m) {
            moe::arena count;
            const auto w = m.net.make_weights(count);
            m.net.forward(w, m.in, m.y_view(), m.ctx, m.work);
          }) == "linear_gate: w has no memory, expected 3 x 4 (E x d)");
  }

  TEST_CASE("x or y of another shape is refused by forward") {
    CHECK(refusal_of_forward([](auto&, auto& x, auto&) { x.rows = T - 1; }) ==
          "moe::layer::forward: x is 5 x 4, expected 6 x 4 (T x d)");
    CHECK(refusal_of_forward([](auto&, auto& x, auto&) { x.cols = d - 1; }) ==
          "moe::layer::forward: x is 6 x 3, expected 6 x 4 (T x d)");
    CHECK(refusal_of_forward([](auto&, auto& x, auto&) { x.ld = d - 1; }) ==
          "moe::layer::forward: x is 6 x 4 with row stride 3, expected 6 x 4 (T x d)");
    CHECK(refusal_of_forward([](auto&, auto& x, auto&) { x.data = nullptr; }) ==
          "moe::layer::forward: x has no memory, expected 6 x 4 (T x d)");
    CHECK(refusal_of_forward([](auto&, auto&, auto& y) { y.rows = T + 1; }) ==
          "moe::layer::forward: y is 7 x 4, expected 6 x 4 (T x d)");
    CHECK(refusal_of_forward([](auto&, auto&, auto& y) { y.cols = d + 1; }) ==
          "moe::layer::forward: y is 6 x 5 with row stride 4, expected 6 x 4 (T x d)");
    CHECK(refusal_of_forward([](auto&, auto&, auto& y) { y.ld = -4; }) ==
          "moe::layer::forward: y is 6 x 4 with row stride -4, expected 6 x 4 (T x d)");
    CHECK(refusal_of_forward([](auto&, auto&, auto& y) { y = {}; }) ==
          "moe::layer::forward: y is 0 x 0, expected 6 x 4 (T x d)");
  }
  TEST_CASE("weights of another shape are refused, each by its name") {
    CHECK(refusal_of_forward([](auto& w, auto&, auto&) { w.gate.w.rows = E - 1; }) ==
          "linear_gate: w is 2 x 4, expected 3 x 4 (E x d)");
    CHECK(refusal_of_forward([](auto& w, auto&, auto&) { w.experts.up.rows = f; }) ==
          "ffn_expert: up is 8 x 4, expected 24 x 4 (E*f x d)");
    CHECK(refusal_of_forward([](auto& w, auto&, auto&) { w.experts.gate = {}; }) ==
          "ffn_expert: gate is 0 x 0, expected 24 x 4 (E*f x d)");
    CHECK(refusal_of_forward([](auto& w, auto&, auto&) { std::swap(w.experts.down.rows, w.experts.down.cols); }) ==
          "ffn_expert: down is 8 x 12 with row stride 8, expected 12 x 8 (E*d x f)");
    CHECK(refusal([](model& m) {
            auto w = m.w;
            w.experts.up.data = nullptr;
            m.net.backward(w, m.in, m.ctx, m.dy_view(), m.din, m.dw, m.work);
          }) == "ffn_expert: up has no memory, expected 24 x 4 (E*f x d)");
  }
  TEST_CASE("x, dy, dx or gradients of another shape are refused by backward") {
    CHECK(refusal_of_backward([](auto& x, auto&, auto&, auto&) { x.rows = 0; }) ==
          "moe::layer::backward: x is 0 x 4, expected 6 x 4 (T x d)");
    CHECK(refusal_of_backward([](auto&, auto& dy, auto&, auto&) { dy.cols = 1; }) ==
          "moe::layer::backward: dy is 6 x 1, expected 6 x 4 (T x d)");
    CHECK(refusal_of_backward([](auto&, auto&, auto& dx, auto&) { dx.rows = T - 1; }) ==
          "moe::layer::backward: dx is 5 x 4, expected 6 x 4 (T x d)");
    CHECK(refusal_of_backward([](auto&, auto&, auto& dx, auto&) { dx.data = nullptr; }) ==
          "moe::layer::backward: dx has no memory, expected 6 x 4 (T x d)");
    CHECK(refusal([](model& m) {
            const ffn other({.d = d, .f = f, .experts = E + 1});
            const moe::buffer memory(other.weight_bytes());
            moe::arena mem(memory.bytes());
            auto dw = other.make_gradients(mem);
            m.net.backward(m.w, m.in, m.ctx, m.dy_view(), m.din, dw, m.work);
          }) == "moe::layer::backward: dw was made by a layer of another shape");
  }
  TEST_CASE("a context of another layer, or for another number of tokens, is refused") {
    const auto with_context_of = [](moe::shape s, dim tokens) {
      return refusal([&](model& m) {
        const ffn other(s);
        const moe::buffer memory(other.context_bytes(tokens));
        moe::arena mem(memory.bytes());
        auto ctx = other.make_context(tokens, mem);
        m.net.forward(m.w, m.in, m.y_view(), ctx, m.work);
      });
    };
    const std::string other = "moe::layer::forward: ctx was made by a layer of another shape";
    CHECK(with_context_of({.d = d + 1, .f = f, .experts = E}, T) == other);
    CHECK(with_context_of({.d = d, .f = f + 1, .experts = E}, T) == other);
    CHECK(with_context_of({.d = d, .f = f, .experts = E + 1}, T) == other);
    CHECK(with_context_of({.d = d, .f = f, .experts = E}, T - 1) ==
          "moe::layer::forward: x is 6 x 4, expected 5 x 4 (T x d)");
    CHECK(with_context_of({.d = d, .f = f, .experts = E}, 2 * T) ==
          "moe::layer::forward: x is 6 x 4, expected 12 x 4 (T x d)");
    CHECK(refusal([](model& m) {
            ffn::context ctx{};
            m.net.forward(m.w, m.in, m.y_view(), ctx, m.work);
          }) == other);
  }
  TEST_CASE("an inference context is refused by backward") {
    CHECK(refusal([](model& m) {
            const moe::buffer memory(m.net.inference_context_bytes(T));
            moe::arena mem(memory.bytes());
            const auto ctx = m.net.make_inference_context(T, mem);
            m.net.backward(m.w, m.in, ctx, m.dy_view(), m.din, m.dw, m.work);
          }) == "moe::layer::backward: ctx is an inference context, expected one of make_context");
  }

  TEST_CASE("a plan for other tokens or experts is refused by replay") {
    const auto with_plan_of = [](moe::shape s) {
      return refusal([&](model& m) {
        testing::model<ffn> other(ffn(s), s.tokens, s.d, 2);
        other.forward();
        m.net.replay(m.w, m.in, other.ctx.plan, m.y_view(), m.ctx, m.work);
      });
    };
    CHECK(with_plan_of({.tokens = T + 1, .d = d, .f = f, .experts = E}) ==
          "moe::layer::replay: the plan has 7 tokens, expected 6 (T)");
    CHECK(with_plan_of({.tokens = T - 1, .d = d, .f = f, .experts = E}) ==
          "moe::layer::replay: the plan has 5 tokens, expected 6 (T)");
    CHECK(with_plan_of({.tokens = T, .d = d, .f = f, .experts = E + 2}) ==
          "moe::layer::replay: the plan has 5 experts, expected 3 (E)");
  }
  TEST_CASE("a plan with more assignments than the router makes is refused by replay") {
    CHECK(refusal([](model& m) {
            using wide = moe::layer<moe::linear_gate, moe::top_k<3>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
            testing::model<wide> other(wide({.tokens = T, .d = d, .f = f, .experts = E}), T, d, 2);
            other.forward();
            m.net.replay(m.w, m.in, other.ctx.plan, m.y_view(), m.ctx, m.work);
          }) == "moe::layer::replay: the plan has 18 assignments, expected at most 12 (max_rows)");
  }
  TEST_CASE("a broken plan is refused by replay, with what is broken") {
    CHECK(refusal_of_replay([](auto& p) { p = {}; }) == "routing_plan: offsets or token_offsets are missing");
    CHECK(refusal_of_replay([](auto& p) { p.offsets[0] = 1; }) == "routing_plan: offsets do not start at 0");
    CHECK(refusal_of_replay([](auto& p) { p.offsets[1] = 1000; }) == "routing_plan: offsets do not ascend");
    CHECK(refusal_of_replay([](auto& p) { p.offsets[E] = 1000; }) == "routing_plan: offsets end beyond the rows");
    CHECK(refusal_of_replay([](auto& p) { p.token[0] = T; }) == "routing_plan: a row names a token that does not exist");
    CHECK(refusal_of_replay([](auto& p) { p.token[0] = -1; }) == "routing_plan: a row names a token that does not exist");
    CHECK(refusal_of_replay([](auto& p) { p.position[0] = 1000; }) == "routing_plan: a position is beyond the rows");
    CHECK(refusal_of_replay([](auto& p) { p.position[0] = p.position[1]; }) == "routing_plan: a token names one row twice");
    CHECK(refusal_of_replay([](auto& p) { p.token_offsets[1] = -5; }) == "routing_plan: token_offsets do not ascend");
    CHECK(refusal_of_replay([](auto& p) { p.position[0] = std::numeric_limits<idx>::min(); }) ==
          "routing_plan: a dropped assignment names an expert that does not exist");
  }
}
