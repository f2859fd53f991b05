// SPDX-License-Identifier: Apache-2.0
// Jin et al. 2024 (MoE++), arXiv:2410.07348
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;
using backend = moe::scalar<>;
template <class X>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<2>, X, moe::weighted_sum, backend>;
using mixed = moe::expert_set<moe::ffn_expert, moe::constant_expert, moe::copy_expert, moe::zero_expert>;

static_assert(moe::TrainableExpert<moe::zero_expert, backend> && moe::TrainableExpert<moe::copy_expert, backend> &&
              moe::TrainableExpert<moe::constant_expert, backend>);

// A layer of one ffn, constant, copy and zero expert each, whose every token chooses experts a and b.
struct choosing {
  static constexpr dim T = 5, d = 6;
  testing::model<layer_of<mixed>> m;

  choosing(dim a, dim b)
      : m(layer_of<mixed>({.d = d, .f = 7, .experts = 4}, mixed{{.count = 1}, {.count = 1}, {.count = 1}, {.count = 1}}), T,
          d, 3) {
    for (dim t = 0; t < T; ++t) m.x[static_cast<std::size_t>(t * d)] = 1;
    m.w.gate.w(a, 0) = 30;
    m.w.gate.w(b, 0) = 29;
    m.forward();
  }
  float weight(dim e, dim t) const {
    return m.ctx.plan.weight[static_cast<std::size_t>(m.ctx.plan.offsets[static_cast<std::size_t>(e)] + t)];
  }
};

// Three tokens for one or two experts, in rows of their own order.
struct small_plan {
  idx offsets[3] = {0, 2, 3}, token[3] = {0, 2, 1}, token_offsets[4] = {0, 1, 2, 3}, position[3] = {0, 2, 1};
  float weight[3] = {0.5f, 0.25f, 2};
  moe::bank_rows rows() const { return {offsets, token, weight, token_offsets, position}; }
};

}  // namespace

