// SPDX-License-Identifier: Apache-2.0
#include "layers/any_top_k.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "moe/core/arena.hpp"
#include "moe/core/rng.hpp"
#include "moe/gate/linear.hpp"

namespace {

using moe::dim;
using moe::idx;
using moe::matrix_view;
using backend = bench::any_top_k::backend;

// A layer goes from gate to router without a join.
static_assert(moe::detail::routes_by_part<moe::biased_linear_gate, bench::any_top_k, backend>);
static_assert(moe::TrainableRouter<bench::any_top_k, backend>);

enum class scores_come { at_once, by_runs };

struct routed {
  std::vector<idx> offsets, token, position, token_offsets;
  std::vector<float> weight, dscores;
  bool operator==(const routed&) const = default;
};
/// A plan and its gradient from random scores, where the first token has two experts to choose from.
template <class Router>
routed route(const Router& router, moe::shape s, scores_come how) {
  const auto row = [&](dim t) { return static_cast<std::size_t>(t * s.experts); };
  std::vector<float> scores(row(s.tokens)), dscores(scores.size());
  for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = moe::rng(1).normal(i);
  for (std::size_t e = 2; e < row(1); ++e) scores[e] = -std::numeric_limits<float>::infinity();
  const matrix_view<const float> z(scores.data(), s.tokens, s.experts);

  moe::buffer memory(1 << 20);
  moe::arena mem(memory.bytes());
  moe::routing_plan plan = moe::make_plan(s, router.max_rows(s), mem);
  moe::score_context ctx = router.make_context(s, mem);
  const backend cpu;
  const moe::call<backend> on{cpu, mem, s};
  const auto runs = [&](const moe::then_tokens& then) {
    then(1, s.tokens - 1);
    then(0, 1);
  };
  if (how == scores_come::by_runs)
    router.forward(on, {}, z, plan, ctx, runs);
  else
    router.forward(on, {}, z, plan, ctx);
  moe::nothing none;
  router.backward(on, none, plan, ctx, plan.weight, matrix_view<float>(dscores.data(), s.tokens, s.experts), none);
  const auto rows = [&](auto v) { return std::vector(v.begin(), v.begin() + plan.rows()); };
  const auto whole = [](auto v) { return std::vector(v.begin(), v.end()); };
  return {whole(plan.offsets), rows(plan.token), rows(plan.position), whole(plan.token_offsets), rows(plan.weight), dscores};
}

}  // namespace

TEST_SUITE("benchmarks/layers/any_top_k") {
  TEST_CASE("a k of the running program gives the plan and the gradient of top_k<k>, bit for bit") {
    const moe::shape s{.tokens = 70, .d = 1, .experts = 40};
    for (const scores_come how : {scores_come::at_once, scores_come::by_runs}) {
      CHECK(route(bench::any_top_k{1}, s, how) == route(moe::top_k<1>{}, s, how));
      CHECK(route(bench::any_top_k{5}, s, how) == route(moe::top_k<5>{}, s, how));
      CHECK(route(bench::any_top_k{32}, s, how) == route(moe::top_k<32>{}, s, how));
    }
  }
  TEST_CASE("a k that cannot be is named") {
    const auto check = [](int k, dim experts) { bench::any_top_k{k}.check({.d = 8, .experts = experts}); };
    CHECK_THROWS_WITH_AS(check(0, 64), "any_top_k: k is 0, expected 1 to 32", moe::shape_error);
    CHECK_THROWS_WITH_AS(check(33, 64), "any_top_k: k is 33, expected 1 to 32", moe::shape_error);
    CHECK_THROWS_WITH_AS(check(5, 4), "any_top_k: k is 5, expected at most 4 (E)", moe::shape_error);
    CHECK_NOTHROW(check(4, 4));
  }
}
