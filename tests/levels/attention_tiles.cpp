// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <limits>

#include "moe/backend/cpu.hpp"
#include "support/attention_checks.hpp"
#include "support/chosen_blocks.hpp"
#include "support/emulated_tiles.hpp"
#include "support/executors.hpp"
#include "support/levels.hpp"

#if defined(MOE_X86)

namespace moe::arch {

/// The level with tiles, its tile instructions in plain C++.
struct tiles_by_hand : native {};
inline attention_kernels attention_kernels_of(tiles_by_hand) noexcept {
  return detail::attention_on_tiles<moe::detail::build_level, testing::emulated_tiles>();
}

}  // namespace moe::arch

namespace {

using moe::dim;
using testing::expect_equal;
using on_tiles = moe::cpu<moe::arch::tiles_by_hand, moe::serial>;

/// AVX-512 prepares tiles.
bool has_512() { return moe::includes(testing::highest_level(), moe::cpu_level::avx512); }

double largest_of(const std::vector<double>& v) {
  double largest = 0;
  for (const double x : v)
    if (!(largest >= std::fabs(x)) && largest == largest) largest = std::fabs(x);  // NaN stays
  return largest;
}
/// Weights of values are rounded to halves: off by 2^-9 where the largest is 1, so a result by at most 2^-9 of the largest
/// value; in blocks by 2^-8, since weights may be relative to another score than the largest.
double bound(const std::vector<double>& v, bool blocks) { return largest_of(v) / (blocks ? 256 : 512) + 1e-5; }
template <class Numbers>
void check(const testing::attention_floats& got, const Numbers& wanted, const std::vector<moe::bf16>& v, bool blocks = true) {
  std::vector<double> values(v.size());
  for (std::size_t i = 0; i < v.size(); ++i) values[i] = static_cast<double>(static_cast<float>(v[i]));
  std::vector<double> off(wanted.o.begin(), wanted.o.end());
  for (std::size_t i = 0; i < off.size(); ++i) off[i] -= static_cast<double>(got.o[i]);
  CHECK(largest_of(off) < bound(values, blocks));
  for (std::size_t i = 0; i < got.lse.size(); ++i) {
    if (std::isinf(wanted.lse[i]))
      CHECK(got.lse[i] == wanted.lse[i]);
    else
      CHECK(std::fabs(double{got.lse[i]} - wanted.lse[i]) < 1e-5 * (1 + std::fabs(wanted.lse[i])));
  }
}
double size(const std::vector<double>& v) {
  double squares = 0;
  for (const double x : v) squares += x * x;
  return std::sqrt(squares);
}
double distance(const std::vector<float>& a, std::vector<double> b) {
  for (std::size_t i = 0; i < b.size(); ++i) b[i] -= static_cast<double>(a[i]);
  return size(b);
}
/// Two factors of the terms of a gradient are rounded to halves, the gradient of the output and the weight or slope: off by
/// 2^-9 each at most, and neither always up nor always down, so that over the whole of it what is off is below 2^-8 of its
/// size, and no element is off by more than four times as much of the largest. Where a query sees one key the terms cancel,
/// all but what float32 rounds: hence the floor.
template <class Numbers>
void check_gradients(const testing::attention_floats& got, const Numbers& wanted) {
  const auto compare = [](std::string what, const std::vector<float>& gradient, const auto& numbers) {
    CAPTURE(what);
    constexpr double floor = 1e-5;
    const std::vector<double> exact(numbers.begin(), numbers.end());
    CHECK(distance(gradient, exact) < size(exact) / 256 + floor);
    CHECK(reference::worst_difference(gradient, exact) < largest_of(exact) / 64 + floor);
  };
  compare("dq", got.dq, wanted.dq);
  compare("dk", got.dk, wanted.dk);
  compare("dv", got.dv, wanted.dv);
}
/// f(backend) on tiles in plain C++, and on those of the machine, or what it has instead.
template <class F>
void for_both_tiles(F f) {
  for (const bool machine : {false, true}) {
    CAPTURE(machine);
    if (machine)
      f(moe::cpu<>{});
    else
      f(on_tiles{});
  }
}
reference::attention_shape sizes(dim m, dim n, dim h, dim h_kv, dim d, dim dv) {
  reference::attention_shape s;
  s.m = m;
  s.n = n;
  s.h = h;
  s.h_kv = h_kv;
  s.d = d;
  s.dv = dv;
  return s;
}

}  // namespace

