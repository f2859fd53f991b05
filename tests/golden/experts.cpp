// SPDX-License-Identifier: Apache-2.0
// Every expert of the library inside a layer, forward and backward.
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/expert_rules.hpp"

namespace {

using namespace golden;
using backend = moe::scalar<>;
template <class X, class C = moe::weighted_sum, int K = 2>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<K>, X, C, backend>;

template <class X>
void check_form(const X& expert, const form_rule& form, order lies = order::separate, std::uint64_t seed = 1) {
  compare(layer_of<X>({.d = 5, .f = 7, .experts = 3}, expert), 9, 5, seed, routed(2, weigh_rows(feed_forward(form, lies))));
}

}  // namespace

TEST_SUITE("expert/ffn") {
  using moe::basic_ffn_expert, moe::chunked, moe::clamped, moe::ffn_expert, moe::gpt_oss_expert, moe::interleaved,
      moe::separate, moe::shifted_glu, moe::weighted_sum;

  TEST_CASE("plain forms agree with their formulas, forward and backward") {
    check_form(basic_ffn_expert<moe::plain<moe::relu>>{}, plain(golden::relu));
    check_form(basic_ffn_expert<moe::plain<moe::relu_squared>, separate, true>{}, plain(golden::relu_squared));
    check_form(basic_ffn_expert<moe::plain<moe::gelu>, separate, true>{}, plain(golden::gelu));
    check_form(basic_ffn_expert<moe::plain<moe::gelu_tanh>>{}, plain(golden::gelu_tanh));
    check_form(basic_ffn_expert<moe::plain<moe::silu>>{}, plain(golden::silu));
    check_form(basic_ffn_expert<moe::plain<moe::identity>, separate, true>{}, plain(golden::identity));
  }
  TEST_CASE("gated forms agree with their formulas in every layout, with biases and without") {
    check_form(basic_ffn_expert<moe::glu<moe::relu>, separate, true>{}, glu(golden::relu));
    check_form(basic_ffn_expert<moe::glu<moe::relu_squared>, chunked>{}, glu(golden::relu_squared), order::chunked);
    check_form(basic_ffn_expert<moe::glu<moe::gelu>, interleaved>{}, glu(golden::gelu), order::interleaved);
    check_form(basic_ffn_expert<moe::glu<moe::gelu_tanh>, chunked, true>{}, glu(golden::gelu_tanh), order::chunked);
    check_form(basic_ffn_expert<moe::glu<moe::identity>, interleaved, true>{}, glu(golden::identity), order::interleaved);
    check_form(ffn_expert{}, glu(golden::silu));
  }
  TEST_CASE("a layer of a plain form has nothing to interleave: its layout changes nothing") {
    check_form(basic_ffn_expert<moe::plain<moe::gelu>, interleaved, true>{}, plain(golden::gelu));
  }
  TEST_CASE("clamped forms clamp before the product and stop the gradient beyond the limit") {
    check_form(basic_ffn_expert<clamped<moe::glu<moe::silu>>, chunked>{{.form = {}, .limit = 0.3f}},
               clamp(glu(golden::silu), double{0.3f}), order::chunked);
    check_form(basic_ffn_expert<shifted_glu>{}, shifted);
    check_form(gpt_oss_expert{{.form = {}, .limit = 0.4f}}, clamp(shifted, double{0.4f}), order::interleaved);
  }
  TEST_CASE("the gpt-oss expert clamps at 7 with alpha 1.702, gates on even rows, ups on odd rows") {
    testing::model<layer_of<gpt_oss_expert>> m(layer_of<gpt_oss_expert>({.d = 5, .f = 7, .experts = 3}), 9, 5, 3);
    for (float& v : m.x) v *= 8;
    compare(m, routed(2, weigh_rows(feed_forward(clamp(shifted, 7), order::interleaved))));
    int beyond = 0;
    for (dim r = 0; r < m.ctx.plan.rows(); ++r)
      for (dim j = 0; j < 14; ++j) beyond += std::fabs(m.ctx.experts.z(r, j)) > 7;
    CHECK(beyond > 20);
  }
  TEST_CASE("odd shapes: one expert, one token, k = E, widths of one, more experts than rows") {
    const auto rule = [](dim k) { return routed(k, weigh_rows(feed_forward(glu(golden::silu), order::chunked))); };
    using expert = basic_ffn_expert<moe::glu<moe::silu>, chunked, true>;
    compare(layer_of<expert, weighted_sum, 1>({.d = 3, .f = 5, .experts = 1}), 6, 3, 11, rule(1));
    compare(layer_of<expert>({.d = 4, .f = 9, .experts = 4}), 1, 4, 12, rule(2));
    compare(layer_of<expert, weighted_sum, 3>({.d = 5, .f = 3, .experts = 3}), 8, 5, 13, rule(3));
    compare(layer_of<expert>({.d = 1, .f = 1, .experts = 2}), 5, 1, 14, rule(2));
    compare(layer_of<expert>({.d = 17, .f = 2, .experts = 9}), 2, 17, 15, rule(2));
    compare(layer_of<expert>({.d = 2, .f = 33, .experts = 3}), 5, 2, 16, rule(2));
  }
  TEST_CASE("all tokens on two experts: the others get no gradient at all") {
    using expert = basic_ffn_expert<moe::glu<moe::gelu>, interleaved, true>;
    testing::model<layer_of<expert>> m(layer_of<expert>({.d = 5, .f = 6, .experts = 4}), 70, 5, 17);
    for (dim t = 0; t < 70; ++t) m.x[static_cast<std::size_t>(t * 5)] = 1;
    m.w.gate.w(1, 0) = 20;
    m.w.gate.w(3, 0) = 20;
    compare(m, routed(2, weigh_rows(feed_forward(glu(golden::gelu), order::interleaved))));
    CHECK(m.ctx.plan.offsets[1] == 0);
    CHECK(m.ctx.plan.offsets[2] == m.ctx.plan.offsets[3]);
    for (dim i = 0; i < 12; ++i)
      for (dim j = 0; j < 5; ++j) {
        CHECK(m.dw.experts.gate_up(i, j) == 0);
        CHECK(m.dw.experts.gate_up(2 * 12 + i, j) == 0);
      }
  }
}

