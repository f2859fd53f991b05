// SPDX-License-Identifier: Apache-2.0
#include "moe/router/token_rounding.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <set>

#include "moe/moe.hpp"
#include "support/routing.hpp"

namespace {

using moe::dim;
using moe::idx;
using moe::rounding;

std::size_t at(dim i) { return static_cast<std::size_t>(i); }

/// Who takes whom, and with what weight: SonicMoE's steps in double, from whole matrices.
struct published {
  std::vector<std::set<dim>> takes;                   ///< of each expert, its tokens
  std::vector<dim> load;                              ///< f_e
  std::vector<std::vector<double>> weight;            ///< [T][E]
  std::vector<std::set<dim>> chose;

  published(const std::vector<float>& z, dim T, dim E, int K, dim tile, rounding to) : takes(at(E)), load(at(E)), chose(at(E)) {
    std::vector<std::vector<double>> prefers(at(T), std::vector<double>(at(E)));
    weight = prefers;
    for (dim t = 0; t < T; ++t) {
      double total = 0;
      std::vector<double> s(at(E));
      for (dim e = 0; e < E; ++e) total += s[at(e)] = std::exp(double{z[at(t * E + e)]});
      for (double& v : s) v /= total;
      std::vector<dim> order(at(E));
      for (dim e = 0; e < E; ++e) order[at(e)] = e;
      std::stable_sort(order.begin(), order.end(), [&](dim a, dim b) { return s[at(a)] > s[at(b)]; });
      double kept = 0;
      for (int j = 0; j < K; ++j) kept += s[at(order[at(j)])];
      for (int j = 0; j < K; ++j) {
        s[at(order[at(j)])] /= kept;
        chose[at(order[at(j)])].insert(t);
      }
      for (dim e = 0; e < E; ++e) {
        weight[at(t)][at(e)] = s[at(e)];
        prefers[at(t)][at(e)] = chose[at(e)].count(t) ? s[at(e)] : s[at(e)] - 1;
      }
    }
    for (dim e = 0; e < E; ++e) {
      load[at(e)] = static_cast<dim>(chose[at(e)].size());
      const double tiles = static_cast<double>(load[at(e)]) / static_cast<double>(tile);
      const double whole = to == rounding::up ? std::ceil(tiles) : to == rounding::down ? std::floor(tiles) : std::nearbyint(tiles);
      const dim rows = std::min(static_cast<dim>(whole) * tile, T / tile * tile);
      std::vector<dim> order(at(T));
      for (dim t = 0; t < T; ++t) order[at(t)] = t;
      std::stable_sort(order.begin(), order.end(), [&](dim a, dim b) { return prefers[at(a)][at(e)] > prefers[at(b)][at(e)]; });
      takes[at(e)] = {order.begin(), order.begin() + rows};
    }
  }
};

}  // namespace