TEST_SUITE("cpu/attention_amx" * doctest::skip(!has_512())) {
  TEST_CASE("attention over halves on tiles equals the formulas in double within the rounding of its weights") {
    testing::emulated_tiles::faults = 0;
    for (const auto& s : {sizes(70, 90, 4, 2, 40, 24), sizes(300, 300, 3, 1, 64, 64), sizes(17, 300, 2, 2, 128, 128),
                          sizes(120, 100, 4, 1, 32, 80), sizes(1, 1, 1, 1, 8, 8), sizes(40, 50, 2, 1, 256, 256)}) {
      CAPTURE(s.m);
      for (const moe::attention_mask mask : {moe::attention_mask{}, {true, 33}, {false, 0}}) {
        const testing::attention_trial<moe::bf16> trial(s, mask);
        const auto got = trial.dense(on_tiles{});
        const auto wanted = trial.by_definition();
        check(got, wanted, trial.v, false);
        check_gradients(got, wanted);
      }
    }
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("gradients on tiles of queries that see few keys: nothing for one, within 2^-7 of their size for two or three") {
    for (const moe::dim n : {1, 2, 3}) {
      const testing::attention_trial<moe::bf16> trial(sizes(n, n, 4, 1, 256, 256));
      const auto wanted = trial.by_definition();
      for_both_tiles([&](const auto& backend) {
        const auto got = trial.dense(backend);
        CAPTURE(n);
        CHECK(distance(got.dq, wanted.dq) <= size(wanted.dq) / 128 + 1e-5);
        CHECK(distance(got.dk, wanted.dk) <= size(wanted.dk) / 128 + 1e-5);
        CHECK(distance(got.dv, wanted.dv) <= size(wanted.dv) / 256);
      });
    }
  }
  TEST_CASE("packed sequences on tiles do not see one another, nor does what follows depend on what was there before") {
    auto s = sizes(170, 330, 4, 2, 32, 40);
    s.query_offsets = {0, 3, 3, 140, 150, 170};
    s.key_offsets = {0, 200, 205, 310, 310, 330};
    const testing::attention_trial<moe::bf16> trial(s, {true, 70});
    const auto got = trial.dense(on_tiles{});
    check(got, trial.by_definition(), trial.v, false);
    check_gradients(got, trial.by_definition());
    expect_equal(trial.dense(on_tiles{}), got);
  }
  TEST_CASE("bits on tiles do not depend on who takes which part of the work") {
    using shuffled = moe::cpu<moe::arch::tiles_by_hand, testing::shuffling>;
    const testing::attention_trial<moe::bf16> trial(sizes(1040, 1040, 2, 2, 32, 32));
    const auto dense = trial.dense(on_tiles{}), chosen = trial.blocks(on_tiles{}, 64, 3);
    for (const std::uint64_t seed : {1u, 2u}) {
      expect_equal(trial.dense(shuffled(testing::shuffling{seed})), dense);
      expect_equal(trial.blocks(shuffled(testing::shuffling{seed}), 64, 3), chosen);
    }
  }
  TEST_CASE("blocks of keys on tiles are those of floats, within the same rounding") {
    testing::emulated_tiles::faults = 0;
    const testing::attention_trial<moe::bf16> trial(sizes(300, 350, 4, 2, 48, 64));
    std::vector<moe::idx> chosen, wanted;
    const auto got = trial.blocks(on_tiles{}, 16, 3, &chosen), floats = trial.blocks(moe::cpu<>{}, 16, 3, &wanted);
    CHECK(chosen == wanted);
    double worst = 0, largest = 0;
    for (std::size_t i = 0; i < got.o.size(); ++i)
      worst = std::max(worst, std::fabs(double{got.o[i]} - double{floats.o[i]}));
    for (const moe::bf16 v : trial.v) largest = std::max(largest, std::fabs(double{static_cast<float>(v)}));
    CHECK(worst < largest / 512);
    check_gradients(got, floats);
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("weights of blocks on tiles keep their range where scores are large, whatever else is in a tile") {
    testing::emulated_tiles::faults = 0;
    testing::attention_trial<moe::bf16> trial(sizes(150, 200, 2, 1, 64, 64));
    for (std::size_t i = 0; i < trial.q.size(); ++i)  // scores of some hundreds, of either sign
      trial.q[i] = moe::bf16(static_cast<float>(trial.q[i]) * (i / 64 % 3 == 0 ? 40.f : 1.f));
    for_both_tiles([&](const auto& backend) {
      std::vector<moe::idx> chosen, wanted;
      const auto got = trial.blocks(backend, 32, 4, &chosen), floats = trial.blocks(moe::scalar<>{}, 32, 4, &wanted);
      CHECK(chosen == wanted);
      check(got, floats, trial.v);
      const auto alone = testing::attention_trial<moe::bf16>(sizes(150, 200, 2, 1, 64, 64)).blocks(backend, 32, 4);
      for (std::size_t i = 0; i < got.lse.size(); ++i)
        if (i % 3 != 0) CHECK(got.lse[i] == alone.lse[i]);
    });
    CHECK(testing::emulated_tiles::faults == 0);
  }
  // Many heads and long rows make tiles of few queries, so that keys and values are packed once for all of them.
  TEST_CASE("blocks on tiles are those of floats, packed for all tiles or by the one that meets them") {
    testing::emulated_tiles::faults = 0;
    struct trial {
      reference::attention_shape shape;
      dim block, k;
    };
    // Packed for all; in steps; more blocks than are ranked at once, and as many choices; more than that.
    for (const auto& [shape, block, k] :
         {trial{sizes(170, 180, 16, 1, 256, 256), 32, 3}, trial{sizes(330, 330, 16, 1, 256, 256), 160, 2},
          trial{sizes(420, 420, 2, 1, 32, 32), 3, 9}, trial{sizes(400, 410, 2, 2, 32, 48), 32, 10}}) {
      CAPTURE(shape.m);
      const testing::attention_trial<moe::bf16> trial(shape);
      std::vector<moe::idx> chosen, wanted;
      const auto got = trial.blocks(on_tiles{}, block, k, &chosen), floats = trial.blocks(moe::cpu<>{}, block, k, &wanted);
      CHECK(chosen == wanted);
      check(got, floats, trial.v);
      check_gradients(got, floats);
    }
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("blocks on tiles are those of the definition, forward and backward, whatever their size and number") {
    testing::emulated_tiles::faults = 0;
    struct trial {
      reference::attention_shape shape;
      dim block, k;
    };
    auto sequences = sizes(90, 110, 4, 2, 32, 40);
    sequences.query_offsets = {0, 3, 3, 60, 70, 90};
    sequences.key_offsets = {0, 20, 25, 70, 80, 110};
    // Queries that see no key; one block; as many as there are; fewer keys than a block; packed for all; little or nothing.
    for (const auto& [shape, block, k] :
         {trial{sizes(180, 60, 2, 1, 32, 32), 16, 3}, trial{sizes(100, 100, 4, 2, 32, 40), 40, 1},
          trial{sizes(100, 100, 4, 2, 32, 40), 32, 1}, trial{sizes(100, 100, 4, 2, 32, 40), 29, 20},
          trial{sizes(50, 50, 2, 1, 32, 32), 64, 2}, trial{sizes(34, 66, 64, 1, 256, 256), 32, 2}, trial{sequences, 16, 2},
          trial{sizes(5, 3, 16, 1, 64, 64), 32, 2}, trial{sizes(0, 20, 2, 1, 32, 32), 10, 4}}) {
      CAPTURE(shape.m);
      CAPTURE(block);
      CAPTURE(k);
      const testing::attention_trial<moe::bf16> trial(shape);
      const auto chosen = reference::block_matrix(shape, block, k, trial.q, trial.k);
      REQUIRE(chosen.gap > 3e-6);
      const auto wanted = trial.by_definition(chosen.seen);
      for_both_tiles([&](const auto& backend) {
        const auto got = trial.blocks(backend, block, k);
        check(got, wanted, trial.v);
        check_gradients(got, wanted);
      });
    }
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("what is in blocks on tiles that nobody chose changes nothing, and has no gradients") {
    constexpr dim n = 150, block = 15, cols = 2 * 32;
    testing::attention_trial<moe::bf16> trial(sizes(20, n, 4, 2, 32, 32));  // queries stand in blocks 8 and 9
    const auto chosen = [](dim key) { return key / block == 3 || key / block == 6 || key / block >= 8; };
    for (dim i = 0; i < 20 * 4; ++i) trial.q[static_cast<std::size_t>(i * 32)] = moe::bf16(1.f);
    for (dim i = 0; i < n * 2; ++i)
      for (dim x = 0; x < 32; ++x) {
        moe::bf16& element = trial.k[static_cast<std::size_t>(i * 32 + x)];
        element = moe::bf16(x > 0 ? 0.01f * static_cast<float>(element) : chosen(i / 2) ? 8.f : -8.f);
      }
    auto other = trial;
    for (dim key = 0; key < n; ++key)
      if (!chosen(key))
        for (dim x = 0; x < cols; ++x) {
          moe::bf16& element = other.k[static_cast<std::size_t>(key * cols + x)];
          element = moe::bf16(static_cast<float>(element) - 0.5f);
          other.v[static_cast<std::size_t>(key * cols + x)] = moe::bf16(std::numeric_limits<float>::quiet_NaN());
        }
    for_both_tiles([&](const auto& backend) {
      const auto got = trial.blocks(backend, block, 3);
      expect_equal(other.blocks(backend, block, 3), got);
      for (dim key = 0; key < n; ++key) {
        const auto zeros = [&](const std::vector<float>& g) {
          return std::count(g.begin() + key * cols, g.begin() + (key + 1) * cols, 0.f);
        };
        CHECK((zeros(got.dk) == cols) == !chosen(key));
        CHECK((zeros(got.dv) == cols) == !chosen(key));
      }
    });
  }
  TEST_CASE("of blocks on tiles that score the same the lower ones are chosen") {
    constexpr dim n = 270, block = 2, d = 32;  // more blocks than are ranked at once
    testing::attention_trial<moe::bf16> same(sizes(n, n, 2, 1, d, d)), stairs = same;
    for (dim j = 0; j < n; ++j) std::copy_n(same.k.begin(), d, same.k.begin() + j * d);
    std::fill(stairs.q.begin(), stairs.q.end(), moe::bf16(0.f));
    std::fill(stairs.k.begin(), stairs.k.end(), moe::bf16(0.f));
    for (dim i = 0; i < n * 2; ++i) stairs.q[static_cast<std::size_t>(i * d)] = moe::bf16(1.f);
    for (dim j = 0; j < n; ++j)
      stairs.k[static_cast<std::size_t>(j * d)] = moe::bf16(static_cast<float>(j / block / 3));  // three of a kind
    for (const dim k : {2, 3, 6, 9, 10, 14})
      for (const auto* t : {&same, &stairs}) {
        CAPTURE(k);
        for_both_tiles([&](const auto& backend) {
          std::vector<moe::idx> chosen;
          (void)t->blocks(backend, block, k, &chosen);
          CHECK(testing::wrong_choices(*t, block, k, chosen) == 0);
        });
      }
  }
  TEST_CASE("a block on tiles whose score is NaN or -inf is not chosen, where a query may have all or must choose") {
    constexpr float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    for (const float strange : {1.f, nan, -infinity, infinity})
      for (const dim k : {4, 12}) {
        CAPTURE(strange);
        CAPTURE(k);
        const auto t = testing::with_strange_block<moe::bf16>(sizes(140, 140, 2, 1, 40, 32), strange);
        auto early = t;  // that query where it may have all
        std::copy_n(t.q.begin() + 138 * 80, 80, early.q.begin() + 35 * 80);
        for_both_tiles([&](const auto& backend) {
          std::vector<moe::idx> chosen;
          const auto got = t.blocks(backend, 10, k, &chosen);
          CHECK(testing::wrong_choices(t, 10, k, chosen) == 0);
          if (strange != infinity)
            CHECK(std::all_of(got.o.begin() + 10 * 64, got.o.begin() + 138 * 64, [](float x) { return std::isfinite(x); }));
          if (strange != 1) return;
          (void)early.blocks(backend, 10, k, &chosen);
          CHECK(testing::wrong_choices(early, 10, k, chosen) == 0);
        });
      }
  }
  TEST_CASE("packed keys and values take 2 (d + dv) bytes for each key and key head, and one for each 32 keys") {
    const moe::attention_problem p{{8, 2, 64, 64}};
    const auto bytes = [&](dim n) {
      moe::arena mem;
      count_attend(on_tiles{}, p, {n, n}, moe::key_blocks{128, 8}, mem);
      return mem.peak();
    };
    constexpr std::size_t n = 1 << 19, one_number_a_block = n / 128 * sizeof(moe::idx);
    CHECK(bytes(2 * n) - bytes(n) == one_number_a_block + n * 2 * (2 * 128) + n / 32 * 2);
  }
  TEST_CASE("packed sequences in blocks on tiles do not see one another") {
    auto s = sizes(180, 210, 64, 1, 256, 256);
    s.query_offsets = {0, 3, 3, 90, 100, 180};
    s.key_offsets = {0, 20, 25, 112, 130, 210};
    const testing::attention_trial<moe::bf16> trial(s);
    const auto got = trial.blocks(on_tiles{}, 32, 2), floats = trial.blocks(moe::cpu<>{}, 32, 2);
    check(got, floats, trial.v);
    check_gradients(got, floats);
  }
  TEST_CASE("a value in a block that is not finite reaches the queries that meet it, and no other") {
    constexpr dim n = 170, h = 16, dv = 256, block = 32;
    const testing::attention_trial<moe::bf16> trial(sizes(n, n, h, 1, 256, dv));
    std::vector<moe::idx> chosen;
    const auto before = trial.blocks(on_tiles{}, block, 3, &chosen);
    for (const dim key : {40, 165}) {  // in a whole block, which is packed before; in the last one
      testing::attention_trial<moe::bf16> later = trial;
      later.v[static_cast<std::size_t>(key * dv + 5)] = moe::bf16(std::numeric_limits<float>::infinity());
      const auto after = later.blocks(on_tiles{}, block, 3);
      dim wrong = 0;
      for (dim row = 0; row < n * h; ++row) {
        const auto* earlier = chosen.data() + row * 2;
        const dim own = row / h / block;
        const bool meets = earlier[0] == key / block || earlier[1] == key / block || (own == key / block && row / h >= key);
        for (dim j = 0; j < dv; ++j) {
          const auto i = static_cast<std::size_t>(row * dv + j);
          wrong += meets && j == 5 ? std::isfinite(after.o[i]) : after.o[i] != before.o[i];
        }
      }
      CHECK(wrong == 0);
    }
  }
  TEST_CASE("with blocks on tiles a later key or value changes no bit, be it a number or not") {
    constexpr dim n = 300, h = 4, d = 32;  // three tiles of rows, so that whole steps of 32 keys are packed beforehand
    constexpr float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const testing::attention_trial<moe::bf16> before(sizes(n, n, h, 1, d, d));
    const auto first = [](const std::vector<float>& v, dim count) { return testing::rows(v, 0, count, 1); };
    for_both_tiles([&](const auto& backend) {
      for (const dim block : {24, 32}) {
        const auto wanted = before.blocks(backend, block, 3);
        for (const dim later : {5, 100, 289})
          for (const float to : {9.f, nan, infinity}) {
            testing::attention_trial<moe::bf16> t = before;
            for (dim j = 0; j < d; ++j) t.k[static_cast<std::size_t>(later * d + j)] = moe::bf16(to);
            for (dim j = 0; j < d; ++j) t.v[static_cast<std::size_t>(later * d + j)] = moe::bf16(to);
            const auto got = t.blocks(backend, block, 3);
            CAPTURE(block);
            CAPTURE(later);
            CAPTURE(to);
            CHECK(first(got.o, later * h * d) == first(wanted.o, later * h * d));
            CHECK(first(got.lse, later * h) == first(wanted.lse, later * h));
            CHECK(first(got.dq, later * h * d) == first(wanted.dq, later * h * d));
            CHECK(first(got.o, (later + 1) * h * d) != first(wanted.o, (later + 1) * h * d));
          }
      }
    });
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("a prompt in pieces gives the bits of the whole, wherever a piece ends") {
    const testing::attention_trial<moe::bf16> all(sizes(200, 200, 2, 1, 40, 32));
    const auto whole = all.dense(on_tiles{}), chosen = all.blocks(on_tiles{}, 24, 3),
               chosen_32 = all.blocks(on_tiles{}, 32, 3);
    for (const dim last : {1, 33, 130, 200}) {
      const dim first = last > 40 ? last - 40 : 0;
      testing::attention_trial<moe::bf16> piece(sizes(last - first, last, 2, 1, 40, 32));
      piece.q.assign(all.q.begin() + first * 80, all.q.begin() + last * 80);
      piece.k.assign(all.k.begin(), all.k.begin() + last * 40);
      piece.v.assign(all.v.begin(), all.v.begin() + last * 32);
      piece.dout.assign(all.dout.begin() + first * 64, all.dout.begin() + last * 64);
      CAPTURE(last);
      const auto got = piece.dense(on_tiles{}), some = piece.blocks(on_tiles{}, 24, 3), whole_steps = piece.blocks(on_tiles{}, 32, 3);
      CHECK(std::equal(whole_steps.o.begin(), whole_steps.o.end(), chosen_32.o.begin() + first * 64));
      CHECK(std::equal(got.o.begin(), got.o.end(), whole.o.begin() + first * 64));
      CHECK(std::equal(some.o.begin(), some.o.end(), chosen.o.begin() + first * 64));
      CHECK(std::equal(got.dq.begin(), got.dq.end(), whole.dq.begin() + first * 80));
      CHECK(std::equal(some.dq.begin(), some.dq.end(), chosen.dq.begin() + first * 80));
    }
  }
  TEST_CASE("a value that is not finite reaches the queries that see it, and no other") {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const testing::attention_trial<moe::bf16> trial(sizes(150, 150, 1, 1, 32, 32));
    const auto before = trial.dense(on_tiles{});
    for (const bool key : {false, true})
      for (const float strange : {7.f, infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
        testing::attention_trial<moe::bf16> later = trial;
        (key ? later.k : later.v)[60 * 32 + 5] = moe::bf16(strange);
        const auto after = later.dense(on_tiles{});
        CAPTURE(strange);
        for (std::size_t i = 0; i < 60 * 32; ++i) {
          CHECK(after.o[i] == before.o[i]);
          CHECK(after.dq[i] == before.dq[i]);
        }
        if (strange != 7) CHECK(std::isnan(after.dq[100 * 32 + 5]));
        if (key) continue;
        for (std::size_t t = 60; t < 150; ++t)
          for (std::size_t j = 0; j < 32; ++j) {
            if (j != 5)
              CHECK(after.o[t * 32 + j] == before.o[t * 32 + j]);
            else
              CHECK(std::isfinite(after.o[t * 32 + j]) == (strange == 7));
          }
      }
  }
  TEST_CASE("a query or gradient that is not finite reaches the keys that it sees, and no other") {
    const testing::attention_trial<moe::bf16> trial(sizes(150, 150, 1, 1, 32, 32));
    const auto before = trial.dense(on_tiles{});
    for (const bool query : {false, true}) {
      testing::attention_trial<moe::bf16> other = trial;
      constexpr float strange = std::numeric_limits<float>::quiet_NaN();
      if (query)
        other.q[60 * 32 + 5] = moe::bf16(strange);
      else
        other.dout[60 * 32 + 5] = strange;
      const auto after = other.dense(on_tiles{});
      for (std::size_t i = 0; i < 150 * 32; ++i) {
        const bool sees = i < 61 * 32;
        CAPTURE(i);
        if (!sees)
          CHECK(after.dk[i] == before.dk[i]);
        else
          CHECK(std::isnan(after.dk[i]));
        if (!sees || (!query && i % 32 != 5))
          CHECK(after.dv[i] == before.dv[i]);
        else
          CHECK(std::isnan(after.dv[i]));
      }
    }
  }
}

#endif
