// SPDX-License-Identifier: Apache-2.0
// How often the threads of a layer wait for each other, and that steps which go on without a join give the bits of steps that
// follow one another.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/backend/host_packed.hpp"
#include "moe/backend/host_parts.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/combine/residual.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/expert/packed_ffn.hpp"
#include "moe/gate/linear.hpp"
#include "moe/router/capacity.hpp"
#include "moe/router/presets.hpp"
#include "moe/router/top_k.hpp"
#include "support/any_weights.hpp"
#include "support/executors.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::matrix_view;
using counted = moe::scalar<testing::counting>;
using shuffled = moe::scalar<testing::shuffling>;

/// Parts of a layer that offer nothing but the members that every one has.
struct plain_gate : moe::linear_gate {
  template <class B>
  void forward(const moe::call<B>& on, const weights& w, const input& x, matrix_view<float> scores, context& ctx) const noexcept {
    moe::linear_gate::forward(on, w, x, scores, ctx);
  }
};
template <class X>
struct plain_expert : X {
  template <class B>
  void forward(const moe::call<B>& on, const typename X::weights& w, const typename X::input& x, const moe::bank_rows& rows,
               typename X::output ys, typename X::context& ctx) const noexcept {
    X::forward(on, w, x, rows, ys, ctx);
  }
};

template <class X, class Router, class Combine, class B>
using layer_of = moe::layer<moe::linear_gate, Router, X, Combine, B>;

/// The joins of forward, and in training of nothing else.
template <class X, class Router = moe::top_k<2>, class Combine = moe::weighted_sum>
dim joins_of(moe::shape s, dim tokens, bool training) {
  dim joins = 0;
  using layer = layer_of<X, Router, Combine, counted>;
  testing::model<layer> m(layer(s, counted(testing::counting{&joins})), tokens, s.d, 1, training);
  testing::fill_other_weights(m);
  joins = 0;
  m.forward();
  return joins;
}

/// y, and dx with the gradients where the layer can train, of a layer on an executor.
template <class L>
std::vector<float> results(const L& net, dim tokens) {
  testing::model<L> m(net, tokens, net.sizes().d, 3);
  testing::fill_other_weights(m);
  std::fill(m.y.begin(), m.y.end(), std::numeric_limits<float>::quiet_NaN());
  m.forward();
  CHECK((m.y.empty() || std::any_of(m.y.begin(), m.y.end(), [](float v) { return v != 0; })));
  std::vector<float> all = m.y;
  if constexpr (moe::TrainableExpert<typename L::expert_type, typename L::backend_type>) {
    m.backward();
    all.insert(all.end(), m.dx.begin(), m.dx.end());
    all.insert(all.end(), m.gradients().begin(), m.gradients().end());
  }
  return all;
}
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}
template <class X, class Router, class Combine>
void check_bits(moe::shape s, dim tokens) {
  CAPTURE(s.d);
  CAPTURE(tokens);
  using apart = moe::layer<plain_gate, Router, plain_expert<X>, Combine, moe::scalar<moe::serial>>;
  static_assert(!moe::detail::computes_by_part<plain_expert<X>, moe::scalar<>>);
  static_assert(!moe::detail::routes_by_part<plain_gate, Router, moe::scalar<>>);
  static_assert(moe::detail::computes_by_part<X, moe::scalar<>>);
  const std::vector<float> wanted = results(apart(s), tokens);
  CHECK(same_bits(results(layer_of<X, Router, Combine, moe::scalar<moe::serial>>(s), tokens), wanted));
  for (const std::uint64_t seed : {1u, 2u})
    CHECK(same_bits(results(layer_of<X, Router, Combine, shuffled>(s, shuffled(testing::shuffling{seed})), tokens), wanted));
}