TEST_SUITE("expert/trivial") {
  TEST_CASE("a token that chooses copy and zero gets its share of itself") {
    const choosing c(2, 3);
    for (dim t = 0; t < c.T; ++t)
      for (dim j = 0; j < c.d; ++j) {
        const auto i = static_cast<std::size_t>(t * c.d + j);
        CHECK(c.m.y[i] == c.weight(2, t) * c.m.x[i]);
      }
  }
  TEST_CASE("a token that chooses a feed-forward expert and zero gets that expert alone, weighed") {
    choosing c(0, 3);
    const moe::dense<moe::ffn_expert, backend> alone({.d = c.d, .f = 7});
    const moe::buffer memory(alone.scratch_bytes(c.T));
    moe::arena mem(memory.bytes());
    auto ctx = alone.make_inference_context(c.T, mem);
    std::vector<float> y(c.m.y.size());
    alone.forward({{}, std::get<0>(c.m.w.experts)}, c.m.x_view(), {y.data(), c.T, c.d}, ctx, mem);
    for (dim t = 0; t < c.T; ++t)
      for (dim j = 0; j < c.d; ++j) {
        const auto i = static_cast<std::size_t>(t * c.d + j);
        CHECK(c.m.y[i] == doctest::Approx(c.weight(0, t) * y[i]));
      }
    CHECK(c.weight(0, 0) < 1);
  }
  TEST_CASE("a constant expert whose mix is 0 is halfway between x and v") {
    moe::constant_expert expert;
    std::vector<float> v{1, 2, 3, 10, 20, 30}, mix(4 * 3), x{1, 0, 0, 0, 4, 0, 5, 5, 5}, share(6), y(3);
    std::vector<idx> owner(3);
    const small_plan p;
    moe::nothing context;
    moe::constant_expert::output ys{{}, {}, {share.data(), 3, 2}, {owner.data(), 3, 1}};
    expert.forward(testing::on<backend>({.tokens = 3, .d = 3, .experts = 2}), {{v.data(), 2, 3}, {mix.data(), 4, 3}},
                   {x.data(), 3, 3}, p.rows(), ys, context);
    ys.add_row(moe::arch::scalar{}, 1, 2.f, y.data(), 3);  // row 1 is token 2 at expert 0
    CHECK(y == std::vector<float>{6, 7, 8});
    ys.add_row(moe::arch::scalar{}, 2, 2.f, y.data(), 3);  // row 2 is token 1 at expert 1
    CHECK(y == std::vector<float>{16, 31, 38});
  }
  TEST_CASE("a large mix decides for one side without NaN") {
    moe::constant_expert expert;
    std::vector<float> v{8}, mix{1000, -1000}, x{1, -1}, share(4), y(1);
    std::vector<idx> owner(2);
    const idx offsets[] = {0, 2};
    moe::nothing context;
    moe::constant_expert::output ys{{}, {}, {share.data(), 2, 2}, {owner.data(), 2, 1}};
    expert.forward(testing::on<backend>({.tokens = 2, .d = 1, .experts = 1}), {{v.data(), 1, 1}, {mix.data(), 2, 1}},
                   {x.data(), 2, 1}, {.offsets = offsets}, ys, context);
    CHECK(share == std::vector<float>{1, 0, 0, 1});
  }
  TEST_CASE("copy hands its gradient to x and <dy, x> to the weight, zero hands on nothing") {
    const small_plan p;
    std::vector<float> x{1, 2, 3, 4, 5, 6}, dy{1, 1, 1, -1, 2, 0}, dx{100, 0, 0, 0, 0, 0}, dweight{0, 10, 0};
    const moe::gathered<float> dys{{dy.data(), 3, 2}, p.token, p.weight};
    moe::nothing none;
    const auto on = testing::on<backend>({.tokens = 3, .d = 2, .experts = 2});
    moe::zero_expert{}.backward(on, none, {x.data(), 3, 2}, p.rows(), none, dys, {dx.data(), 3, 2}, none, dweight);
    CHECK(dx == std::vector<float>{100, 0, 0, 0, 0, 0});
    CHECK(dweight == std::vector<float>{0, 10, 0});
    moe::copy_expert{}.backward(on, none, {x.data(), 3, 2}, p.rows(), none, dys, {dx.data(), 3, 2}, none, dweight);
    CHECK(dx == std::vector<float>{100.5f, 0.5f, 2, -2, 0.5f, 0});
    CHECK(dweight == std::vector<float>{3, 20, -1});                                             // of rows: tokens 0, 2, 1
    moe::copy_expert{}.backward(on, none, {x.data(), 3, 2}, p.rows(), none, dys, {}, none, {});  // frozen: nothing to write
    CHECK(dweight == std::vector<float>{3, 20, -1});
  }
  TEST_CASE("copy and zero experts have no memory: neither context nor scratch knows d") {
    const auto bytes = [](auto expert, dim d) {
      const layer_of<decltype(expert)> net({.d = d, .experts = 4});
      CHECK(net.context_bytes(100) == net.inference_context_bytes(100));
      return net.scratch_bytes(100);
    };
    CHECK(bytes(moe::copy_expert{}, 1) == bytes(moe::copy_expert{}, 4096));
    CHECK(bytes(moe::zero_expert{}, 1) == bytes(moe::zero_expert{}, 4096));
    CHECK(bytes(moe::constant_expert{}, 1) == bytes(moe::constant_expert{}, 4096));
    const layer_of<moe::ffn_expert> ffn({.d = 64, .f = 32, .experts = 4});
    const layer_of<mixed> beside({.d = 64, .f = 32, .experts = 4},
                                 mixed{{.count = 1}, {.count = 1}, {.count = 1}, {.count = 1}});
    CHECK(beside.context_bytes(100) == ffn.context_bytes(100));
  }
  TEST_CASE("weights of the wrong shape are refused by name") {
    std::vector<float> v(24);
    const moe::constant_expert expert;
    CHECK_THROWS_WITH_AS(expert.check({{v.data(), 2, 3}, {v.data(), 2, 3}}, {.d = 3, .experts = 2}),
                         "constant_expert: mix is 2 x 3, expected 4 x 3 (E*2 x d)", moe::shape_error);
    CHECK_THROWS_WITH_AS(expert.check({{v.data(), 2, 2}, {v.data(), 4, 3}}, {.d = 3, .experts = 2}),
                         "constant_expert: v is 2 x 2, expected 2 x 3 (E x d)", moe::shape_error);
  }
}
