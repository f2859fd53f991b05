// SPDX-License-Identifier: Apache-2.0
// Attention over chosen blocks of keys (MoBA) at every level, against its definition and against the composition of
// policies.
#include "moe/recipe/moba.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>

#include "moe/attention/select_blocks.hpp"
#include "moe/backend/cpu.hpp"
#include "moe/backend/cpu/attention_levels.hpp"
#include "moe/backend/executor/thread_pool.hpp"
#include "support/attention_checks.hpp"
#include "support/chosen_blocks.hpp"
#include "support/executors.hpp"
#include "support/levels.hpp"

namespace {

using moe::bf16, moe::dim, moe::f16, moe::idx;
using reference::attention_shape, reference::worst_difference;
using testing::attention_floats, testing::attention_trial, testing::expect_equal, testing::chosen_by, testing::expect_near,
    testing::rows;
using serial = moe::cpu<moe::arch::native, moe::serial>;
using pooled = moe::cpu<moe::arch::native, moe::pool_executor>;

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
std::size_t at(dim i) { return static_cast<std::size_t>(i); }

// As attention_tolerance<float>().
constexpr double tolerance = 1e-5;
std::vector<double> doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }
/// With blocks of `block` keys and k of them: against the definition's mask.
template <class T>
void compare(const attention_shape& s, dim block, dim k, std::uint64_t seed = 1) {
  CAPTURE(s.h);
  CAPTURE(s.m);
  CAPTURE(s.n);
  CAPTURE(block);
  CAPTURE(k);
  const attention_trial<T> t(s, {}, seed);
  const auto chosen = reference::block_matrix(s, block, k, t.q, t.k);
  REQUIRE(chosen.gap > 3e-6);  // else rounding may choose: scores of size one are off by less than 1e-6
  const auto wanted = t.by_definition(chosen.seen);
  expect_near(t.blocks(moe::scalar<moe::serial>{}, block, k), wanted);
  testing::at_every_level([&] {
    std::vector<idx> which;
    expect_near(t.blocks(serial{}, block, k, &which), wanted, testing::attention_tolerance<T>());
    dim taken = 0;  // a query's own block is not among them
    for (const idx c : which) taken += c >= 0;
    for (dim i = std::max<dim>(0, s.m - s.n); i < s.m && s.query_offsets.empty(); ++i) taken += s.h;
    if (s.query_offsets.empty()) CHECK(taken == chosen.taken);
  });
}

/// Queries and keys such that block c scores `score(c)` with every query.
template <class F>
attention_trial<float> rigged(const attention_shape& s, dim block, F score) {
  attention_trial<float> t(s);
  for (dim i = 0; i < s.m * s.h; ++i) t.q[at(i * s.d)] = 1;
  for (dim j = 0; j < s.n; ++j)
    for (dim g = 0; g < s.h_kv; ++g) {
      float* row = t.k.data() + (j * s.h_kv + g) * s.d;
      for (dim x = 1; x < s.d; ++x) row[x] *= 0.01f;
      row[0] = score(j / block);
    }
  return t;
}

template <dim K>
using number = std::integral_constant<dim, K>;
/// One head of one sequence as gate, router, experts and combine compute it.
template <moe::dim K = 4>
struct composed_head {
  using layer = moe::moba<K, serial>;
  dim d;
  layer net;
  moe::buffer work;
  moe::arena mem;
  typename layer::context ctx;
  std::vector<float> o, dq, dk, dv;

