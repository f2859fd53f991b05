// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/core/recorded_plan.hpp"
#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using backend = moe::scalar<>;
using routed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, backend>;
using shared = moe::gated_dense<moe::ffn_expert, backend>;
using both = moe::sum<routed, shared>;
constexpr dim T = 5, d = 6;

both make_both() { return {routed({.d = d, .f = 8, .experts = 3}), shared({.d = d, .f = 10})}; }

bool untouched(const std::vector<float>& v, float mark = 7) {
  for (const float a : v)
    if (a != mark) return false;
  return true;
}

}  // namespace

TEST_SUITE("sum") {
  TEST_CASE("sizes that cannot be are refused, and T beyond the tokens of the shape") {
    CHECK_THROWS_WITH_AS(shared({.d = 0, .f = 3}), "moe::dense: d is 0, expected at least 1", moe::shape_error);
    CHECK_THROWS_WITH_AS(shared({.tokens = -1, .d = 3, .f = 3}), "moe::dense: tokens is -1, expected at least 0",
                         moe::shape_error);
    CHECK_THROWS_WITH_AS(shared({.d = 3, .f = -3}), "moe::dense: f is -3, expected at least 0", moe::shape_error);
    CHECK_THROWS_WITH_AS(shared({.d = 3}), "ffn_expert: f is 0, expected at least 1", moe::shape_error);
    const shared net({.tokens = 4, .d = 3, .f = 3});
    CHECK_THROWS_WITH_AS(net.context_bytes(5), "moe::dense: T is 5, expected at most 4 (tokens)", moe::shape_error);
    CHECK_THROWS_WITH_AS(net.scratch_bytes(-1), "moe::dense: T is -1, expected at least 0", moe::shape_error);
    CHECK_THROWS_AS(shared({.d = 3, .f = 3}).scratch_bytes(dim{1} << 40), moe::shape_error);
  }
  TEST_CASE("no tokens: forward and backward do nothing") {
    testing::model<both> m(make_both(), 0, d, 1);
    m.forward();
    m.backward();
    for (const float g : m.gradients()) CHECK(g == 0);
    testing::model<shared> s(shared({.d = d, .f = 10}), 0, d, 1);
    s.forward();
    s.backward();
    for (const float g : s.gradients()) CHECK(g == 0);
  }
  TEST_CASE("an inference context gives the same bits as one for training, and takes no memory of the shared path") {
    testing::model<both> a(make_both(), T, d, 2), b(make_both(), T, d, 2, false);
    a.forward();
    b.forward();
    CHECK(a.y == b.y);
    CHECK(a.net.inference_context_bytes(T) == a.net.routed().inference_context_bytes(T));
    CHECK_THROWS_WITH_AS(b.backward(), "moe::layer::backward: ctx is an inference context, expected one of make_context",
                         moe::shape_error);
    testing::model<shared> s(shared({.d = d, .f = 10}), T, d, 2, false);
    s.forward();
    CHECK_THROWS_WITH_AS(s.backward(), "moe::dense::backward: ctx is an inference context, expected one of make_context",
                         moe::shape_error);
  }
  TEST_CASE("bytes are the sums of both parts' bytes, and the arenas they size are enough wherever they stand") {
    const both net = make_both();
    CHECK(net.weight_bytes() == net.routed().weight_bytes() + net.shared().weight_bytes());
    CHECK(net.context_bytes(T) == net.routed().context_bytes(T) + net.shared().context_bytes(T));
    testing::model<both> m(net, T, d, 3);
    const moe::buffer memory(64 * 4 + net.scratch_bytes(T) + 512);
    moe::arena mem(memory.bytes());
    (void)mem.matrix<float>("something odd", 1, 3);
    const std::size_t used = mem.used();
    m.net.forward(m.w, m.in, m.y_view(), m.ctx, mem);
    CHECK(mem.used() == used);
    m.net.backward(m.w, m.in, m.ctx, m.dy_view(), m.din, m.dw, mem);
    CHECK(mem.used() == used);
    CHECK(mem.peak() > used);
    shared alone({.d = d, .f = 10});
    auto ctx = alone.make_inference_context(T, mem);
    alone.forward(m.w.shared, m.in, m.y_view(), ctx, mem);
    CHECK(mem.used() == used);
  }
  TEST_CASE("what does not fit is refused by name, before anything is written, whichever part it belongs to") {
    testing::model<both> m(make_both(), T, d, 4);
    std::fill(m.y.begin(), m.y.end(), 7.f);
    std::fill(m.dx.begin(), m.dx.end(), 7.f);
    const auto refuse = [&](const std::string& message, both::weights w, both::input x, moe::matrix_view<float> y,
                            const both::context& ctx, moe::arena& mem) {
      auto own = ctx;
      CHECK_THROWS_WITH_AS(m.net.forward(w, x, y, own, mem), message.c_str(), moe::shape_error);
      CHECK(untouched(m.y));
    };
    const auto y = m.y_view();
    both::weights wrong = m.w;
    wrong.shared.gate.cols = d - 1;
    refuse("moe::dense: gate is 1 x 5, expected 1 x 6 (1 x d)", wrong, m.in, y, m.ctx, m.work);
    wrong = m.w;
    wrong.shared.expert.up = {};
    refuse("ffn_expert: up is 0 x 0, expected 10 x 6 (E*f x d)", wrong, m.in, y, m.ctx, m.work);
    refuse("moe::layer::forward: x is 4 x 6, expected 5 x 6 (T x d)", m.w, m.in.slice(0, 4), y, m.ctx, m.work);
    refuse("moe::layer::forward: y is 5 x 5, expected 5 x 6 (T x d)", m.w, m.in, y.columns(0, 5), m.ctx, m.work);
    const moe::buffer other(m.net.context_bytes(4));
    moe::arena there(other.bytes());
    both::context mixed = m.net.make_context(4, there);
    mixed.routed = m.ctx.routed;
    refuse("moe::dense: x is 5 x 6, expected 4 x 6 (T x d)", m.w, m.in, y, mixed, m.work);
    const moe::buffer little(m.net.scratch_bytes(T) - 512);
    moe::arena short_of(little.bytes());
    refuse("moe::sum::forward: the arena has " + std::to_string(little.size()) + " bytes left, needs " +
               std::to_string(m.net.scratch_bytes(T)) + " (scratch_bytes(T))",
           m.w, m.in, y, m.ctx, short_of);
    moe::arena counts;
    refuse("moe::layer::forward: the arena has no memory, it only counts", m.w, m.in, y, m.ctx, counts);
  }
  TEST_CASE("backward refuses what does not fit before it adds to anything") {
    testing::model<both> m(make_both(), T, d, 5);
    m.forward();
    std::fill(m.dx.begin(), m.dx.end(), 7.f);
    const auto refuse = [&](const char* message, both::context& ctx, moe::matrix_view<float> dx, both::gradients& dw) {
      CHECK_THROWS_WITH_AS(m.net.backward(m.w, m.in, ctx, m.dy_view(), dx, dw, m.work), message, moe::shape_error);
      CHECK(untouched(m.dx));
      for (const float g : m.gradients()) CHECK(g == 0);
    };
    auto ctx = m.ctx;
    ctx.shared.training = false;
    refuse("moe::dense::backward: ctx is an inference context, expected one of make_context", ctx, m.din, m.dw);
    const moe::buffer memory(shared({.d = d, .f = 3}).weight_bytes());
    moe::arena mem(memory.bytes());
    both::gradients dw = m.dw;
    dw.shared = shared({.d = d, .f = 3}).make_gradients(mem);
    refuse("moe::dense::backward: dw was made by a layer of another shape", m.ctx, m.din, dw);
    testing::model<shared> s(shared({.d = d, .f = 10}), T, d, 5);
    s.forward();
    CHECK_THROWS_WITH_AS(s.net.backward(s.w, s.in, s.ctx, s.dy_view(), s.din.slice(0, 4), s.dw, s.work),
                         "moe::dense: dx is 4 x 6, expected 5 x 6 (T x d)", moe::shape_error);
  }
  TEST_CASE("frozen parts: empty gradients are not computed, and the others are what they were") {
    testing::model<both> all(make_both(), T, d, 6), some(make_both(), T, d, 6);
    all.forward();
    all.backward();
    some.forward();
    some.dw.shared = {};
    some.dw.routed.experts = {};
    some.din = {};
    some.backward();
    CHECK(untouched(some.dx, 0));
    const auto list = all.net.catalogue();
    for (const moe::slot& s : list) {
      const bool frozen = s.name != "routed.gate.w";
      for (std::size_t i = s.offset / 4; i < (s.offset + s.bytes) / 4; ++i)
        CHECK(some.gradients()[i] == (frozen ? 0 : all.gradients()[i]));
    }
  }
  TEST_CASE("replay along the plan that forward chose gives its bits again, also through a sum of sums") {
    const moe::sum net(make_both(), moe::dense<moe::copy_expert, backend>({.d = d}));
    testing::model<std::remove_const_t<decltype(net)>> m(net, T, d, 8);
    m.forward();
    const auto y = m.y;
    const auto recorded = moe::record(m.ctx.routed.routed.plan);
    std::fill(m.y.begin(), m.y.end(), 0.f);
    m.net.replay(m.w, m.in, recorded.plan(), m.y_view(), m.ctx, m.work);
    CHECK(m.y == y);
    CHECK_THROWS_WITH_AS(m.net.replay(m.w, m.in.slice(0, 4), recorded.plan(), m.y_view(), m.ctx, m.work),
                         "moe::layer::forward: x is 4 x 6, expected 5 x 6 (T x d)", moe::shape_error);
  }
  TEST_CASE("a sum of sums has the public functions of a layer") {
    const moe::sum net(make_both(), moe::dense<moe::copy_expert, backend>({.d = d}));
    testing::model<std::remove_const_t<decltype(net)>> m(net, T, d, 7);
    testing::model<both> inner(make_both(), T, d, 7);
    std::copy(m.weights().begin(), m.weights().begin() + static_cast<dim>(inner.weights().size()), inner.weights().begin());
    m.forward();
    inner.forward();
    for (std::size_t i = 0; i < m.y.size(); ++i) CHECK(m.y[i] == inner.y[i] + m.x[i]);
  }
}