using packed = moe::packed_ffn_expert<float>;
using packed_bytes = moe::packed_ffn_expert<std::int8_t>;

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE_TEMPLATE("forward joins its threads at most three times: gate with routing, up, down with combine", X,
                     moe::ffn_expert, moe::bf16_ffn_expert, packed, packed_bytes) {
    const moe::shape s{.d = 80, .f = 48, .experts = 8};
    for (const dim tokens : {1, 4, 16, 64, 512}) {
      CAPTURE(tokens);
      const dim joins = joins_of<X>(s, tokens, false);
      CHECK(joins <= 3);
      if (tokens >= 64) CHECK(joins >= 2);  // it is shared, after all
      CHECK(joins_of<X, moe::top_k<2, moe::score_rule<moe::softmax_score>>, moe::residual<>>(s, tokens, true) <= 3);
    }
  }
  TEST_CASE("so it does where keys are made in steps: with a bias of each expert, and in groups") {
    const moe::shape s{.d = 80, .f = 48, .experts = 16};
    for (const dim tokens : {1, 64, 512}) {
      CHECK(joins_of<moe::ffn_expert, moe::glm4_moe_router<4>>(s, tokens, true) <= 3);
      CHECK(joins_of<moe::ffn_expert, moe::deepseek_v3_router<4>>(s, tokens, false) <= 3);
    }
  }
  TEST_CASE("steps one after another join more often") {
    dim joins = 0;
    const moe::shape s{.d = 80, .f = 48, .experts = 8};
    using apart = moe::layer<plain_gate, moe::top_k<2>, plain_expert<moe::ffn_expert>, moe::weighted_sum, counted>;
    testing::model<apart> m(apart(s, counted(testing::counting{&joins})), 64, s.d, 1);
    m.forward();
    CHECK(joins > 3);
  }
  TEST_CASE_TEMPLATE("steps without a join give the bits of steps one after another, for any executor", X, moe::ffn_expert,
                     moe::bf16_ffn_expert, packed, packed_bytes) {
    for (const dim d : {1, 70, 333})
      for (const dim tokens : {0, 1, 20, 150}) {
        const moe::shape s{.d = d, .f = 20, .experts = 5};
        check_bits<X, moe::top_k<2>, moe::weighted_sum>(s, tokens);
      }
    check_bits<X, moe::top_k<1>, moe::weighted_sum>({.d = 600, .f = 24, .experts = 40}, 7);  // most experts have no rows
  }
  TEST_CASE_TEMPLATE("so do other routers and combines", X, moe::ffn_expert, packed_bytes) {
    for (const dim d : {1, 70})
      for (const dim tokens : {0, 1, 20, 150}) {
        const moe::shape s{.d = d, .f = 20, .experts = 5};
        check_bits<X, moe::top_k<2, moe::score_rule<moe::softmax_score>>, moe::residual<>>(s, tokens);
        check_bits<X, moe::capacity<moe::top_k<2>>, moe::weighted_sum>(s, tokens);  // drops
      }
    check_bits<X, moe::deepseek_v3_router<4>, moe::weighted_sum>({.d = 40, .f = 24, .experts = 16}, 75);
  }
  TEST_CASE("tokens without eligible experts get 0, and others close up, where scores come a run at a time") {
    const moe::shape s{.d = 6, .f = 5, .experts = 4};
    using layer = layer_of<moe::ffn_expert, moe::top_k<2>, moe::weighted_sum, shuffled>;
    testing::model<layer> m(layer(s, shuffled(testing::shuffling{5})), 40, s.d, 4);
    for (dim j = 0; j < s.d; ++j) m.x[static_cast<std::size_t>(7 * s.d + j)] = std::numeric_limits<float>::quiet_NaN();
    m.forward();
    moe::check(m.ctx.plan);
    CHECK(m.ctx.plan.rows() == 78);
    CHECK(m.ctx.plan.token_offsets[8] == m.ctx.plan.token_offsets[7]);
    for (dim j = 0; j < s.d; ++j) CHECK(m.y[static_cast<std::size_t>(7 * s.d + j)] == 0);
    for (dim t = 0; t < 40; ++t)
      if (t != 7) CHECK(m.y[static_cast<std::size_t>(t * s.d)] != 0);
  }
}

TEST_SUITE("backend/host_parts") {
  TEST_CASE("stripes hold every piece of every chunk once, and become narrower towards the end") {
    for (const dim chunks : {1, 30})
      for (const dim rows : {1, 40, 5000, 2000000})
        for (const dim pieces : {1, 7, 224, 1000})
          for (const dim columns : {16, 64, 512}) {
            const moe::detail::column_stripes stripes(chunks, rows, pieces, columns);
            REQUIRE(stripes.units() == chunks * pieces);
            std::vector<int> seen(static_cast<std::size_t>(chunks * pieces));
            std::vector<dim> units;
            bool inside = true, narrower = true, agree = true;
            for (dim i = 0; i < stripes.units(); ++i) {
              const auto [stripe, chunk, piece] = stripes[i];
              ++seen[static_cast<std::size_t>(chunk * pieces + piece)];
              units.resize(static_cast<std::size_t>(stripe) + 1);
              ++units.back();
              inside &= piece >= stripes.first(stripe) && piece < stripes.first(stripe) + stripes.pieces(stripe);
            }
            REQUIRE(static_cast<dim>(units.size()) <= moe::detail::countdown::most);
            for (std::size_t i = 0; i < units.size(); ++i) {
              agree &= units[i] == stripes.units(static_cast<dim>(i));
              narrower &= i == 0 || units[i] <= units[i - 1];
            }
            CHECK(seen == std::vector<int>(seen.size(), 1));
            CHECK(inside);
            CHECK(agree);
            CHECK(narrower);
          }
  }
  TEST_CASE("a step that units of another need is done once, by those who come to it, before any of them goes on") {
    constexpr dim n = 1000, grain = 16;
    std::vector<int> seen(n);
    moe::detail::helpers all;
    const moe::thread_pool pool(4);
    std::atomic<int> early{0};
    pool.for_each(64, 1, [&](dim, dim) {
      moe::detail::helping{&all}.for_each(n, grain, [&](dim first, dim last) {
        for (; first < last; ++first) ++seen[static_cast<std::size_t>(first)];
      });
      early += std::count(seen.begin(), seen.end(), 1) != n;
    });
    CHECK(early == 0);
    CHECK(seen == std::vector<int>(n, 1));
    moe::detail::helpers none;
    moe::detail::helping{&none}.for_each(0, grain, [&](dim, dim) { FAIL("there is nothing to do"); });
  }
  TEST_CASE("of all units of a part the last one is told so, once") {
    moe::detail::countdown left;
    int told = 0;
    for (int i = 0; i < 5; ++i) told += left.is_last(3, 5);
    CHECK(told == 1);
    CHECK(left.is_last(4, 1));
  }
}
