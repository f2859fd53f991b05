// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <vector>

#include "moe/attention/signal_to_noise.hpp"
#include "moe/core/rng.hpp"

namespace {

using moe::dim;

/// How often, in `trials` draws, the mean of B random unit keys beats that of a block in which one key has `gap` more
/// affinity to the query and m - 1 others `related_gap`.
double simulated_failures(const moe::key_affinity& a, dim d, dim B, int trials, std::uint64_t seed) {
  const moe::rng random(seed);
  std::uint64_t drawn = 0;
  std::vector<double> key(static_cast<std::size_t>(d));
  // The affinity of a unit vector of any direction to a query of length one: its first coordinate.
  const auto affinity = [&] {
    double square = 0;
    for (double& v : key) {
      v = random.normal(drawn++);
      square += v * v;
    }
    return key[0] / std::sqrt(square);
  };
  int failures = 0;
  for (int i = 0; i < trials; ++i) {
    double lead = a.effective();
    for (dim j = 0; j < B; ++j) lead += affinity() - affinity();
    failures += lead < 0;
  }
  return static_cast<double>(failures) / trials;
}

}  // namespace

TEST_SUITE("attention/signal_to_noise") {
  TEST_CASE("a random block outranks the right one as often as the model says") {
    struct {
      moe::key_affinity a;
      dim d, B;
    } const cases[] = {
        {{.gap = 0.5}, 16, 8}, {{.gap = 1}, 16, 16}, {{.gap = 0.4, .related = 3, .related_gap = 0.3}, 32, 32}};
    constexpr int trials = 4000;
    for (const auto& c : cases) {
      const double p = moe::probability_outranked(moe::signal_to_noise(c.a, c.d, c.B));
      const double deviation = std::sqrt(p * (1 - p) / trials);
      CHECK(std::fabs(simulated_failures(c.a, c.d, c.B, trials, 5) - p) < 4 * deviation);
      CHECK(p > 0.05);  // frequent enough to be counted
      CHECK(p < 0.45);
    }
  }
  TEST_CASE("the signal is that of the formula, and half a block is worth a factor of sqrt 2") {
    const moe::key_affinity a{.gap = 0.8, .related = 4, .related_gap = 0.1};
    CHECK(a.effective() == doctest::Approx(1.1));
    CHECK(moe::signal_to_noise(a, 64, 512) == doctest::Approx(1.1 * std::sqrt(64.0 / 1024)));
    CHECK(moe::signal_to_noise(a, 64, 256) / moe::signal_to_noise(a, 64, 512) == doctest::Approx(std::sqrt(2.0)));
    CHECK(moe::probability_outranked(0) == 0.5);
    CHECK(moe::probability_outranked(1.6448536269514722) == doctest::Approx(0.05));
  }
  TEST_CASE("keeping every block needs no signal, keeping half of them none but a positive one") {
    CHECK(moe::reliable_signal_to_noise(8, 8) < -1e30);
    CHECK(std::fabs(moe::reliable_signal_to_noise(4, 8)) < 1e-12);
    CHECK(moe::reliable_signal_to_noise(8, 160) == doctest::Approx(1.6448536269514722));
  }
  TEST_CASE("advice is the largest block that stays reliable, with k blocks of it in the budget") {
    const moe::key_affinity a{.gap = 1, .related = 4, .related_gap = 0.5};
    const moe::block_advice best = moe::advise_blocks(8192, 1024, 64, a);
    CHECK(best.reliable);
    CHECK(best.block * best.k == 1024);
    CHECK(best.snr == moe::signal_to_noise(a, 64, best.block));
    CHECK(best.outranked == moe::probability_outranked(best.snr));
    CHECK(best.snr >= moe::reliable_signal_to_noise(best.k, 8192 / best.block));
    CHECK(moe::signal_to_noise(a, 64, 2 * best.block) < moe::reliable_signal_to_noise(best.k / 2, 8192 / (2 * best.block)));
    CHECK(moe::advise_blocks(8192, 1024, 64, {.gap = 0.6}).block < best.block);  // a weaker signal, smaller blocks
  }
  // A block outranks the right one with probability Phi(-SNR). Where that is k/n, the score of the right block is in the
  // mean sqrt(2) z deviations above others, those of the best k of n begin at z = Phi^-1(1 - k/n), and the right one is
  // among them with probability Phi(sqrt(2) z - z).
  TEST_CASE(
      "of random keys the advised top-k holds the right block as often as a reliable one, blocks twice as large less "
      "often") {
    constexpr dim keys = 512, budget = 64, d = 32, trials = 300;
    const moe::key_affinity a{.gap = 0.97};
    const moe::block_advice best = moe::advise_blocks(keys, budget, d, a, 4);
    REQUIRE(best.reliable);
    REQUIRE(best.block == 8);
    const double least =
        1 - moe::probability_outranked((std::sqrt(2.0) - 1) * moe::reliable_signal_to_noise(best.k, keys / best.block));
    const moe::rng random(7);
    std::uint64_t drawn = 0;
    std::vector<double> affinity(keys);
    dim found[2] = {}, above[2] = {};  // with the advised blocks, with larger ones
    for (dim i = 0; i < trials; ++i) {
      for (double& of : affinity) {
        double square = 0;
        for (dim j = 0; j < d; ++j) {
          const double v = random.normal(drawn++);
          square += v * v;
          if (j == 0) of = v;
        }
        of /= std::sqrt(square);
      }
      affinity[0] += a.gap;
      for (const dim larger : {0, 1}) {
        const dim block = best.block << larger, n = keys / block, k = best.k >> larger;
        const auto score = [&](dim c) {
          double sum = 0;
          for (dim j = 0; j < block; ++j) sum += affinity[static_cast<std::size_t>(c * block + j)];
          return sum;
        };
        dim better = 0;
        for (dim c = 1; c < n - 1; ++c) better += score(c) > score(0);  // the last is the query's own: always taken
        above[larger] += better;
        found[larger] += better < k - 1;
      }
    }
    const auto share = [](dim part, dim of) { return static_cast<double>(part) / static_cast<double>(of); };
    const dim others = keys / best.block - 2, larger_others = keys / (2 * best.block) - 2;
    CHECK(share(above[0], trials * others) == doctest::Approx(best.outranked).epsilon(0.15));
    CHECK(share(above[0], trials * others) < share(best.k, keys / best.block));
    CHECK(share(above[1], trials * larger_others) > share(best.k / 2, keys / (2 * best.block)));
    CHECK(share(found[0], trials) >= least);
    CHECK(share(found[1], trials) < least);
  }
  TEST_CASE("where no block is reliable the smallest is advised, and impossible sizes are refused") {
    const moe::block_advice none = moe::advise_blocks(1 << 20, 64, 64, {.gap = 0.01});
    CHECK(!none.reliable);
    CHECK(none.block == 16);
    CHECK(none.k == 4);
    CHECK_THROWS_WITH_AS(moe::advise_blocks(100, 40, 64, {}),
                         "advise_blocks: budget is 40, expected a multiple of 16 (smallest)", moe::shape_error);
    CHECK_THROWS_AS(moe::advise_blocks(0, 16, 64, {}), moe::shape_error);
  }
}
