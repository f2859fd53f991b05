// SPDX-License-Identifier: Apache-2.0
// A step of training gives the same bits for any number of threads, at every level, however uneven the routing is.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/backend/executor/thread_pool.hpp"
#include "support/levels.hpp"
#include "support/mixed.hpp"

namespace {

using moe::dim;

/// More rows than one tile of any product holds, and gradients of several tiles.
constexpr moe::shape sizes{.tokens = 330, .d = 40, .f = 136, .experts = 4};

/// One choice a token: of every five tokens `hot` go to expert 2, the rest to the others.
template <class Model>
void route(Model& m, dim hot) {
  for (dim t = 0; t < sizes.tokens; ++t) m.x[static_cast<std::size_t>(t * sizes.d)] = t % 5 < hot ? 1.f : -1.f;
  for (dim e = 0; e < sizes.experts; ++e) m.w.gate.w(e, 0) = e == 2 ? 50.f : 0.f;
}
/// y, dx and the gradients of all weights: added to numbers that are there, then in the place of NaN.
template <class Expert, class Executor>
std::vector<float> train(dim hot, const Executor& threads) {
  using backend = moe::host_backend<moe::arch::dynamic, Executor>;
  using layer =
      moe::layer<moe::linear_gate, moe::top_k<1, moe::score_rule<moe::softmax_score>>, Expert, moe::weighted_sum, backend>;
  testing::mixed_model<layer> m(layer(sizes, backend(threads)), sizes.tokens, sizes.d, 1);
  route(m, hot);
  m.forward();
  const dim taken = m.ctx.plan.offsets[3] - m.ctx.plan.offsets[2];
  CHECK(taken == sizes.tokens / 5 * hot);
  std::vector<float> all = m.y;
  const auto keep = [&](std::span<const float> v) { all.insert(all.end(), v.begin(), v.end()); };
  const std::vector<float> there = testing::normals(static_cast<dim>(m.gradients().size()), 7);
  std::ranges::copy(there, m.gradients().begin());
  m.backward(moe::gradient_mode::add);
  keep(m.dx);
  keep(m.gradients());
  testing::spoil(m.net.gradient_catalogue(), m.gradients());
  m.backward(moe::gradient_mode::replace);
  keep(m.gradients());
  return all;
}

}  // namespace

TEST_SUITE("backend/cpu/dynamic") {
  TEST_CASE_TEMPLATE(
      "forward and backward give equal bits for any number of threads at every level, one expert with most rows or all",
      Expert, moe::ffn_expert, moe::bf16_ffn_expert) {
    for (const dim hot : {4, 5}) {
      CAPTURE(hot);
      testing::at_every_level([&] {
        const std::vector<float> wanted = train<Expert>(hot, moe::serial{});
        CHECK(std::ranges::all_of(wanted, [](float v) { return std::isfinite(v); }));
        for (const int threads : {2, 3, 5}) {
          CAPTURE(threads);
          const moe::thread_pool pool(threads);
          CHECK(testing::same_bits(train<Expert>(hot, moe::pool_executor(pool)), wanted));
        }
      });
    }
  }
}
