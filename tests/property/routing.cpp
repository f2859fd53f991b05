// SPDX-License-Identifier: Apache-2.0
// What holds of every router whatever its scores: a sound plan, the same for any executor, and tokens that do not look at
// each other where the router does not say that they do.
#include "support/routing.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/loss/importance.hpp"
#include "moe/loss/load_balance.hpp"
#include "moe/loss/z_loss.hpp"
#include "moe/router/expert_choice.hpp"
#include "moe/router/presets.hpp"
#include "moe/router/renormalised.hpp"
#include "moe/router/threshold.hpp"
#include "moe/router/top_p.hpp"
#include "support/executors.hpp"

namespace {

using moe::dim;
using moe::idx;

using shuffled = moe::scalar<testing::shuffling>;
using pooled = moe::scalar<moe::pool_executor>;

/// Calls f(router) for routers of every kind. All take E = 8 or more, a multiple of 4.
template <class F>
void for_each_router(F f) {
  f(moe::top_k<2>{});
  f(moe::top_k<8, moe::score_rule<moe::softmax_score>>{});
  f(moe::deepseek_v3_router<2>{.groups = 4, .kept = 2});
  f(moe::ernie45_router<3>{});
  f(moe::top_p<4>{.p = 0.6f});
  f(moe::grouped<moe::top_p<2, moe::softmax_over_kept>, moe::largest_key>{.groups = 2, .kept = 1});
  f(moe::threshold<>{});
  f(moe::threshold<moe::score_rule<moe::sqrt_softplus_score, moe::sum_norm>>{.tau = 0.9f, .at_least_one = true});
  f(moe::expert_choice<2>{.factor = 1.2});
  f(moe::capacity<moe::top_k<2>>{.limit = {.factor = 0.7}});
  f(moe::capacity<moe::dots1_router<3>>{.limit = {.factor = 0.5}, .order = moe::drop_order::score});
  f(moe::capacity<moe::threshold<>, moe::given_capacity>{.limit = {.rows = 3}, .order = moe::drop_order::tokens});
  f(moe::renormalised<moe::capacity<moe::top_k<3>>>{.inner = {.limit = {.factor = 0.6}}});
  f(moe::with_loss<moe::with_loss<moe::top_k<2>, moe::load_balance_selected>, moe::z_loss>{});
  f(moe::with_loss<moe::capacity<moe::top_k<2>>, moe::switch_load_balance>{{.limit = {.factor = 0.7}}, {.group = 7}});
  f(moe::with_loss<moe::longcat_router<4>, moe::importance>{});
}

struct some_scores {
  dim T, E;
  std::vector<float> z;
};
/// A shape and scores that follow from the seed; every third seed has ties, every fourth what is not eligible.
some_scores some(std::uint64_t seed) {
  const moe::rng random(seed);
  some_scores s{static_cast<dim>(random(0) % 200), 8 + 4 * static_cast<dim>(random(1) % 5), {}};
  s.z = testing::normals(s.T * s.E, seed + 1, 2);
  for (std::size_t i = 0; i < s.z.size(); ++i) {
    if (seed % 3 == 0) s.z[i] = std::round(s.z[i]);
    if (seed % 4 == 0 && random(i + 2) % 4 == 0) s.z[i] = -std::numeric_limits<float>::infinity();
    if (seed % 4 == 0 && random(i + 2) % 16 == 1) s.z[i] = std::numeric_limits<float>::quiet_NaN();
  }
  return s;
}

struct result {
  testing::assignments plan;
  std::vector<float> weight, dscores;
  std::vector<float> losses;
  friend bool operator==(const result&, const result&) = default;
};
template <class Context>
void collect_losses(const Context& ctx, std::vector<float>& to) {
  if constexpr (requires { ctx.loss; }) to.push_back(ctx.loss.value());
  if constexpr (requires { ctx.inner; }) collect_losses(ctx.inner, to);
}
template <class R, class B>
result run(const R& router, const some_scores& s, const B& backend, std::uint64_t seed) {
  testing::routing<R, B> m(router, s.T, s.E, s.z, true, backend);
  m.forward().backward(testing::normals(s.T * s.E, seed));
  result r{testing::assignments(m.plan), {m.plan.weight.begin(), m.plan.weight.begin() + m.plan.rows()}, m.dscores, {}};
  collect_losses(m.ctx, r.losses);
  return r;
}

/// True where no token's routing depends on the others.
template <class R>
inline constexpr bool by_token = true;
template <int K, class Rule>
inline constexpr bool by_token<moe::expert_choice<K, Rule>> = false;
template <class R, class L>
inline constexpr bool by_token<moe::capacity<R, L>> = false;
template <class R>
inline constexpr bool by_token<moe::renormalised<R>> = false;
template <class R, class L>
inline constexpr bool by_token<moe::with_loss<R, L>> = false;

}  // namespace

