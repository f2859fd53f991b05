// SPDX-License-Identifier: Apache-2.0
// Attention at every level against its formulas in double, and what it promises of bits, memory and bad input.
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/backend/cpu/attention_levels.hpp"
#include "moe/backend/executor/thread_pool.hpp"
#include "moe/backend/host_moba.hpp"
#include "support/attention_checks.hpp"
#include "support/executors.hpp"
#include "support/levels.hpp"

namespace {

using moe::attention_mask, moe::bf16, moe::dim, moe::f16, moe::idx;
using reference::attention_shape, reference::worst_difference;
using testing::attention_floats, testing::attention_tolerance, testing::attention_trial, testing::expect_equal,
    testing::expect_near, testing::rows;
using serial = moe::cpu<moe::arch::native, moe::serial>;
using pooled = moe::cpu<moe::arch::native, moe::pool_executor>;

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
std::size_t at(dim i) { return static_cast<std::size_t>(i); }

template <class T>
void compare(const attention_shape& s, attention_mask mask = {}) {
  CAPTURE(s.h);
  CAPTURE(s.d);
  CAPTURE(s.m);
  CAPTURE(s.n);
  const attention_trial<T> t(s, mask);
  const auto wanted = t.by_definition();
  expect_near(t.dense(moe::scalar<moe::serial>{}), wanted);
  testing::at_every_level([&] { expect_near(t.dense(serial{}), wanted, attention_tolerance<T>()); });
}

}  // namespace

