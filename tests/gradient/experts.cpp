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
