// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <limits>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;
using backend = moe::scalar<>;
using rows = std::vector<float>;

// Four tokens, two experts, d = 2. Token 0 chose expert 1 before 0, token 1 nothing, token 2 was dropped, token 3 chose 1.
struct plan {
  idx offsets[3] = {0, 1, 3}, token[3] = {0, 0, 3}, token_offsets[5] = {0, 2, 2, 3, 4}, position[4] = {1, 0, -1 - 1, 2};
  float weight[3] = {0.25f, 0.5f, 2};
  moe::routing_plan view() { return {offsets, token, weight, token_offsets, position}; }
};

template <class C>
rows combined(const C& combine, rows x = rows(8)) {
  plan p;
  moe::check(p.view());
  rows ys{4, 8, 10, 20, 1, 2}, y(8, std::nanf(""));
  moe::matrix_view<float> source{ys.data(), 3, 2};
  typename C::context context;
  combine.forward(testing::on<backend>({.tokens = 4, .d = 2, .experts = 2}), {},
                  moe::matrix_view<const float>{x.data(), 4, 2}, p.view(), source, {y.data(), 4, 2}, context);
  return y;
}

}  // namespace

TEST_SUITE("combine/weighted_sum") {
  TEST_CASE("y is the weighted sum of a token's rows, overwritten; a token without rows gives 0") {
    CHECK(combined(moe::weighted_sum{}) == rows{6, 12, 0, 0, 0, 0, 2, 4});
  }
  TEST_CASE("without weights the rows are added as they are") {
    CHECK(combined(moe::unweighted_sum{}) == rows{14, 28, 0, 0, 0, 0, 1, 2});
  }
  TEST_CASE("rows are added in the order of the token's choices, not of the plan") {
    idx offsets[] = {0, 1, 2, 3}, token[] = {0, 0, 0}, token_offsets[] = {0, 3}, position[] = {0, 1, 2};
    float weight[] = {1, 1, 1}, ys[] = {1, 1e8f, -1e8f}, y = 0;
    const moe::routing_plan p{offsets, token, weight, token_offsets, position};
    const auto sum = [&](idx a, idx b, idx c) {
      position[0] = a, position[1] = b, position[2] = c;
      moe::nothing none;
      moe::weighted_sum{}.forward(testing::on<backend>(), none, 0, p, moe::matrix_view<float>{ys, 3, 1}, {&y, 1, 1}, none);
      return y;
    };
    CHECK(sum(0, 1, 2) == 0);  // 1 is lost in 1e8
    CHECK(sum(1, 2, 0) == 1);
  }
  TEST_CASE("backward keeps no row: it names dy, the token of a row and the weight") {
    plan p;
    rows dy(8);
    moe::nothing none;
    moe::gathered<float> dys;
    const moe::matrix_view<const float> view{dy.data(), 4, 2};
    moe::weighted_sum{}.backward(testing::on<backend>(), none, 0, p.view(), 0, none, view, dys, none, none, {});
    CHECK(dys.row(2) == dy.data() + 3 * 2);
    CHECK(dys.scale(2) == 2);
    moe::unweighted_sum{}.backward(testing::on<backend>(), none, 0, p.view(), 0, none, view, dys, none, none, {});
    CHECK(dys.row(2) == dy.data() + 3 * 2);
    CHECK(dys.scale(2) == 1);
  }
}

TEST_SUITE("combine/residual") {
  TEST_CASE("x passes around the sum; a token that was dropped or chose nothing passes unchanged") {
    const rows x{100, 200, 300, 400, 500, 600, 700, 800};
    CHECK(combined(moe::residual<>{}, x) == rows{106, 212, 300, 400, 500, 600, 702, 804});
    CHECK(combined(moe::residual<moe::unweighted_sum>{}, x) == rows{114, 228, 300, 400, 500, 600, 701, 802});
    CHECK(combined(moe::residual<moe::residual<>>{}, x) == rows{206, 412, 600, 800, 1000, 1200, 1402, 1604});
  }
  TEST_CASE("dy is added to dx once, and not at all where x is frozen") {
    plan p;
    rows x(8), dy{1, 2, 3, 4, 5, 6, 7, 8}, dx(8, 1);
    moe::nothing none;
    moe::gathered<float> dys;
    moe::matrix_view<float> to{dx.data(), 4, 2}, frozen;
    const moe::matrix_view<float> no_rows;
    const auto run = [&](moe::matrix_view<float>& grad) {
      moe::residual<>{}.backward(testing::on<backend>(), none, moe::matrix_view<const float>{x.data(), 4, 2}, p.view(),
                                 no_rows, none, moe::matrix_view<const float>{dy.data(), 4, 2}, dys, grad, none, {});
    };
    run(to);
    CHECK(dx == rows{2, 3, 4, 5, 6, 7, 8, 9});
    run(frozen);
    CHECK(dx == rows{2, 3, 4, 5, 6, 7, 8, 9});
  }
}