  composed_head(const attention_trial<float>& t, dim block)
      : d(t.shape.d),
        net({.tokens = t.shape.m, .d = d, .experts = (t.shape.n + block - 1) / block}, moe::block_mean_gate{block},
            moe::kv_block_expert{block}),
        work(net.context_bytes(t.shape.m) + net.scratch_bytes(t.shape.m)),
        mem(work.bytes()),
        ctx(net.make_context(t.shape.m, mem)),
        o(t.q.size()),
        dq(t.q.size()),
        dk(t.k.size()),
        dv(t.k.size()) {
    const auto view = [&](auto& m) { return moe::matrix_view(m.data(), static_cast<dim>(m.size()) / d, d); };
    const moe::attention_input in{view(t.q), view(t.k), view(t.v)};
    typename layer::weights w;
    typename layer::gradients dw;
    net.forward(w, in, view(o), ctx, mem);
    net.backward(w, in, ctx, view(t.dout), {view(dq), view(dk), view(dv)}, dw, mem);
  }
  /// Of the plan: the own block among them.
  std::vector<idx> experts_of(dim t) const {
    std::vector<idx> r;
    for (idx j = ctx.plan.token_offsets[at(t)]; j < ctx.plan.token_offsets[at(t + 1)]; ++j) {
      const auto& offsets = ctx.plan.offsets;
      r.push_back(static_cast<idx>(std::upper_bound(offsets.begin(), offsets.end(), ctx.plan.position[at(j)]) -
                                   offsets.begin() - 1));
    }
    std::sort(r.begin(), r.end());
    return r;
  }
};

constexpr attention_shape small{.h = 4, .h_kv = 2, .d = 32, .dv = 40, .m = 290, .n = 290};

}  // namespace