TEST_SUITE("backend/host_attention") {
  TEST_CASE_TEMPLATE("outputs, log-sum-exps and gradients are those of the formulas, whatever is stored", T, float, bf16, f16) {
    compare<T>({.h = 4, .h_kv = 1, .d = 64, .dv = 64, .m = 70, .n = 150});
    compare<T>({.h = 3, .h_kv = 1, .d = 40, .dv = 24, .m = 33, .n = 300});
    compare<T>({.h = 2, .h_kv = 2, .d = 128, .dv = 80, .m = 130, .n = 131});
  }
  TEST_CASE("heads are as wide as they like, alone or in groups") {
    for (const dim d : {32, 80, 96, 256}) compare<float>({.h = 2, .h_kv = 1, .d = d, .dv = d, .m = 20, .n = 140});
    compare<float>({.h = 1, .h_kv = 1, .d = 1, .dv = 1, .m = 5, .n = 5});
    compare<float>({.h = 5, .h_kv = 5, .d = 33, .dv = 70, .m = 9, .n = 9});
    compare<float>({.h = 6, .h_kv = 2, .d = 32, .dv = 256, .m = 200, .n = 200});
    compare<float>({.h = 400, .h_kv = 1, .d = 8, .dv = 8, .m = 3, .n = 7});  // more heads in a group than rows in a tile
  }
  TEST_CASE("windows and attention without a mask are those of the formulas") {
    for (const dim window : {1, 7, 128, 129, 1000})
      compare<float>({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 290, .n = 300}, {true, window});
    compare<float>({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 70, .n = 260}, {.causal = false});
    compare<float>({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 200, .n = 60}, {.causal = false});
  }
  TEST_CASE("one query, one key, none of them") {
    compare<float>({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 1, .n = 400});
    compare<float>({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 1, .n = 1});
    compare<float>({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 0, .n = 9});
    compare<float>({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 9, .n = 0});
  }
  TEST_CASE("packed sequences do not see one another, be they empty or uneven") {
    const attention_shape s{.h = 4, .h_kv = 2, .d = 32, .dv = 40, .m = 170, .n = 330, .query_offsets = {0, 3, 3, 140, 150, 170},
                            .key_offsets = {0, 200, 205, 310, 310, 330}};
    for (const attention_mask mask : {attention_mask{}, attention_mask{true, 9}, attention_mask{.causal = false}})
      compare<bf16>(s, mask);
    // Each alone gives the same bits.
    const attention_trial<float> all(s);
    testing::at_every_level([&] {
      const attention_floats whole = all.dense(serial{});
      reference::for_each_sequence(s, [&](dim q, dim m, dim k, dim n) {
        attention_trial<float> one({.h = 4, .h_kv = 2, .d = 32, .dv = 40, .m = m, .n = n});
        one.q = rows(all.q, q, m, 4 * 32);
        one.k = rows(all.k, k, n, 2 * 32);
        one.v = rows(all.v, k, n, 2 * 40);
        one.dout = rows(all.dout, q, m, 4 * 40);
        const attention_floats alone = one.dense(serial{});
        CHECK(alone.o == rows(whole.o, q, m, 4 * 40));
        CHECK(alone.dq == rows(whole.dq, q, m, 4 * 32));
        CHECK(alone.dk == rows(whole.dk, k, n, 2 * 32));
      });
    });
  }
  TEST_CASE("a query that sees no key gives 0 and -inf, and has no gradients") {
    const attention_trial<float> t({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 500, .n = 150});
    compare<float>(t.shape);
    testing::at_every_level([&] {
      const attention_floats r = t.dense(serial{});
      for (dim i = 0; i < 350; ++i) {
        for (dim a = 0; a < 2; ++a) REQUIRE(r.lse[at(i * 2 + a)] == -infinity);
        for (dim j = 0; j < 64; ++j) REQUIRE((r.o[at(i * 64 + j)] == 0 && r.dq[at(i * 64 + j)] == 0));
      }
      for (const auto* v : {&r.o, &r.dq, &r.dk, &r.dv})
        for (const float x : *v) REQUIRE(std::isfinite(x));
    });
  }
  TEST_CASE("the scale of scores is 1 / sqrt(d) or the one that is asked for") {
    attention_trial<float> t({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 40, .n = 40});
    const attention_floats usual = t.dense(serial{});
    t.scale = 0.5f;
    expect_near(t.dense(serial{}), t.by_definition());
    t.scale = 1 / std::sqrt(32.f);
    expect_equal(t.dense(serial{}), usual);
  }
  TEST_CASE("scores too large to exponentiate do no harm") {
    attention_trial<float> t({.h = 1, .h_kv = 1, .d = 32, .dv = 32, .m = 140, .n = 140});
    for (float& x : t.q) x *= 300;
    const auto wanted = t.by_definition();
    testing::at_every_level([&] {
      const attention_floats r = t.dense(serial{});
      CHECK(worst_difference(r.o, wanted.o) < 3e-3);  // scores of a thousand are off by 1e-4, and so are the weights
      for (const auto* v : {&r.lse, &r.dq, &r.dk, &r.dv})
        for (const float x : *v) REQUIRE(std::isfinite(x));
    });
  }
  TEST_CASE("a later key or value changes no bit, be it a number or not") {
    const attention_trial<float> before({.h = 3, .h_kv = 1, .d = 40, .dv = 40, .m = 290, .n = 300});
    testing::at_every_level([&] {
      const attention_floats wanted = before.dense(serial{});
      for (const dim later : {11, 127, 128, 200, 299})
        for (const float to : {3.f, not_a_number, infinity, -infinity}) {
          attention_trial<float> t = before;
          for (dim j = 0; j < 40; ++j) (later % 2 ? t.k : t.v)[at(later * 40 + j)] = to;
          const attention_floats got = t.dense(serial{});
          const dim same = later - 10;  // queries before it
          CAPTURE(later);
          CAPTURE(to);
          CHECK(rows(got.o, 0, same, 120) == rows(wanted.o, 0, same, 120));
          CHECK(rows(got.lse, 0, same, 3) == rows(wanted.lse, 0, same, 3));
          CHECK(rows(got.dq, 0, same, 120) == rows(wanted.dq, 0, same, 120));
          CHECK(rows(got.o, same, 1, 120) != rows(wanted.o, same, 1, 120));
        }
    });
  }
  TEST_CASE("a key that left the window changes no bit") {
    const attention_trial<float> before({.h = 2, .h_kv = 1, .d = 32, .dv = 32, .m = 300, .n = 300}, {true, 40});
    testing::at_every_level([&] {
      const attention_floats wanted = before.dense(serial{});
      for (const dim key : {0, 100, 130}) {
        attention_trial<float> t = before;
        for (dim j = 0; j < 32; ++j) t.k[at(key * 32 + j)] = t.v[at(key * 32 + j)] = not_a_number;
        const attention_floats got = t.dense(serial{});
        CHECK(rows(got.o, key + 40, 260 - key, 64) == rows(wanted.o, key + 40, 260 - key, 64));
        CHECK(rows(got.dq, key + 40, 260 - key, 64) == rows(wanted.dq, key + 40, 260 - key, 64));
        CHECK(std::isnan(got.o[at((key + 39) * 64)]));
      }
    });
  }
  TEST_CASE("a prompt in pieces gives the bits of the whole, wherever a piece ends") {
    const attention_trial<bf16> all({.h = 6, .h_kv = 2, .d = 48, .dv = 48, .m = 300, .n = 300});
    testing::at_every_level([&] {
      const attention_floats whole = all.dense(serial{});
      for (const auto& [from, to] : {std::pair<dim, dim>{0, 1}, {0, 130}, {1, 2}, {77, 205}, {127, 129}, {250, 251}, {299, 300}}) {
        const dim first = from, last = to;  // which a message may name
        attention_trial<bf16> piece({.h = 6, .h_kv = 2, .d = 48, .dv = 48, .m = last - first, .n = last});
        piece.q = rows(all.q, first, last - first, 6 * 48);
        piece.k = rows(all.k, 0, last, 2 * 48);
        piece.v = rows(all.v, 0, last, 2 * 48);
        piece.dout = rows(all.dout, first, last - first, 6 * 48);
        const attention_floats got = piece.dense(serial{});
        CAPTURE(first);
        CHECK(got.o == rows(whole.o, first, last - first, 6 * 48));
        CHECK(got.lse == rows(whole.lse, first, last - first, 6));
        CHECK(got.dq == rows(whole.dq, first, last - first, 6 * 48));
      }
    });
  }
  TEST_CASE("bits are equal for any number of threads, however the work is shared") {
    const attention_trial<float> one({.h = 6, .h_kv = 2, .d = 32, .dv = 32, .m = 1100, .n = 1150});
    const attention_trial<float> packed({.h = 4, .h_kv = 4, .d = 32, .dv = 32, .m = 400, .n = 400,
                                         .query_offsets = {0, 190, 191, 400}, .key_offsets = {0, 190, 191, 400}});
    for (const auto* t : {&one, &packed}) {
      const attention_floats wanted = t->dense(serial{});
      for (const int threads : {2, 3, 64}) {
        const moe::thread_pool pool(threads);
        expect_equal(t->dense(pooled(moe::pool_executor(pool))), wanted);
      }
      for (const std::uint64_t seed : {1u, 2u})
        expect_equal(t->dense(moe::cpu<moe::arch::native, testing::shuffling>(testing::shuffling{seed})), wanted);
    }
  }
  TEST_CASE("heads may lie in groups with other columns between them") {
    constexpr dim h = 4, h_kv = 2, d = 32, step = 2 * d + 5;
    const attention_trial<float> t({.h = h, .h_kv = h_kv, .d = d, .dv = d, .m = 50, .n = 50});
    std::vector<float> fused(at(50 * h_kv * step), not_a_number);
    for (dim i = 0; i < 50; ++i)
      for (dim a = 0; a < h; ++a)
        std::copy_n(t.q.begin() + (i * h + a) * d, d, fused.begin() + i * h_kv * step + a / 2 * step + a % 2 * d);
    const moe::grouped_heads<const float> q{{fused.data(), 50, d, h_kv * step}, 2, d, step};
    const moe::every_key all;
    const serial backend;
    moe::arena count;
    count_attend(backend, t.problem(), t.sizes(), all, count);
    const moe::buffer memory(moe::padded(count));
    moe::arena mem(memory.bytes());
    std::vector<float> o(at(50 * h * d));
    attend(moe::call<serial>{backend, mem, {}}, t.problem(), q, t.keys(), t.values(), all,
           [&](dim i, dim a, const float* y, float) { std::copy_n(y, d, o.begin() + (i * h + a) * d); });
    CHECK(o == t.dense(backend).o);
  }
  TEST_CASE("gradients are those of finite differences") {
    const attention_trial<float> at_rest({.h = 2, .h_kv = 1, .d = 6, .dv = 5, .m = 4, .n = 6});
    const attention_floats got = at_rest.dense(serial{});
    const auto slope = [&](auto member, std::size_t i) {
      constexpr float h = 1.f / 64;
      attention_trial<float> up = at_rest, down = at_rest;
      (up.*member)[i] += h;
      (down.*member)[i] -= h;
      const std::vector<float> a = up.dense(serial{}).o, b = down.dense(serial{}).o;
      double difference = 0;
      for (std::size_t j = 0; j < a.size(); ++j) difference += (double{a[j]} - double{b[j]}) * at_rest.dout[j];
      return difference / (double{(up.*member)[i]} - double{(down.*member)[i]});
    };
    const auto compare_all = [&](auto member, const std::vector<float>& gradient) {
      for (std::size_t i = 0; i < gradient.size(); ++i) REQUIRE(std::fabs(slope(member, i) - gradient[i]) < 1e-3);  // h^2
    };
    compare_all(&attention_trial<float>::q, got.dq);
    compare_all(&attention_trial<float>::k, got.dk);
    compare_all(&attention_trial<float>::v, got.dv);
  }
  TEST_CASE("a tile walks over the steps of keys that one of its queries sees, and over no other") {
    const auto kernels = attention_kernels_of(moe::arch::scalar{});
    const auto compare_steps = [&](dim m, dim n, attention_mask mask) {
      CAPTURE(m);
      CAPTURE(mask.window);
      const moe::attention_problem p{{2, 1, 8, 8}, mask};
      const moe::every_key selection;
      const moe::detail::attention_grid grid(p, {m, n}, selection.rows(p.heads));
      moe::arena count;
      (void)moe::detail::carve_attention_slot(kernels, p.heads, grid.rows(), count);
      const moe::buffer memory(moe::padded(count));
      moe::arena mem(memory.bytes());
      moe::detail::attention_slot s = moe::detail::carve_attention_slot(kernels, p.heads, grid.rows(), mem);
      dim steps = 0;
      for (dim unit = 0; unit < grid.size(); ++unit) {
        const moe::detail::attention_tile t = grid[unit];
        moe::detail::start_rows(p, t, s);
        std::vector<dim> walked, seen;
        selection.for_each_step(p, t, s, {}, [&](const moe::detail::step_range& r) {
          CHECK(r.keys == std::min<dim>(128, s.end[s.state.q.rows - 1] - r.key));
          walked.push_back(r.key);
        });
        for (dim step = 0; step < n; step += 128) {
          bool any = false;
          for (dim key = step; key < std::min(step + 128, n); ++key)
            for (dim i = t.first; i < t.first + t.queries; ++i) {
              const dim position = n - m + i;
              any = any || !mask.causal || (key <= position && (mask.window == 0 || key > position - mask.window));
            }
          if (any) seen.push_back(step);
        }
        CHECK(walked == seen);
        steps += static_cast<dim>(walked.size());
      }
      return steps;
    };
    // Tiles of 192 queries: of causal ones, number i of 5 sees the first (i + 1) 192 keys.
    CHECK(compare_steps(960, 960, {}) == 2 + 3 + 5 + 6 + 8);
    CHECK(compare_steps(960, 960, {.causal = false}) == 5 * 8);
    CHECK(compare_steps(960, 960, {true, 1}) == 2 + 2 + 2 + 2 + 2);
    CHECK(compare_steps(960, 960, {true, 200}) == 2 + 3 + 4 + 4 + 4);
    CHECK(compare_steps(100, 960, {}) == 8);
    CHECK(compare_steps(100, 960, {true, 150}) == 3);
    CHECK(compare_steps(960, 400, {}) == 0 + 0 + 1 + 2 + 4);  // the first 560 queries see nothing
  }
}

