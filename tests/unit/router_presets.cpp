// SPDX-License-Identifier: Apache-2.0
// The router of every model family against its formulas in double: choices, weights, and the gradient of the logits by
// finite differences of the reference.
#include <doctest/doctest.h>

#include "moe/backend/scalar.hpp"
#include "moe/router/presets.hpp"
#include "support/routing.hpp"

namespace {

using moe::dim;
using reference::choices;
using reference::matrix;
using reference::vec;

constexpr dim T = 12, E = 32;

/// One selection bias for the library's router, wherever it stands among the decorators, and for the reference.
vec some_bias(std::uint64_t seed) {
  const auto v = testing::normals(E, seed, 0.1f);
  return {v.begin(), v.end()};
}
template <class W>
void set_bias(W& w, const vec& b) {
  if constexpr (requires { w.bias; })
    for (dim e = 0; e < E; ++e) w.bias(e, 0) = static_cast<float>(b[static_cast<std::size_t>(e)]);
}

/// `rule(z, b)` is the reference for one token.
template <class R, class Rule>
void expect_family(R router, Rule rule) {
  static_assert(moe::TrainableRouter<R, testing::backend_of_routing>);
  static_assert(moe::ReplayableRouter<R, testing::backend_of_routing>);
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    CAPTURE(seed);
    const vec b = some_bias(seed);
    testing::routing<R> m(router, T, E, testing::apart(T, E, seed));
    set_bias(m.w, b);
    const auto g = testing::normals(T * E, seed + 10);
    m.forward().backward(g);
    REQUIRE(moe::fault(m.plan) == nullptr);
    matrix z(T, E, m.scores);
    const auto reference_routing = [&] { return reference::route(z, [&](const vec& row) { return rule(row, b); }); };
    testing::expect_choices(m.choices(), reference_routing());
    const matrix coefficient(T, E, g);
    const vec want = reference::gradient(z.values, [&] { return reference::loss(reference_routing(), coefficient); });
    CHECK(reference::error(m.dscores, want) < 1e-5);
  }
}

}  // namespace

