// SPDX-License-Identifier: Apache-2.0
// Attention allocates nothing: forward and backward, dense and over blocks of keys, run on memory the caller gave.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/backend/host_attention_backward.hpp"
#include "moe/backend/host_moba.hpp"
#include "moe/moe.hpp"
#include "support/allocations.hpp"
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
}
