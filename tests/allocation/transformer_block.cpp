// SPDX-License-Identifier: Apache-2.0
// A block of a transformer allocates nothing: its parts run on memory the caller gave.
#include <doctest/doctest.h>

#include <array>
#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/moe.hpp"
#include "support/allocations.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using backend = moe::scalar<moe::pool_executor>;

struct gated : moe::attention_features {
  using selection = moe::block_attention;
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::elementwise>;
  static constexpr bool normalises_heads = true;
};
using attention = moe::self_attention<gated, backend>;
using layer = moe::layer<moe::linear_gate, moe::with_loss<moe::top_k<2>, moe::load_balance>, moe::ffn_expert,
                         moe::weighted_sum, backend>;
using block = moe::transformer_block<attention, layer>;

}  // namespace

TEST_SUITE("transformer/block") {
  TEST_CASE("forward and backward allocate nothing, with a context and without") {
    constexpr dim T = 40, d = 16;
    constexpr std::array<moe::idx, 3> offsets{0, 33, T};
    const moe::thread_pool pool(3);
    const backend threads{moe::pool_executor(pool)};
    const moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 8, .dv = 8};
    const block net(attention(d, heads, moe::block_attention{.block = 8, .k = 2}, threads),
                    layer({.d = d, .f = 20, .experts = 4}, threads));
    const moe::buffer params(net.weight_bytes()), grads(net.gradient_bytes()), angles(1 << 14),
        memory(net.context_bytes(T) + net.scratch_bytes(T, 2));
    moe::arena params_mem(params.bytes()), grads_mem(grads.bytes()), angles_mem(angles.bytes()), mem(memory.bytes());
    const block::weights w = net.make_weights(params_mem);
    block::gradients dw = net.make_gradients(grads_mem);
    block::context ctx = net.make_context(T, mem);
    testing::randomise(net.catalogue(), params.as<float>(), 1);
    std::vector<float> x = testing::normals(T * d, 2), y(x.size()), dx(x.size());
    const moe::matrix_view<float> rows(y.data(), T, d), dxs(dx.data(), T, d);
    const block::input in{{x.data(), T, d}, {offsets, {}}, net.make_table(T, angles_mem)};

    const auto train = [&] {
      net.forward(w, in, rows, ctx, mem);
      net.backward(w, in, ctx, rows, dxs, dw, mem);
    };
    const auto infer = [&] { net.forward(w, in, rows, mem); };
    train();
    const std::size_t used = mem.used();
    CHECK(testing::allocations_of(train) == testing::allocation_counts{});
    CHECK(testing::allocations_of(infer) == testing::allocation_counts{});
    CHECK(mem.used() == used);
  }
}