TEST_SUITE("backend/host_moba") {
  TEST_CASE("a tile meets each block once, with the rows that chose it, ascending, and with no other") {
    const auto kernels = attention_kernels_of(moe::arch::scalar{});
    constexpr dim k = 4, block = 16, n = 730;
    const moe::attention_problem p{{4, 2, 700, 700}};  // wide heads, low tiles
    const dim h = p.heads.heads, group = p.heads.group();
    for (const dim m : {n, dim{601}}) {  // in several tiles, none a multiple of a block
      // Of each query under each head some earlier blocks, shuffled.
      std::vector<idx> chosen(at(m * h * (k - 1)), -1);
      std::map<std::pair<dim, dim>, std::vector<dim>> rows_of;  // query head and block: queries, ascending
      dim pairs = 0;
      for (dim t = 0; t < m; ++t)
        for (dim a = 0; a < h; ++a) {
          const dim own = (n - m + t) / block;
          std::vector<std::pair<float, idx>> order;
          for (dim c = 0; c < own; ++c)
            order.emplace_back(moe::rng(1).uniform(static_cast<std::uint64_t>((t * h + a) * 64 + c)), static_cast<idx>(c));
          std::sort(order.begin(), order.end());
          for (dim j = 0; j < std::min(own, k - 1); ++j) chosen[at((t * h + a) * (k - 1) + j)] = order[at(j)].second;
          for (dim j = 0; j < std::min(own, k - 1); ++j) rows_of[{a, order[at(j)].second}].push_back(t);
          rows_of[{a, own}].push_back(t);
          pairs += std::min(k, own + 1);
        }
      moe::key_blocks selection{block, k};
      selection.chosen = {chosen.data(), m * h, k - 1};
      const moe::detail::attention_grid grid(p, {m, n}, selection.rows(p.heads));
      REQUIRE(grid.size() > p.heads.kv_heads);
      const auto carve = [&](moe::arena& mem) {
        auto slot = moe::detail::carve_attention_slot(kernels, p.heads, grid.rows(), mem);
        return std::pair(slot, selection.carve(p, {m, n}, grid.rows(), mem));
      };
      moe::arena count;
      (void)carve(count);
      const moe::buffer memory(moe::padded(count));
      moe::arena mem(memory.bytes());
      auto [slot, lists] = carve(mem);
      std::map<std::pair<dim, dim>, std::vector<dim>> met;
      dim rows = 0;
      for (dim unit = 0; unit < grid.size(); ++unit) {
        const moe::detail::attention_tile t = grid[unit];
        moe::detail::start_rows(p, t, slot);
        selection.recall(p, t, slot, lists);
        selection.for_each_step(p, t, slot, lists, [&](const moe::detail::step_range& step) {
          CHECK(step.key % block == 0);
          CHECK(step.keys == std::min(block, n - step.key));
          CHECK(std::is_sorted(step.row, step.row + step.rows, std::less_equal<>()));  // strictly
          for (dim i = 0; i < step.rows; ++i)
            met[{t.head * group + step.row[i] % group, step.key / block}].push_back(t.first + step.row[i] / group);
          rows += step.rows;
        });
      }
      for (auto& [of, queries] : met) std::sort(queries.begin(), queries.end());
      CHECK(met == rows_of);
      CHECK(rows == pairs);  // the sum of min(k, own + 1)
    }
  }
}

