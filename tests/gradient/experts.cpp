// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using backend = moe::scalar<>;
template <class X, int K = 2>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<K>, X, moe::weighted_sum, backend>;

template <class X>
void check_gradients(const X& expert, moe::shape s, std::uint64_t seed) {
  static_assert(moe::TrainableExpert<X, backend>);
  const auto g = testing::gradcheck(layer_of<X>(s, expert), s.tokens, s.d, seed);
  INFO("worst in " << g.where << ", skipped " << g.skipped << " of " << g.probed);
  CHECK(g.worst < 1e-2);
  CHECK(g.skipped * 4 < g.probed);
  CHECK(g.probed > s.tokens * s.d);
}
constexpr moe::shape small{.tokens = 12, .d = 8, .f = 12, .experts = 4};

}  // namespace

TEST_SUITE("expert/ffn") {
  TEST_CASE("gradients of every form match finite differences") {
    using namespace moe;
    check_gradients(basic_ffn_expert<plain<silu>>{}, small, 1);
    check_gradients(basic_ffn_expert<plain<gelu>>{}, small, 2);
    check_gradients(basic_ffn_expert<plain<gelu_tanh>>{}, small, 3);
    check_gradients(basic_ffn_expert<plain<relu_squared>>{}, small, 4);
    check_gradients(basic_ffn_expert<plain<identity>>{}, small, 5);
    check_gradients(basic_ffn_expert<glu<gelu_tanh>>{}, small, 6);
    check_gradients(basic_ffn_expert<clamped<glu<silu>>>{{.form = {}, .limit = 0.7f}}, small, 7);
  }
  TEST_CASE("gradients of every layout and of biases match finite differences") {
    using namespace moe;
    check_gradients(basic_ffn_expert<glu<silu>, chunked>{}, small, 8);
    check_gradients(basic_ffn_expert<glu<silu>, interleaved>{}, small, 9);
    check_gradients(basic_ffn_expert<plain<silu>, separate, true>{}, small, 10);
    check_gradients(basic_ffn_expert<glu<silu>, separate, true>{}, small, 11);
    check_gradients(basic_ffn_expert<glu<gelu>, chunked, true>{}, small, 12);
    check_gradients(gpt_oss_expert{}, small, 13);
  }
}

TEST_SUITE("expert/set") {
  TEST_CASE("gradients reach every bank of a mixed set, whatever it stores") {
    using mixed = moe::expert_set<moe::ffn_expert, moe::basic_ffn_expert<moe::plain<moe::gelu>>, moe::constant_expert,
                                  moe::copy_expert, moe::zero_expert>;
    const mixed set{{.count = 2, .f = 6}, {.count = 1, .f = 10}, {.count = 2}, {.count = 1}, {.count = 1}};
    check_gradients(set, {.tokens = 24, .d = 8, .experts = 7}, 20);
  }
}

TEST_SUITE("expert/weigh_input") {
  TEST_CASE("gradients of experts that weigh their input match finite differences") {
    using weighed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::weigh_input<moe::basic_ffn_expert<moe::glu<moe::silu>, moe::chunked, true>>,
                               moe::unweighted_sum, backend>;
    const auto g = testing::gradcheck(weighed(small), small.tokens, small.d, 30);
    INFO("worst in " << g.where << ", skipped " << g.skipped << " of " << g.probed);
    CHECK(g.worst < 1e-2);
    CHECK(g.skipped * 4 < g.probed);
  }
  TEST_CASE("a linear expert gives the same whether its input or its output is weighed") {
    using linear = moe::basic_ffn_expert<moe::plain<moe::identity>>;
    testing::model<layer_of<linear>> out(layer_of<linear>(small), small.tokens, small.d, 31);
    using weighed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::weigh_input<linear>, moe::unweighted_sum, backend>;
    testing::model<weighed> in(weighed(small), small.tokens, small.d, 31);
    out.forward();
    in.forward();
    for (std::size_t i = 0; i < in.y.size(); ++i) CHECK(in.y[i] == doctest::Approx(out.y[i]).epsilon(1e-5));
  }
}

