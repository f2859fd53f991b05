// SPDX-License-Identifier: Apache-2.0
#include "support/routing.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "moe/core/rng.hpp"

namespace {

using namespace bench;

std::vector<float> normal(dim n, float deviation, std::uint64_t stream) {
  std::vector<float> to(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = deviation * moe::rng(stream).normal(i);
  return to;
}

}  // namespace

TEST_SUITE("benchmarks/support/routing") {
  TEST_CASE("four tokens' output without the weakest of eight experts is none that any type of weights may give") {
    constexpr dim T = 500, batch_tokens = 4, d = 64, k = 8;
    for (const dim E : {dim{64}, dim{128}}) {
      const std::vector<float> x = normal(T * d, 1, 1), router = normal(E * d, 1 / std::sqrt(float{d}), 2),
                               bias(static_cast<std::size_t>(E));
      batch b{.layer = 0, .x = {x.data(), T, d}, .router = {router.data(), E, d}, .bias = bias, .expert = {}, .weight = {}};
      plan(b, k);
      // A batch is judged by its worst tokens. Outputs of random experts are as large as each other, and at right angles.
      double least = 1, sum = 0;
      for (auto w = b.weight.begin(); w != b.weight.end();) {
        double most = 0;
        for (dim t = 0; t < batch_tokens; ++t, w += k) {
          const double error = *std::min_element(w, w + k) / std::sqrt(std::inner_product(w, w + k, w, 0.));
          most = std::max(most, error);
          sum += error / T;
        }
        least = std::min(least, most);
      }
      CHECK(sum > 0.15);  // on average
      CAPTURE(least);
      for (const weight_type& t : weight_types) CHECK(least > t.tolerance);
    }
  }
}
