// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/backend/cpu.hpp"
#include "support/attention_trial.hpp"
#include "support/emulated_tiles.hpp"

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
using on_tiles = moe::cpu<moe::arch::tiles_by_hand, moe::serial>;

bool has_512() { return moe::includes(moe::report_cpu_level().machine, moe::cpu_level::avx512); }

/// Weights of values are rounded to halves: off by 2^-9 of each, so a result by at most 2^-9 of the largest value.
double bound(const std::vector<double>& v) {
  double largest = 0;
  for (const double x : v) largest = std::max(largest, std::fabs(x));
  return largest / 512 + 1e-5;
}
template <class Numbers>
void check(const testing::attention_floats& got, const Numbers& wanted, const std::vector<moe::bf16>& v) {
  std::vector<double> values(v.size());
  for (std::size_t i = 0; i < v.size(); ++i) values[i] = static_cast<double>(static_cast<float>(v[i]));
  const double allowed = bound(values);
  for (std::size_t i = 0; i < got.o.size(); ++i) CHECK(std::fabs(double{got.o[i]} - wanted.o[i]) < allowed);
  for (std::size_t i = 0; i < got.lse.size(); ++i) {
    if (std::isinf(wanted.lse[i])) CHECK(got.lse[i] == wanted.lse[i]);
    else CHECK(std::fabs(double{got.lse[i]} - wanted.lse[i]) < 1e-5 * (1 + std::fabs(wanted.lse[i])));
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

TEST_SUITE("cpu/attention_amx") {
  TEST_CASE("attention over halves on tiles equals the formulas in double within the rounding of its weights") {
    if (!has_512()) {
      MESSAGE("skipped: this machine lacks AVX-512, which prepares tiles");
      return;
    }
    testing::emulated_tiles::faults = 0;
    for (const auto& s : {sizes(70, 90, 4, 2, 40, 24), sizes(300, 300, 3, 1, 64, 64), sizes(17, 300, 2, 2, 128, 128),
                          sizes(120, 100, 4, 1, 32, 80), sizes(1, 1, 1, 1, 8, 8)}) {
      CAPTURE(s.m);
      for (const moe::attention_mask mask : {moe::attention_mask{}, {true, 33}, {false, 0}}) {
        const testing::attention_trial<moe::bf16> trial(s, mask);
        check(trial.dense(on_tiles{}), trial.by_definition(), trial.v);
      }
    }
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("blocks of keys on tiles are those of floats, within the same rounding") {
    if (!has_512()) {
      MESSAGE("skipped: this machine lacks AVX-512, which prepares tiles");
      return;
    }
    testing::emulated_tiles::faults = 0;
    const testing::attention_trial<moe::bf16> trial(sizes(300, 350, 4, 2, 48, 64));
    std::vector<moe::idx> chosen, wanted;
    const auto got = trial.blocks(on_tiles{}, 16, 3, &chosen), floats = trial.blocks(moe::cpu<>{}, 16, 3, &wanted);
    CHECK(chosen == wanted);
    double worst = 0, largest = 0;
    for (std::size_t i = 0; i < got.o.size(); ++i) worst = std::max(worst, std::fabs(double{got.o[i]} - double{floats.o[i]}));
    for (const moe::bf16 v : trial.v) largest = std::max(largest, std::fabs(double{static_cast<float>(v)}));
    CHECK(worst < largest / 512);
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("a prompt in pieces gives the bits of the whole, wherever a piece ends") {
    if (!has_512()) {
      MESSAGE("skipped: this machine lacks AVX-512, which prepares tiles");
      return;
    }
    const testing::attention_trial<moe::bf16> all(sizes(200, 200, 2, 1, 40, 32));
    const auto whole = all.dense(on_tiles{}), chosen = all.blocks(on_tiles{}, 24, 3);
    for (const dim last : {1, 33, 130, 200}) {
      const dim first = last > 40 ? last - 40 : 0;
      testing::attention_trial<moe::bf16> piece(sizes(last - first, last, 2, 1, 40, 32));
      piece.q.assign(all.q.begin() + first * 80, all.q.begin() + last * 80);
      piece.k.assign(all.k.begin(), all.k.begin() + last * 40);
      piece.v.assign(all.v.begin(), all.v.begin() + last * 32);
      CAPTURE(last);
      const std::vector<float> got = piece.dense(on_tiles{}).o, some = piece.blocks(on_tiles{}, 24, 3).o;
      CHECK(std::equal(got.begin(), got.end(), whole.o.begin() + first * 64));
      CHECK(std::equal(some.begin(), some.end(), chosen.o.begin() + first * 64));
    }
  }
  TEST_CASE("a value that is not finite reaches the queries that see it, and no other") {
    if (!has_512()) {
      MESSAGE("skipped: this machine lacks AVX-512, which prepares tiles");
      return;
    }
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const testing::attention_trial<moe::bf16> trial(sizes(150, 150, 1, 1, 32, 32));
    const auto before = trial.dense(on_tiles{});
    for (const bool key : {false, true})
      for (const float strange : {7.f, infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
        testing::attention_trial<moe::bf16> later = trial;
        (key ? later.k : later.v)[60 * 32 + 5] = moe::bf16(strange);
        const auto after = later.dense(on_tiles{});
        CAPTURE(strange);
        for (std::size_t i = 0; i < 60 * 32; ++i) CHECK(after.o[i] == before.o[i]);
        if (key) continue;
        for (std::size_t t = 60; t < 150; ++t)
          for (std::size_t j = 0; j < 32; ++j) {
            if (j != 5) CHECK(after.o[t * 32 + j] == before.o[t * 32 + j]);
            else CHECK(std::isfinite(after.o[t * 32 + j]) == (strange == 7));
          }
      }
  }
}

#endif