TEST_SUITE("backend/host_attention memory") {
  template <class Arch = moe::arch::scalar>
  std::size_t scratch_of(const moe::attention_problem& p, moe::attention_sizes n, bool backward, int threads = 1) {
    const moe::thread_pool pool(threads);
    const moe::host_backend<Arch, moe::pool_executor> backend{moe::pool_executor(pool)};
    moe::arena count;
    if (backward) count_attend_backward(backend, p, n, moe::every_key{}, count);
    else count_attend(backend, p, n, moe::every_key{}, count);
    return count.peak();
  }

  template <class Arch>
  dim columns_of(Arch arch) {
    return attention_kernels_of(arch).columns;
  }

  TEST_CASE("forward takes a tile and a step for each thread, whatever the number of tokens") {
    for (const dim d : {64, 128, 256}) {
      const moe::attention_problem p{{8, 2, d, d}};
      constexpr dim rows = 384, pitch = 128 + 16;
      const dim panel = std::max<dim>(128, d) * columns_of(moe::arch::scalar{});
      const std::size_t floats = at(rows * (2 * d + 2 + 2 * 2 + pitch) + panel), bytes = scratch_of(p, {512, 4096}, false);
      CHECK(bytes >= 4 * floats);
      CHECK(bytes <= 4 * floats + 4096);  // what is lost between tensors
      for (const dim n : {1, 1000, 100000, 10000000}) CHECK(scratch_of(p, {n, n}, false) == bytes);
      CHECK(scratch_of(p, {512, 4096}, false, 3) == 3 * bytes);
      testing::at_every_level([&] {  // a level may want wider panels, and blocks in an order of its own, too
        const std::size_t here = scratch_of<moe::arch::native>(p, {512, 4096}, false);
        const dim wider = std::max<dim>(128, d) * columns_of(moe::arch::native{}) - panel;
        CHECK(here <= bytes + 4 * at(wider) + 2 * at(rows * (d + 128) + 128 * 2 * d + 32 * d));
        CHECK(scratch_of<moe::arch::native>(p, {10000000, 10000000}, false) == here);
      });
    }
  }
  TEST_CASE("backward takes the gradients of keys and values, and a tile for each thread") {
    const moe::attention_problem p{{8, 2, 64, 128}};
    const auto bytes = [&](dim n) { return scratch_of(p, {n, n}, true); };
    constexpr std::size_t key = 2 * (64 + 128) * sizeof(float);  // of both key heads
    CHECK(bytes(512) - bytes(256) == 256 * key);
    CHECK(bytes(32768) - bytes(16384) == 16384 * 8 * key);       // eight parts of the queries
    CHECK(bytes(1 << 22) - bytes(1 << 21) == (std::size_t{1} << 21) * 8 * key);
    const std::size_t tile = bytes(256) - 256 * key;
    constexpr dim rows = 192, pitch = 128 + 16;
    const std::size_t floats = at(rows * (64 + 128 + 2 + 2 * 2 + pitch) + 128 * columns_of(moe::arch::scalar{}) +  // as forward
                                  rows * 64 + rows * pitch + rows * 128 + 128 * 128);
    CHECK(tile >= 4 * floats);
    CHECK(tile <= 4 * floats + 8192);
  }
  TEST_CASE("at every level backward takes a tile of floats for each thread, and on tiles one of halves") {
    const moe::attention_problem p{{8, 2, 64, 128}};
    constexpr dim rows = 192, step = 128, pitch = step + 16, d = 64, dv = 128, keys = 256;
    testing::at_every_level([&] {
      const dim columns = columns_of(moe::arch::native{}), d_padded = (d + columns - 1) / columns * columns;
      const std::size_t sums = 2 * keys * at(d_padded + dv) * 4;
      const std::size_t tile = scratch_of<moe::arch::native>(p, {keys, keys}, true) - sums;
      const std::size_t floats = at(rows * (d + dv + 2 + 2 * 2 + pitch) + step * columns + rows * d_padded + rows * pitch +
                                    rows * dv + step * 128);
      const bool halves = attention_kernels_of(moe::arch::native{}).backward_halves != nullptr;
      const std::size_t rounded = at(rows * (d + step + dv + d + dv) + 32 * dv + step * (d + dv + d) + 2 * step * rows);
      const std::size_t blocks = halves ? 2 * rounded : 0;
      CHECK(tile >= 4 * floats + blocks);
      CHECK(tile <= 4 * floats + blocks + 8192);
      CHECK(scratch_of<moe::arch::native>(p, {keys, keys}, true, 3) == sums + 3 * tile);
    });
  }
}