TEST_SUITE("router/token_rounding") {
  TEST_CASE("plans and weights are those of the published steps, for every rounding and tile") {
    for (const rounding to : {rounding::nearest, rounding::up, rounding::down})
      for (const dim tile : {1, 4, 7, 16, 100})
        for (const dim T : {1, 24, 61}) {
          const dim E = 5;
          const auto z = testing::normals(T * E, static_cast<std::uint64_t>(T + tile));
          testing::routing m(moe::token_rounding<2>{.tile = tile, .to = to}, T, E, z);
          m.forward();
          const published wanted(z, T, E, 2, tile, to);
          CAPTURE(tile);
          CAPTURE(T);
          CHECK(moe::fault(m.plan) == nullptr);
          dim dropped = 0;
          for (dim e = 0; e < E; ++e) {
            std::set<dim> got;
            for (dim r = m.plan.offsets[at(e)]; r < m.plan.offsets[at(e + 1)]; ++r) {
              const dim t = m.plan.token[at(r)];
              got.insert(t);
              CHECK(m.plan.weight[at(r)] == doctest::Approx(wanted.weight[at(t)][at(e)]).epsilon(1e-5));
            }
            CHECK(got == wanted.takes[at(e)]);
            const dim rows = static_cast<dim>(got.size());
            CHECK(rows % tile == 0);
            const dim moved = std::abs(rows - wanted.load[at(e)]);
            CHECK((moved < tile || rows == T / tile * tile));
            CHECK((to != rounding::nearest || 2 * moved <= tile || rows == T / tile * tile));
            for (const dim t : wanted.chose[at(e)]) dropped += got.count(t) == 0;
          }
          CHECK(moe::dropped(m.plan) == dropped);
        }
  }
  TEST_CASE("a tile of one is the top k, bit for bit") {
    const auto z = testing::normals(40 * 6, 3);
    testing::routing rounded(moe::token_rounding<2>{.tile = 1}, 40, 6, z);
    testing::routing plain(moe::top_k<2, moe::score_rule<moe::softmax_score, moe::sum_norm>>{}, 40, 6, z);
    rounded.forward();
    plain.forward();
    CHECK(std::equal(plain.plan.offsets.begin(), plain.plan.offsets.end(), rounded.plan.offsets.begin()));
    for (dim r = 0; r < plain.plan.rows(); ++r) {
      CHECK(plain.plan.token[at(r)] == rounded.plan.token[at(r)]);
      CHECK(plain.plan.weight[at(r)] == rounded.plan.weight[at(r)]);
    }
  }
  TEST_CASE("fewer than half a tile is none, exactly half goes to the even number of tiles") {
    // Three tokens choose expert 0, one chooses expert 1: tiles of 2 give 4 and 0.
    testing::routing m(moe::token_rounding<1>{.tile = 2}, 4, 2, {3, 0, /**/ 2, 0, /**/ 1, 0, /**/ 0, 1});
    m.forward();
    CHECK(m.plan.offsets[1] == 4);
    CHECK(m.plan.offsets[2] == 4);
    CHECK(moe::dropped(m.plan) == 1);
  }
  TEST_CASE("rounding to the nearest keeps T K rows on average; up adds, and down drops, half a tile an expert") {
    constexpr dim T = 256, E = 8, tile = 16, trials = 64;
    const auto mean_rows = [&](rounding to) {
      dim rows = 0;
      for (dim i = 0; i < trials; ++i) {
        testing::routing m(moe::token_rounding<2>{.tile = tile, .to = to}, T, E,
                           testing::normals(T * E, static_cast<std::uint64_t>(i)));
        rows += m.forward().plan.rows();
      }
      return static_cast<double>(rows) / trials;
    };
    // An expert is off by up to half a tile, 16 / sqrt(12) in the root mean square: the mean of 64 trials of 8 by 1.6.
    const double half = (tile - 1) / 2. * E;
    CHECK(std::fabs(mean_rows(rounding::nearest) - 2 * T) < 5);
    CHECK(std::fabs(mean_rows(rounding::up) - (2 * T + half)) < 5);
    CHECK(std::fabs(mean_rows(rounding::down) - (2 * T - half)) < 5);
  }
  TEST_CASE("a token may end with no expert, and gets 0, or with more than K, and gets all of them") {
    constexpr dim T = 40, d = 6;
    for (const rounding to : {rounding::up, rounding::down}) {
      using router = moe::token_rounding<2>;
      using layer = moe::layer<moe::linear_gate, router, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
      testing::model<layer> m(layer({.tokens = T, .d = d, .f = 8, .experts = 5}, router{.tile = 16, .to = to}), T, d, 3);
      m.forward();
      m.backward();
      dim none = 0, many = 0;
      for (dim t = 0; t < T; ++t) {
        dim experts = 0;
        for (idx i = m.ctx.plan.token_offsets[at(t)]; i < m.ctx.plan.token_offsets[at(t + 1)]; ++i)
          experts += m.ctx.plan.position[at(i)] >= 0;
        none += experts == 0;
        many += experts > 2;
        for (dim j = 0; j < d; ++j) {
          CHECK((m.y[at(t * d + j)] == 0) == (experts == 0));
          CHECK(std::isfinite(m.dx[at(t * d + j)]));
        }
      }
      CHECK((to == rounding::up ? many : none) > 0);
    }
  }
  TEST_CASE("scores that are not numbers never select, nor fill a tile") {
    const float nan = std::numeric_limits<float>::quiet_NaN(), off = -std::numeric_limits<float>::infinity();
    testing::routing m(moe::token_rounding<1>{.tile = 4, .to = rounding::up}, 5, 2, {1, 0, /**/ 1, nan, /**/ nan, nan, /**/ 1, off, /**/ off, 1});
    m.forward();
    CHECK(moe::fault(m.plan) == nullptr);
    for (dim r = 0; r < m.plan.rows(); ++r) CHECK(m.plan.token[at(r)] != 2);
    CHECK(m.plan.rows() == 0);  // three tokens are eligible for expert 0: no whole tile of four
    testing::routing none(moe::token_rounding<1>{}, 0, 2, {});
    none.forward();
    CHECK(none.plan.rows() == 0);
  }
  TEST_CASE("gradients through a layer are those of the selected scores") {
    using router = moe::token_rounding<2>;
    using layer = moe::layer<moe::linear_gate, router, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
    const layer net({.tokens = 24, .d = 6, .f = 8, .experts = 4}, router{.tile = 4});
    const auto g = testing::gradcheck(net, 24, 6, 11);
    INFO("worst in " << g.where << ", skipped " << g.skipped);
    CHECK(g.worst < 1e-2);
    CHECK(g.skipped * 4 < g.probed);
  }
  TEST_CASE("a recorded plan is weighed anew") {
    const auto z = testing::normals(24 * 4, 5);
    testing::routing m(moe::token_rounding<2>{.tile = 4}, 24, 4, z), again(moe::token_rounding<2>{.tile = 4}, 24, 4, z);
    m.forward();
    again.replay(m.plan);
    for (dim r = 0; r < m.plan.rows(); ++r) CHECK(again.plan.weight[at(r)] == m.plan.weight[at(r)]);
  }
  TEST_CASE("what cannot work is a clear error") {
    using router = moe::token_rounding<3>;
    CHECK_THROWS_WITH_AS((router{.tile = 0}.check({.tokens = 8, .d = 4, .experts = 4})),
                         "token_rounding: tile is 0, expected at least 1", moe::shape_error);
    CHECK_THROWS_AS(router{}.check({.tokens = 8, .d = 4, .experts = 2}), moe::shape_error);
  }
}
