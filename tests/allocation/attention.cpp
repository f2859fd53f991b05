// SPDX-License-Identifier: Apache-2.0
// Attention allocates nothing: forward and backward, dense and over blocks of keys, run on memory the caller gave.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "moe/attention/decode.hpp"
#include "moe/attention/select_blocks.hpp"
#include "moe/attention/self_attention_cache.hpp"
#include "moe/backend/executor/thread_pool.hpp"
#include "moe/backend/host_attention_backward.hpp"
#include "moe/backend/host_moba.hpp"
#include "moe/moe.hpp"
#include "support/allocations.hpp"
#include "support/executors.hpp"
#include "support/testing.hpp"

#if __has_include("moe/backend/cpu.hpp") && __has_include(<xsimd/xsimd.hpp>)
#define MOE_TEST_CPU 1
#include "moe/backend/cpu.hpp"
#include "moe/backend/cpu/attention_levels.hpp"
#endif

namespace {

using moe::dim;

constexpr dim T = 300, h = 4, h_kv = 2, d = 40;

/// Warms up, so that threads exist and the level is known, then counts.
template <class B, class Selection, class Prepare>
void expect_no_allocation(const B& backend, const moe::attention_problem& p, const Selection& selection, Prepare prepare) {
  const moe::attention_sizes n{T, T};
  moe::arena forward, backward;
  count_attend(backend, p, n, selection, forward);
  count_attend_backward(backend, p, n, selection, backward);
  const moe::buffer memory(std::max(moe::padded(forward), moe::padded(backward)));
  moe::arena mem(memory.bytes());
  const moe::call<B> on{backend, mem, {}};
  std::vector<float> q = testing::normals(T * h * d, 1), k = testing::normals(T * h_kv * d, 2), v = k, o(q.size()), dq(q.size()),
                     dk(k.size()), dv(k.size()), lse(static_cast<std::size_t>(T * h)), delta(lse.size());
  const auto heads = [](std::vector<float>& rows, dim count) {
    return moe::split_heads(moe::matrix_view<float>(rows.data(), T, count * d), count);
  };
  const auto run = [&] {
    prepare(on, heads(k, h_kv), heads(v, h_kv));
    attend(on, p, heads(q, h), heads(k, h_kv), heads(v, h_kv), selection, [&](dim t, dim a, const float* y, float sum) {
      std::copy_n(y, d, o.begin() + (t * h + a) * d);
      lse[static_cast<std::size_t>(t * h + a)] = sum;
    });
    const moe::matrix_view<float> rows(delta.data(), T, h);
    attention_delta(on, p.heads, heads(o, h), heads(o, h), rows);
    attend_backward(on, p, heads(q, h), heads(k, h_kv), heads(v, h_kv), selection, heads(o, h), {lse.data(), T, h}, rows,
                    heads(dq, h), heads(dk, h_kv), heads(dv, h_kv));
  };
  run();
  CHECK(testing::allocations_of(run) == testing::allocation_counts{});
  CHECK(mem.used() == 0);
}
template <class B>
void expect_no_allocation(const B& backend) {
  const moe::attention_problem p{{h, h_kv, d, d}};
  expect_no_allocation(backend, p, moe::every_key{}, [](const auto&, const auto&, const auto&) {});
  moe::arena count;
  (void)carve_key_blocks(p.heads, 1, T, 32, 3, count);
  const moe::buffer memory(moe::padded(count));
  moe::arena mem(memory.bytes());
  moe::key_blocks blocks = carve_key_blocks(p.heads, 1, T, 32, 3, mem);
  std::vector<moe::idx> chosen(static_cast<std::size_t>(T * h * 2));
  blocks.chosen = {chosen.data(), T * h, 2};
  expect_no_allocation(backend, p, blocks, [&](const auto& on, const auto& k, const auto&) { prepare_key_blocks(on, p, k, blocks); });
}

/// Two sequences whose steps append a token, choose blocks and read them.
template <class T, class B>
struct decoding {
  static constexpr dim S = 2, N = 64, k_blocks = 3;
  static constexpr moe::kv_cache_shape shape{{h, h_kv, d, d}, S, N, 8};
  B backend;
  moe::buffer kept, work;
  moe::arena kept_memory, mem;
  moe::kv_cache<T> cache;
  std::vector<float> q = testing::normals(S * h * d, 1), k = testing::normals(S * h_kv * d, 2), o = q;
  std::vector<moe::idx> blocks = std::vector<moe::idx>(S * h * k_blocks);