TEST_SUITE("attention/problem") {
  void expect_error(const moe::attention_problem& p, moe::attention_sizes n, const char* message) {
    CHECK_THROWS_WITH_AS(p.check(n), message, moe::shape_error);
  }
  TEST_CASE("what does not fit is named, with what came and what was wanted") {
    const moe::attention_heads heads{4, 2, 32, 32};
    CHECK_NOTHROW(moe::attention_problem{heads}.check({3, 5}));
    CHECK_NOTHROW(moe::attention_problem{heads}.check({5, 3}));
    expect_error({{5, 2, 32, 32}}, {3, 5}, "attention: heads is 5, expected a multiple of 2 (kv_heads)");
    expect_error({{4, 0, 32, 32}}, {3, 5}, "attention: kv_heads is 0, expected at least 1");
    expect_error({{4, 2, 0, 32}}, {3, 5}, "attention: d is 0, expected at least 1");
    expect_error({{4, 2, 32, -1}}, {3, 5}, "attention: dv is -1, expected at least 1");
    expect_error({heads, {true, -1}}, {3, 5}, "attention: mask.window is -1, expected at least 0");
    expect_error({heads, {false, 4}}, {3, 5}, "attention: mask.window is 4, expected 0 where mask.causal is false");
    const std::vector<idx> falls{0, 4, 2, 5}, starts{1, 5}, ends{0, 4}, one{0}, both{0, 2, 5}, whole{0, 5};
    const auto queries = [&](const std::vector<idx>& o) { return moe::attention_problem{heads, {}, {o, {}}, {whole, {}}}; };
    const auto keys = [&](const std::vector<idx>& o) { return moe::attention_problem{heads, {}, {whole, {}}, {o, {}}}; };
    expect_error(queries(falls), {5, 5}, "attention: query_sequences: offsets fall from 4 to 2, expected to ascend from 0 to 5 (T)");
    expect_error(keys(starts), {5, 5}, "attention: key_sequences: offsets start at 1, expected to ascend from 0 to 5 (T)");
    expect_error(keys(ends), {5, 5}, "attention: key_sequences: offsets end at 4, expected to ascend from 0 to 5 (T)");
    expect_error(queries(one), {5, 5}, "attention: query_sequences: offsets hold one number, expected to ascend from 0 to 5 (T)");
    expect_error(keys(both), {5, 5}, "attention: key_sequences has 3 offsets, expected 2 (as query_sequences)");
    expect_error({heads, {}, {whole, {}}, {}}, {5, 5}, "attention: key_sequences has 0 offsets, expected 2 (as query_sequences)");
  }
}