TEST_SUITE("expert/layout") {
  // The same weights in three layouts: y and all gradients are equal bit for bit.
  TEST_CASE("re-arranged weights are the same function bit for bit") {
    using moe::basic_ffn_expert, moe::chunked, moe::interleaved, moe::separate;
    const dim T = 21, d = 9, f = 11, E = 3;
    const moe::shape sizes{.d = d, .f = f, .experts = E};
    testing::model<layer_of<basic_ffn_expert<moe::glu<moe::silu>, separate, true>>> a(
        layer_of<basic_ffn_expert<moe::glu<moe::silu>, separate, true>>(sizes), T, d, 5);
    testing::model<layer_of<basic_ffn_expert<moe::glu<moe::silu>, chunked, true>>> b(
        layer_of<basic_ffn_expert<moe::glu<moe::silu>, chunked, true>>(sizes), T, d, 5);
    testing::model<layer_of<basic_ffn_expert<moe::glu<moe::silu>, interleaved, true>>> c(
        layer_of<basic_ffn_expert<moe::glu<moe::silu>, interleaved, true>>(sizes), T, d, 5);
    // f(both, gate, up) for a row of gate_up in each layout.
    const auto each_row = [&](auto fused, auto gate, auto up, bool even, auto f2) {
      for (dim e = 0; e < E; ++e)
        for (dim i = 0; i < f; ++i)
          for (dim j = 0; j < fused.cols; ++j) {
            f2(fused(e * 2 * f + (even ? 2 * i : i), j), gate(e * f + i, j));
            f2(fused(e * 2 * f + (even ? 2 * i + 1 : f + i), j), up(e * f + i, j));
          }
    };
    const auto assign = [](float& to, float from) { to = from; };
    const auto same = [](const auto& from, const auto& to) {
      for (dim r = 0; r < from.rows; ++r)
        for (dim j = 0; j < from.cols; ++j) to(r, j) = from(r, j);
    };
    const auto take = [&](auto& m, bool even) {
      each_row(m.w.experts.gate_up, a.w.experts.gate, a.w.experts.up, even, assign);
      each_row(m.w.experts.gate_up_bias, a.w.experts.gate_bias, a.w.experts.up_bias, even, assign);
      same(a.w.gate.w, m.w.gate.w);
      same(a.w.experts.down, m.w.experts.down);
      same(a.w.experts.down_bias, m.w.experts.down_bias);
    };
    take(b, false);
    take(c, true);
    a.forward();
    b.forward();
    c.forward();
    CHECK(a.y == b.y);
    CHECK(a.y == c.y);
    a.backward();
    b.backward();
    c.backward();
    CHECK(a.dx == b.dx);
    CHECK(a.dx == c.dx);
    int different = 0;
    const auto count = [&](float x, float y) { different += x != y; };
    each_row(b.dw.experts.gate_up, a.dw.experts.gate, a.dw.experts.up, false, count);
    each_row(c.dw.experts.gate_up, a.dw.experts.gate, a.dw.experts.up, true, count);
    each_row(b.dw.experts.gate_up_bias, a.dw.experts.gate_bias, a.dw.experts.up_bias, false, count);
    each_row(c.dw.experts.gate_up_bias, a.dw.experts.gate_bias, a.dw.experts.up_bias, true, count);
    CHECK(different == 0);
  }
}

TEST_SUITE("expert/trivial") {
  TEST_CASE("constant experts mix x and v by a softmax, forward and backward") {
    compare(layer_of<moe::constant_expert>({.d = 5, .experts = 4}), 9, 5, 21, routed(2, weigh_rows(constant("experts."))));
    compare(layer_of<moe::constant_expert, moe::residual<>, 1>({.d = 1, .experts = 1}), 3, 1, 22,
            routed(1, weigh_rows(constant("experts.")), 1));
  }
  TEST_CASE("copy and zero experts have their formulas, forward and backward") {
    compare(layer_of<moe::copy_expert>({.d = 4, .experts = 3}), 7, 4, 23, routed(2, weigh_rows(copied)));
    compare(layer_of<moe::zero_expert>({.d = 4, .experts = 3}), 7, 4, 24, routed(2, weigh_rows(nothing)));
  }
}