TEST_SUITE("router") {
  TEST_CASE("every plan is sound, never takes what is not eligible, and never exceeds its bound") {
    for_each_router([](auto router) {
      for (std::uint64_t seed = 1; seed <= 24; ++seed) {
        CAPTURE(seed);
        const some_scores s = some(seed);
        testing::routing<decltype(router)> m(router, s.T, s.E, s.z);
        m.forward();
        const char* fault = moe::fault(m.plan);
        INFO("the plan: " << (fault ? fault : "sound"));
        REQUIRE(fault == nullptr);
        CHECK(m.plan.token_offsets.back() <= router.max_rows(m.sizes));
        CHECK(m.plan.rows() + moe::dropped(m.plan) == m.plan.token_offsets.back());
        for (dim t = 0; t < s.T; ++t) {
          auto chosen = m.experts_of(t);
          for (dim& e : chosen) e = e < 0 ? -1 - e : e;
          for (const dim e : chosen) REQUIRE(moe::eligible(s.z[static_cast<std::size_t>(t * s.E + e)]));
          std::sort(chosen.begin(), chosen.end());
          REQUIRE(std::adjacent_find(chosen.begin(), chosen.end()) == chosen.end());
          REQUIRE(static_cast<dim>(chosen.size()) <= router.choices(m.sizes));
          for (const float w : m.weights_of(t)) REQUIRE((w >= 0 && std::isfinite(w)));
        }
      }
    });
  }
  TEST_CASE(
      "plans, weights, gradients and losses have the same bits for any executor, cut of the work and number of threads") {
    const moe::thread_pool two(2), three(3);
    for_each_router([&](auto router) {
      for (std::uint64_t seed = 1; seed <= 8; ++seed) {
        if (seed % 4 == 0) continue;  // a NaN differs from itself
        CAPTURE(seed);
        const some_scores s = some(seed);
        const result alone = run(router, s, moe::scalar<moe::serial>{}, seed);
        CHECK(run(router, s, moe::scalar<moe::serial>{}, seed) == alone);
        CHECK(run(router, s, shuffled(testing::shuffling{seed}), seed) == alone);
        CHECK(run(router, s, pooled(moe::pool_executor(two)), seed) == alone);
        CHECK(run(router, s, pooled(moe::pool_executor(three)), seed) == alone);
      }
    });
  }
  TEST_CASE("a permutation of tokens permutes the choices and weights, where tokens do not look at each other") {
    for_each_router([](auto router) {
      using R = decltype(router);
      if constexpr (by_token<R>) {
        for (std::uint64_t seed = 1; seed <= 12; ++seed) {
          CAPTURE(seed);
          const some_scores s = some(seed);
          std::vector<float> reversed;
          for (dim t = s.T; t-- > 0;) reversed.insert(reversed.end(), s.z.begin() + t * s.E, s.z.begin() + (t + 1) * s.E);
          testing::routing<R> m(router, s.T, s.E, s.z), r(router, s.T, s.E, reversed);
          m.forward();
          r.forward();
          for (dim t = 0; t < s.T; ++t) {
            REQUIRE(m.experts_of(t) == r.experts_of(s.T - 1 - t));
            REQUIRE(m.weights_of(t) == r.weights_of(s.T - 1 - t));
          }
        }
      }
    });
  }
  TEST_CASE("rules that divide by the sum give weights that sum to the scale") {
    for (std::uint64_t seed = 1; seed <= 12; ++seed) {
      const some_scores s = some(seed);
      const auto check = [&](auto router, double scale) {
        testing::routing<decltype(router)> m(router, s.T, s.E, s.z);
        m.forward();
        for (dim t = 0; t < s.T; ++t) {
          const auto w = m.weights_of(t);
          if (!w.empty()) REQUIRE(std::accumulate(w.begin(), w.end(), 0.0) == doctest::Approx(scale).epsilon(1e-6));
        }
      };
      check(moe::top_k<3>{}, 1);
      check(moe::deepseek_v3_router<2>{.groups = 4, .kept = 2}, 2.5);
      check(moe::ernie45_router<3>{}, 1);
      check(moe::minimax_m2_router<4>{}, 1);
      check(moe::renormalised<moe::capacity<moe::top_k<3>>>{.inner = {.limit = {.factor = 0.6}}}, 1);
    }
  }
  TEST_CASE(
      "capacity keeps exactly the best of what was chosen: nothing dropped would have fitted, and none kept is worse") {
    for (std::uint64_t seed = 1; seed <= 12; ++seed) {
      CAPTURE(seed);
      const some_scores s = some(seed);
      for (const auto order : {moe::drop_order::choices, moe::drop_order::tokens, moe::drop_order::score}) {
        using router = moe::capacity<moe::top_k<2>>;
        testing::routing<router> m(router{.limit = {.factor = 0.7}, .order = order}, s.T, s.E, s.z);
        m.forward();
        const dim room = m.router.limit(m.sizes, 2);
        /// (what comes first, token), smaller is better
        std::vector<std::vector<std::pair<double, dim>>> kept(static_cast<std::size_t>(s.E)), lost(kept.size());
        for (dim t = 0; t < s.T; ++t) {
          const auto chosen = m.experts_of(t);
          const reference::vec p = reference::softmax({s.z.begin() + t * s.E, s.z.begin() + (t + 1) * s.E});
          for (std::size_t j = 0; j < chosen.size(); ++j) {
            const auto e = static_cast<std::size_t>(chosen[j] < 0 ? -1 - chosen[j] : chosen[j]);
            const double rank = order == moe::drop_order::choices ? static_cast<double>(j)
                                : order == moe::drop_order::score ? -p[e]
                                                                  : 0;
            (chosen[j] < 0 ? lost : kept)[e].emplace_back(rank, t);
          }
        }
        for (std::size_t e = 0; e < kept.size(); ++e) {
          REQUIRE(static_cast<dim>(kept[e].size()) <= room);
          if (lost[e].empty()) continue;
          REQUIRE(static_cast<dim>(kept[e].size()) == room);
          const auto worst = *std::max_element(kept[e].begin(), kept[e].end()),
                     best = *std::min_element(lost[e].begin(), lost[e].end());
          REQUIRE((worst < best || worst.first - best.first < 1e-7));
        }
      }
    }
  }
}