TEST_SUITE("backend/host_moba") {
  TEST_CASE_TEMPLATE("outputs, log-sum-exps and gradients are those of the definition", T, float, bf16, f16) {
    compare<T>({.h = 2, .h_kv = 2, .d = 32, .dv = 32, .m = 200, .n = 200}, 16, 3);
    compare<T>({.h = 3, .h_kv = 1, .d = 24, .dv = 40, .m = 130, .n = 300}, 7, 4);
  }
  TEST_CASE("blocks of any size, of few keys or many, in any number") {
    const auto of = [](dim m, dim n) { return attention_shape{.h = 2, .h_kv = 1, .d = 16, .dv = 16, .m = m, .n = n}; };
    compare<float>(of(60, 60), 1, 5);
    compare<float>(of(450, 450), 2, 8);       // more blocks than are scored at once
    compare<float>(of(700, 700), 200, 2, 3);  // more keys than a step
    compare<float>(of(520, 520), 128, 3);
    compare<float>(of(300, 301), 33, 30);  // more than there are
    compare<float>(of(50, 50), 64, 2);     // one block
    compare<float>(of(1, 333), 10, 4);
    compare<float>(of(1, 1), 10, 4);
    compare<float>(of(0, 20), 10, 4);
    compare<float>(of(5, 0), 10, 4);
    compare<float>({.h = 4, .h_kv = 1, .d = 128, .dv = 128, .m = 600, .n = 600}, 64, 3);
  }
  TEST_CASE("queries before the first key see nothing, the others choose as ever") {
    const attention_shape s{.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 900, .n = 150};
    compare<float>(s, 16, 3);
    const attention_floats r = attention_trial<float>(s).blocks(serial{}, 16, 3);
    CHECK(r.lse[at(749 * 2)] == -infinity);
    CHECK(std::count(r.o.begin(), r.o.begin() + 750 * 64, 0.f) == 750 * 64);
    CHECK(std::count(r.dq.begin(), r.dq.begin() + 750 * 64, 0.f) == 750 * 64);
  }
  TEST_CASE("blocks restart at every packed sequence, and the last of one serves no other") {
    const attention_shape s{.h = 4,
                            .h_kv = 2,
                            .d = 32,
                            .dv = 32,
                            .m = 240,
                            .n = 330,
                            .query_offsets = {0, 30, 30, 190, 200, 240},
                            .key_offsets = {0, 100, 105, 265, 270, 330}};
    compare<float>(s, 16, 3);
    compare<bf16>(s, 7, 2);
    compare<float>(s, 150, 2);
  }
  TEST_CASE("as many blocks as there are is dense attention, forward and backward") {
    const attention_trial<float> t(small);
    testing::at_every_level([&] {
      const attention_floats dense = t.dense(serial{});
      for (const dim k : {10, 11, 40}) {
        const attention_floats r = t.blocks(serial{}, 29, k);
        CHECK(worst_difference(r.o, doubles(dense.o)) < tolerance);
        CHECK(worst_difference(r.lse, doubles(dense.lse)) < tolerance);
        CHECK(worst_difference(r.dq, doubles(dense.dq)) < tolerance);
        CHECK(worst_difference(r.dk, doubles(dense.dk)) < tolerance);
        CHECK(worst_difference(r.dv, doubles(dense.dv)) < tolerance);
      }
    });
  }
  TEST_CASE("one block a query is attention within blocks") {
    const attention_trial<float> t(small);
    attention_trial<float> packed = t;  // each block a sequence
    for (dim i = 0; i < small.n; i += 40) packed.shape.query_offsets.push_back(static_cast<idx>(i));
    packed.shape.query_offsets.push_back(static_cast<idx>(small.n));
    packed.shape.key_offsets = packed.shape.query_offsets;
    testing::at_every_level([&] { expect_near(t.blocks(serial{}, 40, 1), packed.by_definition()); });
  }
  TEST_CASE("the first blocks see what dense attention sees") {
    const attention_trial<float> t(small);
    testing::at_every_level([&] {
      const attention_floats dense = t.dense(serial{});
      for (const dim k : {1, 2, 5}) {
        const dim first = k * 20;  // queries that have no more blocks than they may choose
        const attention_floats chosen = t.blocks(serial{}, 20, k);
        const auto same = [&](const std::vector<float>& got, const std::vector<float>& wanted, dim cols) {
          CHECK(worst_difference(rows(got, 0, first, cols), doubles(rows(wanted, 0, first, cols))) < tolerance);
        };
        same(chosen.o, dense.o, small.h * small.dv);
        same(chosen.lse, dense.lse, small.h);
        same(chosen.dq, dense.dq, small.h * small.d);
      }
    });
  }
  TEST_CASE("a query chooses min(k, own + 1) blocks, none twice, none of its future") {
    const attention_trial<float> t(small);
    testing::at_every_level([&] {
      for (const dim k : {1, 4, 9}) {
        std::vector<idx> chosen;
        (void)t.blocks(serial{}, 13, k, &chosen);
        for (dim i = 0; i < small.m; ++i)
          for (dim a = 0; a < small.h; ++a) {
            const std::vector<idx> own = chosen_by(chosen, small, k, i, a);
            REQUIRE(static_cast<dim>(own.size()) + 1 == std::min(k, i / 13 + 1));
            REQUIRE(std::adjacent_find(own.begin(), own.end()) == own.end());
            if (!own.empty()) REQUIRE((own.front() >= 0 && own.back() < i / 13));
          }
      }
    });
  }
  TEST_CASE("of blocks that score the same the lower ones are chosen") {
    const auto equal = rigged(small, 4, [](dim) { return 2.f; });
    attention_trial<float> same = equal;
    for (dim j = 0; j < small.n; ++j) std::copy_n(equal.k.begin(), 64, same.k.begin() + j * 64);  // every key is the first
    const auto stairs = rigged(small, 4, [](dim c) { return static_cast<float>(c / 3); });        // three of a kind
    attention_trial<float> steps = stairs;
    for (float& x : steps.k) x = std::floor(x);  // whole numbers have exact means
    for (float& x : steps.q) x = x == 1 ? 1.f : 0.f;
    testing::at_every_level([&] {
      std::vector<idx> chosen;
      (void)same.blocks(serial{}, 4, 6, &chosen);
      for (dim i = 24; i < small.m; ++i) REQUIRE(chosen_by(chosen, small, 6, i, 3) == std::vector<idx>{0, 1, 2, 3, 4});
      (void)steps.blocks(serial{}, 4, 3, &chosen);
      for (dim i = 24; i < small.m; ++i) {
        const auto last = static_cast<idx>(i / 4 - 1), low = last / 3 * 3;  // the first of the highest stair
        REQUIRE(chosen_by(chosen, small, 3, i, 1) ==
                (low < last ? std::vector<idx>{low, low + 1} : std::vector<idx>{low - 3, low}));
      }
    });
  }
  TEST_CASE("a router that prefers recent blocks is a sliding window, and with the first one an attention sink") {
    constexpr dim block = 32, k = 3;
    const auto recent = rigged(small, block, [](dim c) { return static_cast<float>(c); });
    const auto sink = rigged(small, block, [](dim c) { return c == 0 ? 20.f : static_cast<float>(c); });
    reference::attention_matrix window(small), with_first(small);
    for (dim t = 0; t < small.m; ++t)
      for (dim a = 0; a < small.h; ++a)
        for (dim j = 0; j <= t; ++j) {
          const dim back = t / block - j / block;
          window(t, a, j) = back < k;
          with_first(t, a, j) = back < k - 1 || j < block;
        }
    testing::at_every_level([&] {
      expect_near(recent.blocks(serial{}, block, k), recent.by_definition(window));
      expect_near(sink.blocks(serial{}, block, k), sink.by_definition(with_first));
    });
  }
  TEST_CASE("a later key or value changes no bit, be it a number or not") {
    const attention_trial<float> before(small);
    testing::at_every_level([&] {
      const attention_floats wanted = before.blocks(serial{}, 24, 3);
      for (const dim later : {5, 30, 128, 200, 289})
        for (const float to : {9.f, not_a_number, infinity}) {
          attention_trial<float> t = before;
          for (dim j = 0; j < 64; ++j) t.k[at(later * 64 + j)] = to;
          for (dim j = 0; j < 80; ++j) t.v[at(later * 80 + j)] = to;
          const attention_floats got = t.blocks(serial{}, 24, 3);
          CAPTURE(later);
          CAPTURE(to);
          CHECK(rows(got.o, 0, later, 160) == rows(wanted.o, 0, later, 160));
          CHECK(rows(got.lse, 0, later, 4) == rows(wanted.lse, 0, later, 4));
          CHECK(rows(got.dq, 0, later, 128) == rows(wanted.dq, 0, later, 128));
          CHECK(rows(got.o, later, 1, 160) != rows(wanted.o, later, 1, 160));
        }
    });
  }
  TEST_CASE("what is in blocks that nobody chose changes nothing, and has no gradients") {
    const attention_shape s{.h = 4, .h_kv = 2, .d = 32, .dv = 32, .m = 40, .n = 300};
    const auto score = [](dim c) { return c == 3 || c == 6 ? 8.f : -8.f; };  // queries stand in blocks 8 and 9 of 30 keys
    const attention_trial<float> before = rigged(s, 30, score);
    testing::at_every_level([&] {
      const attention_floats wanted = before.blocks(serial{}, 30, 3);
      attention_trial<float> t = before;
      const auto unseen = [](dim j) { return j < 240 && j / 30 != 3 && j / 30 != 6; };
      for (dim j = 0; j < 300; ++j)
        if (unseen(j))
          for (dim x = 0; x < 64; ++x) {
            t.k[at(j * 64 + x)] -= 0.5f;
            t.v[at(j * 64 + x)] = not_a_number;
          }
      expect_equal(t.blocks(serial{}, 30, 3), wanted);
      for (dim j = 0; j < 300; ++j) {
        const auto zeros = [&](const std::vector<float>& g) {
          return std::count(g.begin() + j * 64, g.begin() + (j + 1) * 64, 0.f);
        };
        REQUIRE((zeros(wanted.dk) == 64) == unseen(j));
        REQUIRE((zeros(wanted.dv) == 64) == unseen(j));
      }
    });
  }
  TEST_CASE("gradients are those of finite differences, where a step changes no choice") {
    constexpr dim block = 2, k = 3;
    const attention_trial<float> at_rest({.h = 2, .h_kv = 1, .d = 64, .dv = 64, .m = 9, .n = 12});
    const auto run = [&](const attention_trial<float>& t) {
      std::vector<idx> chosen;
      std::vector<std::vector<idx>> blocks;
      attention_floats r = t.blocks(serial{}, block, k, &chosen);
      for (dim row = 0; row < t.shape.m * t.shape.h; ++row)
        blocks.push_back(chosen_by(chosen, t.shape, k, row / t.shape.h, row % t.shape.h));
      return std::pair(r, blocks);
    };
    const auto [got, choices] = run(at_rest);
    dim checked = 0, skipped = 0;
    const auto compare_all = [&](auto member, const std::vector<float>& gradient) {
      for (std::size_t i = 0; i < gradient.size(); i += 37) {
        constexpr float h = 1.f / 64;
        attention_trial<float> up = at_rest, down = at_rest;
        (up.*member)[i] += h;
        (down.*member)[i] -= h;
        const auto [above, above_choices] = run(up);
        const auto [below, below_choices] = run(down);
        if (above_choices != choices || below_choices != choices) {
          ++skipped;
          continue;
        }
        ++checked;
        double difference = 0;
        for (std::size_t j = 0; j < above.o.size(); ++j)
          difference += (double{above.o[j]} - double{below.o[j]}) * at_rest.dout[j];
        const double slope = difference / (double{(up.*member)[i]} - double{(down.*member)[i]});
        REQUIRE(std::fabs(slope - gradient[i]) < 1e-3);  // h^2
      }
    };
    compare_all(&attention_trial<float>::q, got.dq);
    compare_all(&attention_trial<float>::k, got.dk);
    compare_all(&attention_trial<float>::v, got.dv);
    INFO("skipped " << skipped);
    CHECK(checked >= 9 * skipped);
  }
  TEST_CASE("bits are equal for any number of threads, however the work is shared") {
    const attention_trial<float> t({.h = 4, .h_kv = 2, .d = 32, .dv = 32, .m = 1200, .n = 1250});
    std::vector<idx> chosen, again;
    const attention_floats wanted = t.blocks(serial{}, 50, 4, &chosen);
    for (const int threads : {2, 3, 64}) {
      const moe::thread_pool pool(threads);
      expect_equal(t.blocks(pooled(moe::pool_executor(pool)), 50, 4, &again), wanted);
      CHECK(again == chosen);
    }
    expect_equal(t.blocks(moe::cpu<moe::arch::native, testing::shuffling>(testing::shuffling{3}), 50, 4), wanted);
  }
  TEST_CASE("a prompt in pieces gives the bits of the whole, wherever a piece ends") {
    const attention_trial<bf16> all(small);
    testing::at_every_level([&] {
      std::vector<idx> chosen, own;
      const attention_floats whole = all.blocks(serial{}, 24, 4, &chosen);
      for (const auto& [from, to] : {std::pair<dim, dim>{0, 1}, {0, 130}, {77, 205}, {143, 145}, {250, 251}, {289, 290}}) {
        const dim first = from, last = to;  // which a message may name
        attention_trial<bf16> piece({.h = 4, .h_kv = 2, .d = 32, .dv = 40, .m = last - first, .n = last});
        piece.q = rows(all.q, first, last - first, 128);
        piece.k = rows(all.k, 0, last, 64);
        piece.v = rows(all.v, 0, last, 80);
        piece.dout = rows(all.dout, first, last - first, 160);
        const attention_floats got = piece.blocks(serial{}, 24, 4, &own);
        CAPTURE(first);
        CHECK(own == rows(chosen, first, last - first, 4 * 3));
        CHECK(got.o == rows(whole.o, first, last - first, 160));
        CHECK(got.lse == rows(whole.lse, first, last - first, 4));
        CHECK(got.dq == rows(whole.dq, first, last - first, 128));
      }
    });
  }
  TEST_CASE_TEMPLATE("it equals the composition of gate, router, experts and combine", K, number<1>, number<2>, number<4>,
                     number<9>) {
    constexpr dim T = 130, N = 170, d = 32, block = 13, k = K::value;
    const attention_trial<float> t({.h = 1, .h_kv = 1, .d = d, .dv = d, .m = T, .n = N});
    const composed_head<k> head(t, block);
    testing::at_every_level([&] {
      std::vector<idx> chosen;
      const attention_floats got = t.blocks(serial{}, block, k, &chosen);
      CHECK(worst_difference(got.o, doubles(head.o)) < tolerance);
      CHECK(worst_difference(got.dq, doubles(head.dq)) < tolerance);
      CHECK(worst_difference(got.dk, doubles(head.dk)) < tolerance);
      CHECK(worst_difference(got.dv, doubles(head.dv)) < tolerance);
      for (dim i = 0; i < T; ++i) {
        std::vector<idx> own = chosen_by(chosen, t.shape, k, i, 0);
        own.push_back(static_cast<idx>((N - T + i) / block));
        REQUIRE(own == head.experts_of(i));
      }
    });
  }
  TEST_CASE("each query head of each packed sequence equals a composition of its own") {
    constexpr dim d = 16, block = 8;
    const attention_shape s{.h = 4,
                            .h_kv = 2,
                            .d = d,
                            .dv = d,
                            .m = 100,
                            .n = 130,
                            .query_offsets = {0, 40, 60, 100},
                            .key_offsets = {0, 40, 83, 130}};
    const attention_trial<float> t(s);
    // Gradients of keys and values add up over the heads of a group.
    attention_floats wanted{std::vector<float>(t.q.size()),
                            {},
                            std::vector<float>(t.q.size()),
                            std::vector<float>(t.k.size()),
                            std::vector<float>(t.v.size())};
    for (std::size_t sequence = 0; sequence < 3; ++sequence)
      for (dim a = 0; a < s.h; ++a) {
        const dim query = s.query_offsets[sequence], key = s.key_offsets[sequence], g = a / 2;
        attention_trial<float> one({.h = 1,
                                    .h_kv = 1,
                                    .d = d,
                                    .dv = d,
                                    .m = s.query_offsets[sequence + 1] - query,
                                    .n = s.key_offsets[sequence + 1] - key});
        const auto columns = [&](const std::vector<float>& from, dim first, dim heads, dim head, std::vector<float>& to) {
          for (dim i = 0; i < static_cast<dim>(to.size()); ++i)
            to[at(i)] = from[at(((first + i / d) * heads + head) * d + i % d)];
        };
        columns(t.q, query, 4, a, one.q);
        columns(t.k, key, 2, g, one.k);
        columns(t.v, key, 2, g, one.v);
        columns(t.dout, query, 4, a, one.dout);
        const composed_head<3> head(one, block);
        const auto add = [&](const std::vector<float>& from, dim first, dim heads, dim column, std::vector<float>& to) {
          for (dim i = 0; i < static_cast<dim>(from.size()); ++i)
            to[at(((first + i / d) * heads + column) * d + i % d)] += from[at(i)];
        };
        add(head.o, query, 4, a, wanted.o);
        add(head.dq, query, 4, a, wanted.dq);
        add(head.dk, key, 2, g, wanted.dk);
        add(head.dv, key, 2, g, wanted.dv);
      }
    testing::at_every_level([&] {
      const attention_floats got = t.blocks(serial{}, block, 3);
      CHECK(worst_difference(got.o, doubles(wanted.o)) < tolerance);
      CHECK(worst_difference(got.dq, doubles(wanted.dq)) < tolerance);
      CHECK(worst_difference(got.dk, doubles(wanted.dk)) < tolerance);
      CHECK(worst_difference(got.dv, doubles(wanted.dv)) < tolerance);
    });
  }
  TEST_CASE_TEMPLATE("a block whose score is NaN or -inf is not chosen, where a query may have all or must choose", T, float,
                     bf16) {
    const attention_shape s{.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 65, .n = 65};  // own = k - 1 from query 30
    for (const float strange : {1.f, not_a_number, -infinity, infinity}) {
      CAPTURE(strange);
      const auto t = testing::with_strange_block<T>(s, strange);
      attention_trial<T> early = t;  // that query where it may have all
      std::copy_n(t.q.begin() + 63 * 64, 64, early.q.begin() + 35 * 64);
      testing::at_every_level([&] {
        std::vector<idx> chosen;
        const attention_floats got = t.blocks(serial{}, 10, 4, &chosen);
        CHECK(testing::wrong_choices(t, 10, 4, chosen) == 0);
        if (strange != infinity)
          CHECK(std::all_of(got.o.begin() + 10 * 64, got.o.begin() + 63 * 64, [](float x) { return std::isfinite(x); }));
        (void)early.blocks(serial{}, 10, 4, &chosen);
        CHECK(testing::wrong_choices(early, 10, 4, chosen) == 0);
      });
    }
  }
  TEST_CASE("decoding and the composition refuse the same blocks") {
    constexpr dim N = 65, d = 32, block = 10, k = 4;
    const attention_shape s{.h = 1, .h_kv = 1, .d = d, .dv = d, .m = N, .n = N};
    for (const float strange : {1.f, not_a_number, -infinity, infinity}) {
      CAPTURE(strange);
      const auto t = testing::with_strange_block<float>(s, strange);
      const auto wanted = testing::chosen_by_definition(t, block, k);
      const composed_head<> head(t, block);
      moe::arena count;
      const moe::kv_cache_shape shape{{1, 1, d, d}, 1, N, block};
      (void)moe::kv_cache<float>::make(shape, count);
      const moe::buffer memory(moe::padded(count));
      moe::arena mem(memory.bytes());
      auto cache = moe::kv_cache<float>::make(shape, mem);
      for (dim i = 0; i < N; ++i) {
        const auto row = [&](const std::vector<float>& v) { return moe::matrix_view<const float>(v.data() + i * d, 1, d); };
        cache.append_to(testing::on<serial>(), 0, row(t.k), row(t.v));
        std::vector<idx> own(k), all = wanted[at(i)];
        all.push_back(static_cast<idx>(i / block));
        moe::select_blocks(testing::on<serial>(), cache, row(t.q), moe::matrix_view<idx>{own.data(), 1, k});
        std::erase(own, -1);
        CAPTURE(i);
        CHECK(own == all);
        CHECK(head.experts_of(i) == all);
      }
    }
  }
  TEST_CASE("pairs of queries and keys are as many as the formula says: an eighth of the keys for k B = N/8") {
    constexpr dim N = 512, block = 16, k = N / 8 / block;
    const attention_trial<float> t({.h = 2, .h_kv = 1, .d = 16, .dv = 16, .m = N, .n = N});
    std::vector<idx> chosen;
    (void)t.blocks(serial{}, block, k, &chosen);
    dim pairs = 0, wanted = 0;
    for (dim i = 0; i < N; ++i)
      for (dim a = 0; a < 2; ++a) {
        const dim here = static_cast<dim>(chosen_by(chosen, t.shape, k, i, a).size()) * block + i % block + 1;
        REQUIRE(here <= N / 8);  // 7/8 of the keys are left out
        if (i == N - 1) CHECK(here == N / 8);
        pairs += here;
        wanted += i % block + 1 + block * std::min(i / block, k - 1);
      }
    CHECK(pairs == wanted);
    // Of dense causal attention, with b = k B: (2 b N - b^2) / N^2 = 15/64, less half a block for each query's own one.
    const auto share = static_cast<double>(pairs) / static_cast<double>(N * (N + 1));
    CHECK(share < 15. / 64);
    CHECK(share > 15. / 64 - double{block} / N);
  }
  TEST_CASE("memory grows with the number of tokens and not with its square") {
    const moe::scalar<moe::serial> backend;
    const moe::attention_problem p{{8, 2, 64, 64}};
    const auto of = [&](dim n, auto count) {
      moe::arena mem;
      count(mem, moe::attention_sizes{n, n});
      return mem.peak();
    };
    constexpr dim B = 128, k = 8;
    // A mean for each block; one more than whole ones.
    const auto kept = [&](moe::arena& mem, moe::attention_sizes n) {
      (void)carve_key_blocks(p.heads, 1, n.keys, B, k, mem);
    };
    for (const dim n : {1024, 4096, 1 << 20}) {
      CHECK(of(n, kept) == at(n / B + 1) * 2 * 64 * sizeof(float));
    }
    const moe::key_blocks selection{B, k};
    const auto forward = [&](moe::arena& mem, moe::attention_sizes n) { count_attend(backend, p, n, selection, mem); };
    const auto backward = [&](moe::arena& mem, moe::attention_sizes n) {
      count_attend_backward(backend, p, n, selection, mem);
    };
    // One number for each block and thread; gradients of keys and values for each part of the queries.
    CHECK(of(1 << 20, forward) - of(1 << 19, forward) == (1 << 19) / B * sizeof(idx));
    CHECK(of(1 << 20, backward) - of(1 << 19, backward) ==
          (1 << 19) / B * sizeof(idx) + (std::size_t{1} << 19) * 8 * 2 * 128 * 4);
  }
}