TEST_SUITE("combine/lse_merge") {
  constexpr float infinity = std::numeric_limits<float>::infinity();

  rows merged(rows lse) {
    plan p;
    rows o{4, 8, 10, 20, 1, 2}, y(8, std::nanf(""));
    moe::nothing none;
    moe::lse_merge{}.forward(testing::on<backend>(), none, 0, p.view(),
                             moe::attention_rows{{o.data(), 3, 2}, {lse.data(), 3, 1}}, {y.data(), 4, 2}, none);
    return y;
  }
  TEST_CASE("parts are weighed by their share of the softmax; a token without rows gives 0") {
    CHECK(merged({0, 0, 5}) == rows{7, 14, 0, 0, 0, 0, 1, 2});
    const rows y = merged({std::log(3.f), 0, -5});
    CHECK(y[0] == doctest::Approx(0.75 * 4 + 0.25 * 10));
    CHECK(y[6] == doctest::Approx(1));
  }
  TEST_CASE("a part that saw no key has no share, and a token whose parts saw none gives 0, without NaN") {
    CHECK(merged({-infinity, 2, -infinity}) == rows{10, 20, 0, 0, 0, 0, 0, 0});
    CHECK(merged({-infinity, -infinity, -infinity}) == rows(8));
  }
  TEST_CASE("large scores do not overflow") {
    CHECK(merged({1e4f, 1e4f, 3e38f}) == rows{7, 14, 0, 0, 0, 0, 1, 2});
    CHECK(merged({-1e4f, 1e4f, 0}) == rows{10, 20, 0, 0, 0, 0, 1, 2});
  }
  TEST_CASE("gradients of parts that saw no key are 0") {
    plan p;
    rows o{4, 8, 10, 20, 1, 2}, lse{-infinity, 2, -infinity}, dy{1, 1, 1, 1, 1, 1, 1, 1}, d_o(6, std::nanf("")),
        dlse(3, std::nanf(""));
    moe::nothing none;
    moe::attention_rows dys{{d_o.data(), 3, 2}, {dlse.data(), 3, 1}};
    moe::lse_merge{}.backward(testing::on<backend>(), none, 0, p.view(),
                              moe::attention_rows{{o.data(), 3, 2}, {lse.data(), 3, 1}}, none,
                              moe::matrix_view<const float>{dy.data(), 4, 2}, dys, none, none, {});
    CHECK(d_o == rows{0, 0, 1, 1, 0, 0});
    CHECK(dlse == rows{0, 0, 0});
  }

  /// A partial softmax: o[d] and the log-sum-exp of its scores.
  struct part {
    rows o;
    float lse;
  };
  part merge(const std::vector<part>& parts) {
    const auto n = static_cast<idx>(parts.size());
    rows o, lse, y(parts[0].o.size());
    std::vector<idx> offsets(parts.size() + 1), token(parts.size()), position, token_offsets{0, n};
    std::vector<float> weight(parts.size(), 1);
    double sum = 0, largest = -infinity;
    for (const part& x : parts) {
      o.insert(o.end(), x.o.begin(), x.o.end());
      lse.push_back(x.lse);
      position.push_back(static_cast<idx>(position.size()));
      offsets[position.size()] = static_cast<idx>(position.size());
      largest = std::max(largest, double{x.lse});
    }
    for (const part& x : parts) sum += largest == -infinity ? 0 : std::exp(x.lse - largest);
    const auto d = static_cast<dim>(y.size());
    moe::nothing none;
    moe::lse_merge{}.forward(testing::on<backend>(), none, 0, moe::routing_plan{offsets, token, weight, token_offsets, position},
                             moe::attention_rows{{o.data(), n, d}, {lse.data(), n, 1}}, {y.data(), 1, d}, none);
    return {y, static_cast<float>(largest + std::log(sum))};
  }
  void expect_near(const part& a, const part& b) {
    for (std::size_t i = 0; i < a.o.size(); ++i) CHECK(std::fabs(a.o[i] - b.o[i]) < 1e-6f);
    CHECK(std::fabs(a.lse - b.lse) < 1e-6f);
  }
  TEST_CASE("parts may be merged in any order and any grouping, and a part that saw nothing changes no bit") {
    std::vector<part> parts;
    for (std::uint64_t i = 0; i < 4; ++i) parts.push_back({testing::normals(8, 3 * i), 2 * testing::normals(1, 90 + i)[0]});
    const part &a = parts[0], &b = parts[1], &c = parts[2], &d = parts[3];
    const part all = merge(parts);
    expect_near(merge({merge({merge({a, b}), c}), d}), all);
    expect_near(merge({a, merge({b, merge({c, d})})}), all);
    expect_near(merge({merge({a, b}), merge({c, d})}), all);
    expect_near(merge({d, b, c, a}), all);
    const part nothing{rows(8), -infinity};
    for (const part& same : {merge({all, nothing}), merge({nothing, all})}) {
      CHECK(same.o == all.o);
      CHECK(same.lse == all.lse);
    }
    CHECK(merge({nothing, nothing}).lse == -infinity);
  }
}
