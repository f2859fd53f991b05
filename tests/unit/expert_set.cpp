// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/storing_expert.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;
using testing::storing_expert;
using backend = moe::scalar<>;
template <class X>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<2>, X, moe::weighted_sum, backend>;
using plain_ffn = moe::basic_ffn_expert<moe::plain<moe::silu>, moe::chunked, true>;
using two = moe::expert_set<moe::ffn_expert, plain_ffn>;

std::vector<std::string> names(const std::vector<moe::slot>& catalogue) {
  std::vector<std::string> list;
  for (const moe::slot& s : catalogue) list.push_back(s.name);
  return list;
}
template <class X>
std::size_t expert_context_bytes(const X& expert, moe::shape s, dim rows) {
  moe::arena count;
  (void)expert.make_context(s, rows, count);
  return moe::padded(count);
}

}  // namespace

TEST_SUITE("expert/set") {
  TEST_CASE("banks own the experts of the plan in their order, whatever their number") {
    // One row for each of five experts: banks of 2, 0 and 3 of them, each expert's v its number.
    using set = moe::expert_set<storing_expert, moe::copy_expert, storing_expert>;
    const set experts{{.count = 2}, {.count = 0}, {.count = 3}};
    std::vector<float> a{1, 2}, c{3, 4, 5}, x{10}, rows(5), y(1);
    const idx offsets[] = {0, 1, 2, 3, 4, 5}, token[] = {0, 0, 0, 0, 0};
    set::weights w{{{a.data(), 2, 1}}, {}, {{c.data(), 3, 1}}};
    set::context context;
    const moe::buffer memory(1024);
    moe::arena mem(memory.bytes());
    set::output ys = experts.make_output({.tokens = 1, .d = 1, .experts = 5}, 5, mem);
    experts.forward(testing::on<backend>({.tokens = 1, .d = 1, .experts = 5}), w, {x.data(), 1, 1},
                    {.offsets = offsets, .token = token}, ys, context);
    for (dim r = 0; r < 5; ++r) {
      y[0] = 0;
      ys.add_row(moe::arch::scalar{}, r, 1.f, y.data(), 1);
      CHECK(y[0] == static_cast<float>(10 * (r + 1)));
    }
    std::vector<float> da(2), dc(3), dy{1}, dx(1), dweight(5);
    set::weights_grad dw{{{da.data(), 2, 1}}, {}, {{dc.data(), 3, 1}}};
    const float weight[] = {1, 2, 3, 4, 5};
    const idx token_offsets[] = {0, 5}, position[] = {4, 3, 2, 1, 0};
    experts.backward(testing::on<backend>({.tokens = 1, .d = 1, .experts = 5}), w, {x.data(), 1, 1},
                     {offsets, token, weight, token_offsets, position}, context, {{dy.data(), 1, 1}, token, weight},
                     {dx.data(), 1, 1}, dw, dweight);
    CHECK(da == std::vector<float>{10, 20});
    CHECK(dc == std::vector<float>{30, 40, 50});
    CHECK(dx[0] == 1 + 4 + 9 + 16 + 25);
    CHECK(dweight == std::vector<float>{10, 20, 30, 40, 50});
  }
  TEST_CASE("banks share one record per row: the context is that of the widest bank alone") {
    const two experts{{.count = 3, .f = 8}, {.count = 1, .f = 48}};  // records of 64 and of 192 bytes
    CHECK(expert_context_bytes(experts, {.d = 5, .experts = 4}, 64) == 64 * 192);
    CHECK(expert_context_bytes(plain_ffn{}, {.d = 5, .f = 48, .experts = 1}, 64) == 64 * 192);
    const two other{{.count = 1, .f = 24}, {.count = 3, .f = 16}};  // gate and up: 192; 64
    CHECK(expert_context_bytes(other, {.d = 5, .experts = 4}, 64) == 64 * 192);
  }
  TEST_CASE("sets within sets share the same record") {
    using nested = moe::expert_set<plain_ffn, moe::expert_set<moe::ffn_expert, plain_ffn>>;
    const nested experts{{.count = 1, .f = 16}, {.count = 2, .expert = two{{.count = 1, .f = 24}, {.count = 1, .f = 32}}}};
    CHECK(expert_context_bytes(experts, {.d = 5, .experts = 3}, 64) == 64 * 192);
  }
  TEST_CASE("banks that keep nothing need no record, and a bank without experts needs no memory") {
    using small = moe::expert_set<moe::copy_expert, storing_expert, moe::zero_expert>;
    CHECK(expert_context_bytes(small{{.count = 1}, {.count = 1}, {.count = 1}}, {.d = 5, .experts = 3}, 64) == 0);
    const two alone{{.count = 4, .f = 8}, {.count = 0, .f = 4096}};
    CHECK(expert_context_bytes(alone, {.d = 5, .experts = 4}, 64) == 64 * 64);
    const layer_of<two> net({.d = 5, .experts = 4}, alone);
    CHECK(net.scratch_bytes(64) == layer_of<moe::ffn_expert>({.d = 5, .f = 8, .experts = 4}).scratch_bytes(64));
    CHECK(net.weight_bytes() == layer_of<moe::ffn_expert>({.d = 5, .f = 8, .experts = 4}).weight_bytes());
  }
  TEST_CASE("a set of one bank and a set of the same bank twice are that bank bit for bit") {
    using once = moe::expert_set<moe::ffn_expert>;
    using twice = moe::expert_set<moe::ffn_expert, moe::ffn_expert>;
    const moe::shape s{.d = 6, .f = 9, .experts = 4};
    testing::model<layer_of<moe::ffn_expert>> a(layer_of<moe::ffn_expert>(s), 13, 6, 1);
    testing::model<layer_of<once>> b(layer_of<once>(s, once{{.count = 4}}), 13, 6, 1);
    testing::model<layer_of<twice>> c(layer_of<twice>(s, twice{{.count = 1}, {.count = 3}}), 13, 6, 1);
    const auto part = [](moe::matrix_view<float> from, moe::matrix_view<float> to) {
      for (dim r = 0; r < to.rows; ++r)
        for (dim j = 0; j < to.cols; ++j) to(r, j) = from(r, j);
    };
    part(a.w.gate.w, c.w.gate.w);
    const auto split = [&](auto member, dim rows) {
      part(a.w.experts.*member, std::get<0>(c.w.experts).*member);
      part((a.w.experts.*member).slice(rows, 3 * rows), std::get<1>(c.w.experts).*member);
    };
    split(&moe::ffn_weights::up, 9);
    split(&moe::ffn_weights::gate, 9);
    split(&moe::ffn_weights::down, 6);
    a.forward();
    b.forward();
    c.forward();
    CHECK(a.y == b.y);
    CHECK(a.y == c.y);
    a.backward();
    b.backward();
    c.backward();
    CHECK(a.dx == b.dx);
    for (std::size_t i = 0; i < a.dx.size(); ++i) CHECK(a.dx[i] == doctest::Approx(c.dx[i]).epsilon(1e-5));
    CHECK(a.dw.experts.down(4 * 6 - 1, 8) == std::get<1>(c.dw.experts).down(3 * 6 - 1, 8));
  }
  TEST_CASE("the catalogue names a bank by its place, also within a set") {
    using nested = moe::expert_set<moe::copy_expert, two, storing_expert>;
    const nested experts{
        {.count = 1}, {.count = 2, .expert = two{{.count = 1, .f = 3}, {.count = 1, .f = 4}}}, {.count = 1}};
    std::vector<moe::slot> list;
    moe::arena count(list);
    (void)experts.make_weights({.d = 5, .experts = 4}, count);
    CHECK(names(list) == std::vector<std::string>{"1.0.up", "1.0.gate", "1.0.down", "1.1.up", "1.1.down", "1.1.up_bias",
                                                  "1.1.down_bias", "2.v"});
  }
  TEST_CASE("a set is as wide as its banks are many") {
    using moe::copy_expert, moe::zero_expert;
    using eight = moe::expert_set<copy_expert, zero_expert, storing_expert, moe::constant_expert, moe::film_expert,
                                  zero_expert, storing_expert, copy_expert>;
    const eight experts{{.count = 1}, {.count = 1}, {.count = 1}, {.count = 1},
                        {.count = 1}, {.count = 1}, {.count = 1}, {.count = 1}};
    experts.check({.d = 4, .experts = 8});
    std::vector<moe::slot> list;
    moe::arena count(list);
    (void)experts.make_weights({.d = 4, .experts = 8}, count);
    CHECK(names(list) == std::vector<std::string>{"2.v", "3.v", "3.mix", "4.gamma", "4.beta", "6.v"});
  }
  TEST_CASE("counts that do not add up, and banks that cannot work, are refused") {
    CHECK_THROWS_WITH_AS((two{{.count = 3, .f = 4}, {.count = 2, .f = 4}}.check({.d = 4, .experts = 4})),
                         "expert_set: the banks hold 5 experts, expected 4 (E)", moe::shape_error);
    CHECK_THROWS_WITH_AS(two{}.check({.d = 4, .f = 4, .experts = 4}), "expert_set: the banks hold 0 experts, expected 4 (E)",
                         moe::shape_error);
    CHECK_THROWS_WITH_AS((two{{.count = -1, .f = 4}, {.count = 5, .f = 4}}.check({.d = 4, .experts = 4})),
                         "expert_set: a bank's count is -1, expected at least 0", moe::shape_error);
    CHECK_THROWS_WITH_AS((two{{.count = 2, .f = -4}, {.count = 2, .f = 4}}.check({.d = 4, .experts = 4})),
                         "expert_set: a bank's f is -4, expected at least 0", moe::shape_error);
    CHECK_THROWS_WITH_AS((two{{.count = 2, .f = 4}, {.count = 2}}.check({.d = 4, .experts = 4})),
                         "ffn_expert: f is 0, expected at least 1", moe::shape_error);
    CHECK_NOTHROW((two{{.count = 4, .f = 4}, {.count = 0}}.check({.d = 4, .experts = 4})));
    CHECK_NOTHROW((two{{.count = 2}, {.count = 2, .f = 4}}.check({.d = 4, .f = 6, .experts = 4})));
  }
}