TEST_SUITE("combine/residual") {
  TEST_CASE("x passes around the experts, forward and backward") {
    using around = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::residual<>, backend>;
    const auto g = testing::gradcheck(around(small), small.tokens, small.d, 32);
    INFO("worst in " << g.where);
    CHECK(g.worst < 1e-2);
    testing::model<around> a(around(small), small.tokens, small.d, 33);
    testing::model<layer_of<moe::ffn_expert>> b(layer_of<moe::ffn_expert>(small), small.tokens, small.d, 33);
    a.forward();
    b.forward();
    for (std::size_t i = 0; i < a.y.size(); ++i) CHECK(a.y[i] == a.x[i] + b.y[i]);
  }
}

TEST_SUITE("sum") {
  using routed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, backend>;

  // Central differences over x and every weight of anything with a layer's public functions.
  template <class L>
  double worst_gradient(const L& net, moe::dim T, moe::dim d) {
    moe::buffer params(net.weight_bytes()), grads(net.weight_bytes()), work(net.context_bytes(T) + net.scratch_bytes(T));
    moe::arena p(params.bytes()), g(grads.bytes()), mem(work.bytes());
    const auto w = net.make_weights(p);
    auto dw = net.make_gradients(g);
    auto ctx = net.make_context(T, mem);
    auto x = testing::normals(T * d, 1);
    const auto dy = testing::normals(T * d, 2);
    std::vector<float> y(x.size()), dx(x.size());
    testing::randomise(net.catalogue(), params.as<float>(), 3);
    const auto view = [&](auto& v) { return moe::matrix_view(v.data(), T, d); };
    const auto loss = [&] {
      net.forward(w, view(x), view(y), ctx, mem);
      double s = 0;
      for (std::size_t i = 0; i < y.size(); ++i) s += double{y[i]} * dy[i];
      return s;
    };
    loss();
    net.backward(w, view(x), ctx, view(dy), view(dx), dw, mem);
    const std::vector<float> added(grads.as<float>().begin(), grads.as<float>().end());
    testing::spoil(net.gradient_catalogue(), grads.as<float>());
    net.backward(w, view(x), ctx, view(dy), {}, dw, mem, moe::gradient_mode::replace);
    CHECK(testing::same_bits(grads.as<float>(), added));
    double worst = 0;
    const auto probe = [&](float& v, float got) {
      const float kept = v, h = 0x1p-7f;
      v = kept + h;
      const double up = loss();
      v = kept - h;
      const double numeric = (up - loss()) / (2 * h);
      v = kept;
      worst = std::max(worst, std::fabs(numeric - got) / (0.1 + std::fabs(numeric)));
    };
    for (std::size_t i = 0; i < x.size(); ++i) probe(x[i], dx[i]);
    for (const moe::slot& s : net.catalogue())
      for (std::size_t i = s.offset / 4; i < (s.offset + s.bytes) / 4; i += 3) probe(params.as<float>()[i], grads.as<float>()[i]);
    return worst;
  }

  TEST_CASE("a dense layer, plain and gated, has the gradients of finite differences") {
    CHECK(worst_gradient(moe::dense<moe::ffn_expert, backend>({.d = 6, .f = 10}), 5, 6) < 1e-2);
    CHECK(worst_gradient(moe::gated_dense<moe::ffn_expert, backend>({.d = 6, .f = 10}), 5, 6) < 1e-2);
    CHECK(worst_gradient(moe::gated_dense<moe::copy_expert, backend>({.d = 6}), 5, 6) < 1e-2);
  }
  TEST_CASE("a shared expert adds itself to the routed ones") {
    const moe::sum net(routed({.d = 6, .f = 8, .experts = 3}), moe::gated_dense<moe::ffn_expert, backend>({.d = 6, .f = 10}));
    CHECK(worst_gradient(net, 5, 6) < 1e-2);
    std::vector<std::string> names;
    for (const auto& s : net.catalogue()) names.push_back(s.name);
    CHECK(names == std::vector<std::string>{"routed.gate.w", "routed.experts.up", "routed.experts.gate", "routed.experts.down",
                                            "shared.gate.w", "shared.experts.up", "shared.experts.gate", "shared.experts.down"});
  }
  TEST_CASE("a shared layer of another width is refused") {
    CHECK_THROWS_WITH_AS((moe::sum(routed({.d = 6, .f = 8, .experts = 3}), moe::dense<moe::ffn_expert, backend>({.d = 8, .f = 10}))),
                         "moe::sum: the shared layer has 8 columns, expected 6 (d)", moe::shape_error);
  }
}