TEST_SUITE("router/presets") {
  TEST_CASE("Mixtral, Qwen3-MoE: softmax, top-k, renormalised") {
    expect_family(moe::mixtral_router<2>{}, [](const vec& z, const vec&) { return reference::mixtral(z, 2); });
    expect_family(moe::qwen3_moe_router<8>{}, [](const vec& z, const vec&) { return reference::mixtral(z, 8); });
  }
  TEST_CASE("OLMoE, Jamba, Qwen2-MoE, DeepSeek-V2-Lite: softmax, top-k, not renormalised") {
    expect_family(moe::olmoe_router<8>{}, [](const vec& z, const vec&) { return reference::olmoe(z, 8); });
    expect_family(moe::jamba_router<>{}, [](const vec& z, const vec&) { return reference::olmoe(z, 2); });
    expect_family(moe::qwen2_moe_router<>{}, [](const vec& z, const vec&) { return reference::olmoe(z, 4); });
    expect_family(moe::deepseek_v2_lite_router<>{}, [](const vec& z, const vec&) { return reference::olmoe(z, 6); });
  }
  TEST_CASE("DBRX: divided by a p-norm") {
    expect_family(moe::dbrx_router<4, 1>{}, [](const vec& z, const vec&) { return reference::dbrx(z, 4, 1); });
    expect_family(moe::dbrx_router<4, 2>{}, [](const vec& z, const vec&) { return reference::dbrx(z, 4, 2); });
    expect_family(moe::dbrx_router<3, 3>{}, [](const vec& z, const vec&) { return reference::dbrx(z, 3, 3); });
  }
  TEST_CASE("Granite, gpt-oss: softmax over the chosen logits") {
    expect_family(moe::granite_router<>{}, [](const vec& z, const vec&) { return reference::granite(z, 8); });
    expect_family(moe::gpt_oss_router<>{}, [](const vec& z, const vec&) { return reference::granite(z, 4); });
  }
  TEST_CASE("Llama-4: the sigmoid of the chosen logit") {
    expect_family(moe::llama4_router<>{}, [](const vec& z, const vec&) { return reference::llama4(z, 1); });
    expect_family(moe::llama4_router<3>{}, [](const vec& z, const vec&) { return reference::llama4(z, 3); });
  }
  TEST_CASE("DeepSeek-V2: the best groups by their largest probability, scaled by 16") {
    expect_family(moe::deepseek_v2_router<>{},
                  [](const vec& z, const vec&) { return reference::deepseek_v2(z, 6, 8, 3, 16); });
  }
  TEST_CASE("DeepSeek-V3: the best groups by their two largest biased sigmoids, renormalised, scaled by 2.5") {
    expect_family(moe::deepseek_v3_router<>{},
                  [](const vec& z, const vec& b) { return reference::deepseek_v3(z, b, 8, 8, 4, 2.5); });
    moe::deepseek_v3_router<6> other;
    other.groups = 4;
    other.kept = 2;
    other.inner.inner.rule.scale = 1.5f;
    expect_family(other, [](const vec& z, const vec& b) { return reference::deepseek_v3(z, b, 6, 4, 2, 1.5); });
  }
  TEST_CASE("DeepSeek-V3 with masked keys of 0: the Hugging Face port") {
    moe::deepseek_v3_router<8> port;
    port.mask = moe::group_mask::zero;
    expect_family(port, [](const vec& z, const vec& b) { return reference::deepseek_v3(z, b, 8, 8, 4, 2.5, 0); });
  }
  TEST_CASE("Kimi-K2, GLM-4.5, dots.llm1: the same without groups, each with its scale") {
    expect_family(moe::kimi_k2_router<>{},
                  [](const vec& z, const vec& b) { return reference::deepseek_v3(z, b, 8, 1, 1, 2.827); });
    expect_family(moe::glm4_moe_router<>{},
                  [](const vec& z, const vec& b) { return reference::deepseek_v3(z, b, 8, 1, 1, 1); });
    expect_family(moe::dots1_router<>{},
                  [](const vec& z, const vec& b) { return reference::deepseek_v3(z, b, 6, 1, 1, 2.5); });
  }
  TEST_CASE("DeepSeek-V4: the square root of softplus") {
    expect_family(moe::deepseek_v4_router<6>{},
                  [](const vec& z, const vec& b) { return reference::deepseek_v4(z, b, 6, 1); });
  }
  TEST_CASE("ERNIE-4.5: a bias after the softmax, the sum floored") {
    expect_family(moe::ernie45_router<>{}, [](const vec& z, const vec& b) { return reference::ernie45(z, b, 6); });
  }
  TEST_CASE("MiniMax-M2: the plain sum; LFM2: the sum plus 1e-6") {
    expect_family(moe::minimax_m2_router<>{}, [](const vec& z, const vec& b) { return reference::minimax_m2(z, b, 8); });
    expect_family(moe::lfm2_moe_router<>{}, [](const vec& z, const vec& b) { return reference::lfm2_moe(z, b, 4); });
  }
  TEST_CASE("LongCat-Flash: a bias after the softmax, not renormalised, scaled by 6") {
    expect_family(moe::longcat_router<>{}, [](const vec& z, const vec& b) { return reference::longcat(z, b, 12, 6); });
  }
  TEST_CASE("Switch: one expert, capacity in the order of the sequence, a dropped token has no row") {
    for (const double factor : {0.5, 1.0, 1.25}) {
      CAPTURE(factor);
      const dim tokens = 40, experts = 4;
      moe::switch_router router;
      router.limit.factor = factor;
      testing::routing<moe::switch_router> m(router, tokens, experts, testing::apart(tokens, experts, 5));
      const auto g = testing::normals(tokens * experts, 6);
      m.forward().backward(g);
      const dim room = static_cast<dim>(std::ceil(factor * tokens / experts));
      matrix z(tokens, experts, m.scores);
      const matrix coefficient(tokens, experts, g);
      testing::expect_choices(m.choices(), reference::switch_transformer(z, room));
      const vec want = reference::gradient(
          z.values, [&] { return reference::loss(reference::switch_transformer(z, room), coefficient); });
      CHECK(reference::error(m.dscores, want) < 1e-5);
      CHECK(moe::dropped(m.plan) == tokens - m.plan.rows());
    }
  }
}