  explicit decoding(const B& on)
      : backend(on),
        kept(bytes([](moe::arena& a) { (void)moe::kv_cache<T>::make(shape, a); })),
        work(bytes([](moe::arena& a) {
          (void)moe::make_select_blocks_scratch(shape, a);
          moe::make_decode_scratch(shape, k_blocks, a);
        })),
        kept_memory(kept.bytes()),
        mem(work.bytes()),
        cache(moe::kv_cache<T>::make(shape, kept_memory)) {
    for (int i = 0; i < 30; ++i) append();
  }
  template <class F>
  static std::size_t bytes(F carve) {
    moe::arena count;
    carve(count);
    return moe::padded(count);
  }
  void append() {
    const moe::matrix_view<const float> rows{k.data(), S, h_kv * d};
    cache.append_each(call(), rows, rows);
  }
  void choose() { moe::select_blocks(call(), cache, queries(), chosen()); }
  void read() { moe::decode(call(), cache, queries(), moe::matrix_view<float>{o.data(), S, h * d}, {}, {.blocks = chosen()}); }

 private:
  moe::call<B> call() { return {backend, mem, {}}; }
  moe::matrix_view<const float> queries() const { return {q.data(), S, h * d}; }
  moe::matrix_view<moe::idx> chosen() { return {blocks.data(), S * h, k_blocks}; }
};
struct features : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::elementwise>;
  using key_convolution = moe::key_convolution<3>;
  using selection = moe::block_attention;
};
/// A piece of a prompt, then a token.
template <class T, class B>
void expect_no_allocation_over_a_cache(const B& backend) {
  using layer = moe::self_attention<features, B>;
  constexpr dim model = 12, N = 40;
  const layer net(model, moe::attention_heads{4, 2, 8, 6}, moe::block_attention{.block = 4, .k = 3}, backend);
  const moe::buffer params(net.weight_bytes()), angles(1 << 14), kept(net.template cache_bytes<T>(1, N));
  moe::arena p(params.bytes()), a(angles.bytes()), c(kept.bytes());
  const auto w = net.make_weights(p);
  const auto table = net.make_table(N, a);
  auto cache = net.template make_cache<T>(1, N, c);
  const moe::buffer work(net.scratch_bytes(9, cache));
  moe::arena mem(work.bytes());
  std::vector<float> x = testing::normals(9 * model, 1), y(x.size());
  const auto run = [&] {
    for (const dim n : {9, 1}) net.forward(w, {{x.data(), n, model}, {}, table}, {y.data(), n, model}, cache, mem);
  };
  run();
  CHECK(testing::allocations_of(run) == testing::allocation_counts{});
}
template <class B>
void expect_no_allocation_in_decoding(const B& backend) {
  const auto of = [&]<class T>(T) {
    decoding<T, B> step(backend);
    const auto run = [&] {
      step.append();
      step.choose();
      step.read();
    };
    run();
    CHECK(testing::allocations_of(run) == testing::allocation_counts{});
    expect_no_allocation_over_a_cache<T>(backend);
  };
  of(float{});
  of(moe::bf16{});
  of(std::int8_t{});
}

}  // namespace

TEST_SUITE("backend/host_attention") {
  TEST_CASE("attention allocates nothing, dense or over blocks, on one thread or several") {
    const moe::thread_pool pool(3);
    expect_no_allocation(moe::scalar<moe::serial>{});
    expect_no_allocation(moe::scalar<moe::pool_executor>(moe::pool_executor(pool)));
#if defined(MOE_TEST_CPU)
    expect_no_allocation(moe::cpu<moe::arch::native, moe::serial>{});
    expect_no_allocation(moe::cpu<moe::arch::native, moe::pool_executor>(moe::pool_executor(pool)));
#endif
  }
  TEST_CASE("a step over a cache allocates nothing, on one thread or several") {
    const moe::thread_pool pool(3);
    expect_no_allocation_in_decoding(moe::scalar<moe::serial>{});
    expect_no_allocation_in_decoding(moe::scalar<moe::pool_executor>(moe::pool_executor(pool)));
#if defined(MOE_TEST_CPU)
    expect_no_allocation_in_decoding(moe::cpu<moe::arch::native, moe::serial>{});
    expect_no_allocation_in_decoding(moe::cpu<moe::arch::native, moe::pool_executor>(moe::pool_executor(pool)));
#endif
  }
  TEST_CASE("to append, to choose blocks and to read them take one join each") {
    dim joins = 0;
    decoding<float, moe::scalar<testing::counting>> step(moe::scalar<testing::counting>(testing::counting{&joins}));
    const auto of = [&](auto f) {
      joins = 0;
      f();
      return joins;
    };
    CHECK(of([&] { step.append(); }) == 1);
    CHECK(of([&] { step.choose(); }) == 1);
    CHECK(of([&] { step.read(); }) == 1);
  }
}
