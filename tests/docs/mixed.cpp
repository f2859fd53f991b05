// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"
#include "support/testing.hpp"

TEST_SUITE("docs/tutorial") {
  TEST_CASE("a layer with bf16 weights learns") {
    // [mixed]
    using ffn = moe::layer<moe::linear_gate, moe::top_k<2>, moe::bf16_ffn_expert, moe::weighted_sum, moe::cpu<>>;
    const moe::dim T = 64, d = 16;
    const ffn net({.tokens = T, .d = d, .f = 32, .experts = 4});
    const moe::serial threads;
    const moe::adamw optimizer;

    // float32: masters, gradients and moments, all of one layout. What the layer reads: experts in bf16, the router in float32.
    const auto n = static_cast<moe::dim>(net.gradient_bytes() / sizeof(float));
    moe::buffer masters(net.gradient_bytes()), grads(net.gradient_bytes()), state(optimizer.state_bytes(n));
    moe::buffer params(net.weight_bytes()), work(net.context_bytes(T) + net.scratch_bytes(T));
    moe::arena p(params.bytes()), g(grads.bytes()), s(state.bytes()), mem(work.bytes());
    const ffn::weights w = net.make_weights(p);
    ffn::gradients dw = net.make_gradients(g);
    const auto moments = optimizer.make_state(n, s);
    ffn::context ctx = net.make_context(T, mem);

    moe::initialise(threads, masters.bytes(), net.gradient_catalogue(), moe::rng(1));
    const moe::weight_copy copy(net.gradient_catalogue(), net.catalogue(), params.bytes());
    copy.write(masters.as<float>());  // once; from here on each step of the optimizer writes it

    const auto step = [&](moe::dim t, moe::matrix_view<const float> x, moe::matrix_view<const float> dy) {
      net.backward(w, x, ctx, dy, {}, dw, mem, moe::gradient_mode::replace);
      optimizer.step(threads, {.rate = 1e-3f, .step = t}, masters.as<float>(), grads.as<float>(), moments, copy);
    };
    // [/mixed]
    const std::vector<float> x = testing::normals(T * d, 1);
    std::vector<float> y(x.size()), dy(x.size());
    const auto loss = [&] {
      net.forward(w, {x.data(), T, d}, {y.data(), T, d}, ctx, mem);
      double sum = 0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        dy[i] = 2 * (y[i] - x[i]) / static_cast<float>(x.size());
        sum += double{y[i] - x[i]} * (y[i] - x[i]);
      }
      return sum;
    };
    const double before = loss();
    for (moe::dim t = 0; t < 100; ++t) {
      loss();
      step(t, {x.data(), T, d}, {dy.data(), T, d});
    }
    CHECK(loss() < before / 2);
  }
}
