// SPDX-License-Identifier: Apache-2.0
// A layer of attention gives the same bits on any executor.
#include <doctest/doctest.h>

#include <algorithm>

#include "moe/attention/self_attention_cache.hpp"
#include "moe/backend/cpu.hpp"
#include "moe/backend/executor/thread_pool.hpp"
#include "moe/moe.hpp"
#include "support/executors.hpp"

namespace {

using moe::dim, moe::idx;

struct everything : moe::attention_features {
  using selection = moe::block_attention;
  using rotary = moe::rotary<>;
  using key_convolution = moe::key_convolution<3>;
  using output_gate = moe::output_gate<moe::head_shared>;
  using query_gate = moe::output_gate<moe::elementwise>;
  using key_gate = moe::output_gate<moe::elementwise>;
  using value_gate = moe::output_gate<moe::headwise>;
  using layer_gate = moe::output_gate<moe::elementwise>;
  static constexpr bool normalises_heads = true, biased = true;
};
/// The same over queries, keys and values that are rounded to bf16.
struct everything_rounded : everything {
  using element = moe::bf16;
};

constexpr dim d = 24, T = 150;
constexpr idx offsets[] = {0, 40, T};

void fill(std::span<float> x, std::uint64_t seed, float scale) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = scale * moe::rng(seed, 0).normal(i);
}

/// y, dx, the gradients of all weights, and y over a cache in two pieces of each sequence.
template <class C, class Executor>
std::vector<float> run(const Executor& executor) {
  const moe::host_backend<moe::arch::native, Executor> backend{executor};
  const moe::self_attention<C, moe::host_backend<moe::arch::native, Executor>> net(
      d, {.heads = 4, .kv_heads = 2, .d = 16, .dv = 8}, moe::block_attention{.block = 8, .k = 3}, backend);
  moe::buffer params(net.weight_bytes()), grads(net.weight_bytes()), angles(1 << 16), kept(net.template cache_bytes<float>(2, T));
  moe::arena p(params.bytes()), g(grads.bytes()), a(angles.bytes()), c(kept.bytes());
  auto cache = net.template make_cache<float>(2, T, c);
  moe::buffer work(net.context_bytes(T) + std::max(net.scratch_bytes(T, 2), net.scratch_bytes(2 * 30, cache)));
  moe::arena mem(work.bytes());
  fill(params.as<float>(), 1, 0.3f);
  const auto w = net.make_weights(p);
  auto dw = net.make_gradients(g);
  const auto table = net.make_table(T, a);
  auto ctx = net.make_context(T, mem);
  std::vector<float> x(T * d), dy(T * d), y(T * d), dx(T * d), all;
  fill(x, 2, 1);
  fill(dy, 3, 1);
  net.forward(w, {{x.data(), T, d}, {offsets, {}}, table}, {y.data(), T, d}, ctx, mem);
  net.backward(w, {{x.data(), T, d}, {offsets, {}}, table}, ctx, {dy.data(), T, d}, {dx.data(), T, d}, dw, mem);
  const auto keep = [&](std::span<const float> v) { all.insert(all.end(), v.begin(), v.end()); };
  keep(y);
  keep(dx);
  keep(grads.as<float>());
  for (const idx n : {30, 1, 17}) {  // a piece, a step of decoding, a piece
    const idx own[] = {0, n, static_cast<idx>(2 * n)};
    net.forward(w, {{x.data(), 2 * n, d}, {own, {}}, table}, {y.data(), 2 * n, d}, cache, mem);
    keep(std::span<const float>(y).first(static_cast<std::size_t>(2 * n * d)));
  }
  return all;
}

}  // namespace

TEST_SUITE("attention/self_attention") {
  TEST_CASE_TEMPLATE("bits do not depend on the executor, with blocks, convolution and every gate", C, everything,
                     everything_rounded) {
    const std::vector<float> wanted = run<C>(moe::serial{});
    CHECK(std::ranges::all_of(wanted, [](float v) { return v - v == 0; }));
    for (const int threads : {2, 3, 64}) {
      const moe::thread_pool pool(threads);
      CHECK(run<C>(moe::pool_executor(pool)) == wanted);
    }
    CHECK(run<C>(testing::shuffling{5}) == wanted);
  }
}
