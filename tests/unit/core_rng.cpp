// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>
#include <set>
#include <vector>

#include "moe/core/rng.hpp"

using namespace moe;

namespace {

struct moments {
  double mean, variance, skew, kurtosis;
};

template <class Draw>
moments moments_of(Draw draw, int n) {
  double sum = 0, second = 0, third = 0, fourth = 0;
  for (int i = 0; i < n; ++i) sum += draw(i);
  const double mean = sum / n;
  for (int i = 0; i < n; ++i) {
    const double x = draw(i) - mean;
    second += x * x;
    third += x * x * x;
    fourth += x * x * x * x;
  }
  const double variance = second / n;
  return {mean, variance, third / n / std::pow(variance, 1.5), fourth / n / (variance * variance)};
}

constexpr int draws = 200000;  // the tolerances below are five deviations of each estimate

}  // namespace

TEST_SUITE("core/rng") {
  // The published kat_vectors of Random123: philox4x32, 10 rounds. Counter words 0 and 1 are our counter, 2 and 3 the
  // stream, the key is the seed, low halves first; words 0 and 1 of the result are ours.
  TEST_CASE("known answers of Philox 4x32-10") {
    CHECK(rng(0, 0)(0) == 0xe169c58d6627e8d5ull);
    CHECK(rng(0xffffffffffffffffull, 0xffffffffffffffffull)(0xffffffffffffffffull) == 0x41c83b0e408f276dull);
    CHECK(rng(0x299f31d0a4093822ull, 0x0370734413198a2eull)(0x85a308d3243f6a88ull) == 0x94fdccebd16cfe09ull);
  }
  TEST_CASE("a draw is a constant expression, equal in any order and as often as asked") {
    constexpr rng random(5, 2);
    static_assert(random(7) == rng(5, 2)(7));
    std::vector<std::uint64_t> up, down;
    for (std::uint64_t i = 0; i < 100; ++i) up.push_back(random(i));
    for (std::uint64_t i = 100; i-- > 0;) down.insert(down.begin(), random(i));
    CHECK(up == down);
  }
  TEST_CASE("seed, stream and counter each change the numbers") {
    std::set<std::uint64_t> seen;
    for (std::uint64_t a = 0; a < 8; ++a)
      for (std::uint64_t b = 0; b < 8; ++b)
        for (std::uint64_t c = 0; c < 8; ++c) seen.insert(rng(a, b)(c));
    CHECK(seen.size() == 512);
  }
  TEST_CASE("split generators differ from each other and from their source") {
    const rng random(3);
    std::set<std::uint64_t> seen;
    for (std::uint64_t i = 0; i < 100; ++i) {
      seen.insert(random(i));
      for (std::uint64_t salt = 0; salt < 4; ++salt) seen.insert(random.split(salt)(i));
      seen.insert(random.split(0).split(0)(i));
    }
    CHECK(seen.size() == 600);
    CHECK(random.split(1)(9) == rng(3).split(1)(9));
  }
  TEST_CASE("uniform numbers fill [0, 1) evenly") {
    const rng random(11);
    const auto m = moments_of([&](int i) { return double{random.uniform(static_cast<std::uint64_t>(i))}; }, draws);
    CHECK(std::abs(m.mean - 0.5) < 0.0033);
    CHECK(std::abs(m.variance - 1. / 12) < 0.0009);
    int outside = 0;
    std::vector<int> bins(10);
    for (std::uint64_t i = 0; i < draws; ++i) {
      const float u = random.uniform(i);
      outside += !(u >= 0 && u < 1);
      ++bins[static_cast<std::size_t>(u * 10)];
    }
    CHECK(outside == 0);
    for (const int count : bins) CHECK(std::abs(count - draws / 10) < 700);
  }
  TEST_CASE("normal numbers have the moments of the normal distribution") {
    const rng random(12);
    const auto m = moments_of([&](int i) { return double{random.normal(static_cast<std::uint64_t>(i))}; }, draws);
    CHECK(std::abs(m.mean) < 0.012);
    CHECK(std::abs(m.variance - 1) < 0.016);
    CHECK(std::abs(m.skew) < 0.028);
    CHECK(std::abs(m.kurtosis - 3) < 0.055);
  }
  TEST_CASE("normal numbers of neighbouring counters and of neighbouring streams do not correlate") {
    const rng random(13), other(13, 1);
    double next = 0, across = 0;
    for (std::uint64_t i = 0; i < draws; ++i) {
      next += double{random.normal(i)} * random.normal(i + 1);
      across += double{random.normal(i)} * other.normal(i);
    }
    CHECK(std::abs(next / draws) < 0.012);
    CHECK(std::abs(across / draws) < 0.012);
  }
}
