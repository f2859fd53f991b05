// SPDX-License-Identifier: Apache-2.0
#include "support/judge.hpp"

#include <doctest/doctest.h>

namespace {

using namespace bench;

/// A row of forward on two threads with even routing, beside an Eigen loop of that speed.
row beside_loop(const model_shape& s, dim tokens, double loop) {
  row r{s, weight_types[0], tokens, 2, 0, false, 1, 1, 1, 1, true, true, {}};
  r.peers = {{"onednn", "3", 1}, {"eigen", "3.4", loop}};
  return r;
}

}  // namespace

TEST_SUITE("benchmarks/support/judge") {
  TEST_CASE("a loop of 85 % of what it is known for passes at every shape and batch, a slower one is named") {
    for (const model_shape& s : named_shapes())
      for (std::size_t i = 0; i < default_tokens.size(); ++i) {
        CAPTURE(s.name);
        CAPTURE(default_tokens[i]);
        const double known = s.known_loop[i];
        REQUIRE(known > 0);
        CHECK(judge_loop({beside_loop(s, default_tokens[i], 0.86 * known)}).empty());
        const auto weak = judge_loop({beside_loop(s, default_tokens[i], 0.84 * known)});
        REQUIRE(weak.size() == 1);
        CHECK(weak[0].find(s.name + ", T = " + std::to_string(default_tokens[i]) + " (f32): 84%") != std::string::npos);
      }
  }
  TEST_CASE("nothing is said of what nobody measured") {
    const model_shape& s = named_shapes()[3];
    row threads = beside_loop(s, 1, 1), skewed = threads, training = threads;
    threads.threads = 1;
    skewed.skew = 1.2;
    training.backward = true;
    const model_shape other{"other", 8, 8, 2, 1};
    CHECK(judge_loop({threads, skewed, training, beside_loop(s, 2, 1), beside_loop(other, 1, 1)}).empty());
  }
}
