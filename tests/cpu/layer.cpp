// SPDX-License-Identifier: Apache-2.0
// Whole layers on the CPU backend: against the double-precision reference, against the scalar backend, on every executor.
#include <doctest/doctest.h>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"
#include "support/allocations.hpp"
#include "support/layer_runs.hpp"
#include "support/reference.hpp"
#include "support/small_stack.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using arch = moe::arch::native;
template <class Ex = moe::serial>
using cpu = moe::host_backend<arch, Ex>;

/// Odd in every size, and each size at times below, at or above a panel and a register block.
constexpr moe::shape shapes[] = {
    {.tokens = 1, .d = 1, .f = 1, .experts = 2},     {.tokens = 7, .d = 3, .f = 5, .experts = 4},
    {.tokens = 33, .d = 17, .f = 9, .experts = 3},   {.tokens = 130, .d = 31, .f = 65, .experts = 7},
    {.tokens = 9, .d = 129, .f = 67, .experts = 11}, {.tokens = 600, .d = 64, .f = 128, .experts = 2},
    {.tokens = 2, .d = 72, .f = 200, .experts = 50},
};

}  // namespace

TEST_SUITE("backend/cpu") {
  TEST_CASE("a layer agrees with the double-precision reference, forward and backward") {
    for (const moe::shape& s : shapes) {
      CAPTURE(s.tokens);
      CAPTURE(s.d);
      using layer = testing::ffn_layer<2, cpu<>>;
      testing::model<layer> m(layer(s), s.tokens, s.d, static_cast<std::uint64_t>(s.tokens + s.d));
      (void)testing::run(m);
      const auto list = m.net.catalogue();
      const reference::ffn_layer want(2, list, m.weights());
      const reference::matrix x(s.tokens, s.d, m.x);
      const auto g = want.backward(x, {s.tokens, s.d, m.dy});
      CHECK(reference::error(m.y, want.forward(x).values) < 1e-5);
      CHECK(reference::error(m.dx, g.x.values) < 1e-5);
      const reference::matrix* wanted[] = {&g.gate_w, &g.up, &g.gate, &g.down};
      for (std::size_t i = 0; i < list.size(); ++i) {
        CAPTURE(list[i].name);
        CHECK(reference::error(m.gradients().subspan(list[i].offset / 4, list[i].bytes / 4), wanted[i]->values) < 1e-4);
      }
    }
  }
  TEST_CASE("with whole numbers the CPU and the scalar backend give equal bits") {
    for (const moe::shape& s : shapes) {
      if (s.d > 40 || s.f > 100) continue;  // where every sum stays below 2^24
      CAPTURE(s.tokens);
      CHECK(testing::run_whole(cpu<>{}, s, 3) == testing::run_whole(moe::scalar<moe::serial>{}, s, 3));
    }
  }
  TEST_CASE("all executors give equal bits, forward and backward, run to run") {
    for (const moe::shape& s : shapes) {
      CAPTURE(s.tokens);
      testing::expect_same_bits_from_every_executor<arch>(
          [&]<class B>(const B& backend) { return testing::run(testing::ffn_layer<2, B>(s, backend), s.tokens, 1); });
    }
  }
  TEST_CASE("gradients that replace what was there are those added to zeros") {
    using layer = testing::ffn_layer<1, moe::host_backend<arch, moe::serial>>;
    for (const moe::shape& s : {moe::shape{.d = 33, .f = 70, .experts = 5}, moe::shape{.d = 72, .f = 20, .experts = 40}}) {
      testing::model<layer> m(layer(s), 30, s.d, 3);  // fewer rows than experts: some have none
      m.forward();
      m.backward();
      CHECK(testing::replaces_gradients(m));
    }
  }
#if defined(MOE_TEST_SMALL_STACK)
  TEST_CASE("forward and backward run on the small stack that some C libraries give a thread") {
    const testing::ffn_layer<2, cpu<>> net({.d = 320, .f = 700, .experts = 2});
    const testing::results wanted = testing::run(net, 600, 1);
    testing::results small;
    testing::on_a_small_stack([&] { small = testing::run(net, 600, 1); });
    CHECK(small == wanted);
  }
#endif
  TEST_CASE("gradients match finite differences") {
    using layer = testing::ffn_layer<2, cpu<>>;
    const auto g = testing::gradcheck(layer({.tokens = 12, .d = 9, .f = 19, .experts = 4}), 12, 9, 5);
    INFO("worst in " << g.where << ", skipped " << g.skipped << " of " << g.probed);
    CHECK(g.worst < 1e-2);
    CHECK(g.skipped * 4 < g.probed);
  }
}
