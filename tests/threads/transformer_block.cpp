// SPDX-License-Identifier: Apache-2.0
// A block of a transformer gives the same bits on any executor.
#include <doctest/doctest.h>

#include "moe/backend/cpu.hpp"
#include "moe/backend/executor/thread_pool.hpp"
#include "moe/moe.hpp"
#include "moe/transformer/block.hpp"
#include "support/executors.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim, moe::idx;

struct gated : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::headwise>;
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
  static constexpr bool normalises_heads = true;
};
struct gated_blocks : gated {
  using selection = moe::block_attention;
  using key_convolution = moe::key_convolution<3>;
};
struct rounded_blocks : gated_blocks {
  using element = moe::bf16;
};

constexpr dim d = 16, T = 1100;  // of which one sequence is long enough for several tiles, and parts of backward
constexpr idx offsets[] = {0, 70, 70, T};
constexpr moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 8, .dv = 8};

/// y with a context and without one, dx and the gradients of all weights.
template <class C, class Executor, class... Parts>
std::vector<float> run(const Executor& executor, const Parts&... parts) {
  using backend = moe::host_backend<moe::arch::native, Executor>;
  const backend on{executor};
  const moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, backend> routed(
      {.d = d, .f = 12, .experts = 5}, on);
  const moe::transformer_block net(moe::self_attention<C, backend>(d, heads, parts..., on), routed);
  moe::buffer params(net.weight_bytes()), grads(net.gradient_bytes()), angles(1 << 17),
      work(net.context_bytes(T) + net.scratch_bytes(T, 3));
  testing::randomise(net.catalogue(), params.as<float>(), 1);
  moe::arena p(params.bytes()), g(grads.bytes()), a(angles.bytes()), mem(work.bytes());
  const auto w = net.make_weights(p);
  auto dw = net.make_gradients(g);
  auto ctx = net.make_context(T, mem);
  std::vector<float> x = testing::normals(T * d, 2), dy = testing::normals(T * d, 3), y(T * d), again(T * d), dx(T * d), all;
  const typename decltype(net)::input in{{x.data(), T, d}, {offsets, {}}, net.make_table(T, a)};
  net.forward(w, in, {y.data(), T, d}, ctx, mem);
  net.forward(w, in, {again.data(), T, d}, mem);
  net.backward(w, in, ctx, {dy.data(), T, d}, {dx.data(), T, d}, dw, mem);
  const auto keep = [&](std::span<const float> v) { all.insert(all.end(), v.begin(), v.end()); };
  keep(y);
  keep(again);
  keep(dx);
  keep(grads.as<float>());
  return all;
}
template <class C, class... Parts>
void check(const Parts&... parts) {
  const std::vector<float> wanted = run<C>(moe::serial{}, parts...);
  CHECK(std::ranges::all_of(wanted, [](float v) { return v - v == 0; }));
  for (const int threads : {1, 2, 3, 5}) {
    CAPTURE(threads);
    const moe::thread_pool pool(threads);
    CHECK(testing::same_bits(run<C>(moe::pool_executor(pool), parts...), wanted));
  }
  CHECK(testing::same_bits(run<C>(testing::shuffling{5}, parts...), wanted));
}

}  // namespace

TEST_SUITE("transformer/block") {
  TEST_CASE("bits do not depend on the executor, forward and backward, with a gate and over blocks of keys") {
    check<gated>();
    check<gated_blocks>(moe::block_attention{.block = 16, .k = 4});
    check<rounded_blocks>(moe::block_attention{.block = 32, .k = 4});
  }
}
