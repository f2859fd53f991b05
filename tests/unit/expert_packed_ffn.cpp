// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using backend = moe::scalar<>;
using dense_layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, backend>;
using ternary_layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ternary_expert, moe::weighted_sum, backend>;

static_assert(moe::Expert<moe::ternary_expert, backend>);
static_assert(!moe::TrainableExpert<moe::ternary_expert, backend>, "inference only");

// x W^T as the header defines it, in double from the float matrix.
std::vector<double> product(const std::vector<double>& x, moe::matrix_view<const float> w) {
  double sum = 0, largest = 0;
  for (moe::dim r = 0; r < w.rows; ++r)
    for (moe::dim c = 0; c < w.cols; ++c) sum += std::fabs(w(r, c));
  const double alpha = sum / static_cast<double>(w.rows * w.cols) + 1e-5;
  for (double v : x) largest = std::max(largest, std::fabs(v));
  const double beta = largest + 1e-5;
  std::vector<double> y(static_cast<std::size_t>(w.rows));
  for (moe::dim r = 0; r < w.rows; ++r) {
    for (moe::dim c = 0; c < w.cols; ++c)
      y[static_cast<std::size_t>(r)] += std::clamp(std::nearbyint(127 * x[static_cast<std::size_t>(c)] / beta), -128.0, 127.0) *
                                        std::clamp(std::nearbyint(w(r, c) / alpha), -1.0, 1.0);
    y[static_cast<std::size_t>(r)] *= alpha * beta / 127;
  }
  return y;
}

}  // namespace

TEST_SUITE("expert/packed_ffn") {
  TEST_CASE("packing ternary weights keeps the codes and the scale of every expert, at two bits a weight") {
    const moe::shape s{.tokens = 1, .d = 4, .f = 2, .experts = 1};
    std::vector<float> up{0.4f, -0.4f, 0.1f, 0.7f, 0, 0, 0, 0}, gate(8, 1.f), down(8, -2.f);
    moe::ffn_weights w;
    w.up = {up.data(), 2, 4};
    w.gate = {gate.data(), 2, 4};
    w.down = {down.data(), 4, 2};
    moe::buffer memory(4096);
    moe::arena mem(memory.bytes());
    const auto packed = moe::ternary_expert{}.pack(w, s, mem);
    const auto code = [](const moe::packed_matrix<moe::ternary>& m, moe::dim panel, moe::dim r, moe::dim k) {
      return moe::packing<moe::ternary>::code(m.panel(panel), r, k);
    };
    constexpr moe::dim gate_panel = 0, up_panel = 1;
    CHECK(packed.gate_up.panel_scale(up_panel)[1] == doctest::Approx(0.2 + 1e-5));  // mean of 0.4 0.4 0.1 0.7 0 0 0 0
    CHECK(packed.gate_up.panel_scale(gate_panel)[0] == 1 + 1e-5f);
    const int wanted[] = {1, -1, 0, 1, 0, 0, 0, 0};
    for (moe::dim i = 0; i < 8; ++i) CHECK(code(packed.gate_up, up_panel, i / 4, i % 4) == wanted[i]);
    CHECK(code(packed.down, 0, 3, 1) == -1);
    CHECK(packed.down.weight(0, 3, 1) == -(2 + 1e-5f));
    CHECK(code(packed.down, 0, 5, 7) == 0);  // what fills a panel up
    CHECK(moe::packed_matrix<moe::ternary>::panel_bytes(2048) == 32 * 2048 / 4);
  }
  TEST_CASE("the scale of a ternary matrix is that of all of its panels, and a half of it rounds to zero") {
    std::vector<float> w(70 * 3, 0.5f);
    for (std::size_t i = 0; i < w.size(); i += 2) w[i] = 1.5f;
    w[5] = -0.500005f;  // half of the scale, 1.00001
    moe::buffer memory(8192);
    moe::arena mem(memory.bytes());
    auto packed = moe::packed_matrix<moe::ternary>::make("w", "scale", 3, 3, mem);
    packed.pack(0, moe::matrix_view<const float>{w.data(), 70, 3});
    for (const float s : packed.scale) CHECK(s == doctest::Approx(1 + 1e-5));
    CHECK(packed.weight(0, 0, 0) == packed.scale[0]);
    CHECK(packed.weight(0, 1, 0) == 0);
    CHECK(packed.weight(2, 5, 1) == packed.scale[0]);
    w[7] = std::nanf("");
    packed.pack(0, moe::matrix_view<const float>{w.data(), 70, 3});
    for (const float s : packed.scale) CHECK(std::isnan(s));
  }
  TEST_CASE("a layer of packed experts equals the quantised formulas in double") {
    const moe::shape s{.tokens = 8, .d = 10, .f = 6, .experts = 4};  // neither a multiple of four
    testing::model<dense_layer> dense(dense_layer(s), 8, 10, 1);
    const ternary_layer net(s);
    moe::buffer params(net.weight_bytes()), work(net.inference_context_bytes(8) + net.scratch_bytes(8));
    moe::arena p(params.bytes()), mem(work.bytes());
    ternary_layer::weights w = net.make_weights(p);
    moe::buffer packed(net.weight_bytes());
    moe::arena q(packed.bytes());
    w.gate.w = dense.w.gate.w;
    w.experts = net.experts().pack(dense.w.experts, s, q);
    auto ctx = net.make_inference_context(8, mem);
    net.forward(w, dense.in, dense.y_view(), ctx, mem);

    double worst = 0;
    for (moe::dim t = 0; t < 8; ++t) {
      std::vector<double> y(10), x(dense.x_view().row(t), dense.x_view().row(t) + 10);
      for (moe::dim e = 0; e < 4; ++e)
        for (moe::idx r = ctx.plan.offsets[static_cast<std::size_t>(e)]; r < ctx.plan.offsets[static_cast<std::size_t>(e) + 1]; ++r) {
          if (ctx.plan.token[static_cast<std::size_t>(r)] != t) continue;
          auto g = product(x, dense.w.experts.gate.slice(e * 6, 6)), u = product(x, dense.w.experts.up.slice(e * 6, 6));
          for (std::size_t j = 0; j < 6; ++j) u[j] *= g[j] / (1 + std::exp(-g[j]));
          const auto out = product(u, dense.w.experts.down.slice(e * 10, 10));
          for (std::size_t j = 0; j < 10; ++j) y[j] += ctx.plan.weight[static_cast<std::size_t>(r)] * out[j];
        }
      for (std::size_t j = 0; j < 10; ++j) worst = std::max(worst, std::fabs(y[j] - dense.y[static_cast<std::size_t>(t) * 10 + j]));
    }
    // A float and a double may round one activation code differently: a step of 1/127 of a small weight.
    CHECK(worst < 2e-2);
  }
  TEST_CASE("zero weights and zero rows give zero, not NaN") {
    const moe::shape s{.tokens = 2, .d = 4, .f = 4, .experts = 2};
    const ternary_layer net(s);
    moe::buffer params(net.weight_bytes()), work(net.inference_context_bytes(2) + net.scratch_bytes(2));
    moe::arena p(params.bytes()), mem(work.bytes());
    const auto w = net.make_weights(p);
    auto ctx = net.make_inference_context(2, mem);
    std::vector<float> x(8), y(8, 5.f);
    net.forward(w, moe::matrix_view<float>(x.data(), 2, 4), {y.data(), 2, 4}, ctx, mem);
    for (float v : y) CHECK(v == 0);
  }
  TEST_CASE("a row with NaN gives NaN, and the rows beside it are what they were") {
    const moe::dense<moe::ternary_expert, backend> net({.d = 5, .f = 6});
    const moe::shape s{.tokens = 2, .d = 5, .f = 6, .experts = 1};
    const moe::dense<moe::ffn_expert, backend> from(s);
    moe::buffer full(from.weight_bytes()), packed(net.weight_bytes()), work(net.scratch_bytes(2));
    moe::arena f(full.bytes()), q(packed.bytes()), mem(work.bytes());
    const auto w = from.make_weights(f);
    testing::randomise(from.catalogue(), full.as<float>(), 9);
    auto x = testing::normals(10, 10);
    std::vector<float> y(10), again(10);
    auto ctx = net.make_inference_context(2, mem);
    const auto run = [&](std::vector<float>& to) {
      net.forward({{}, moe::ternary_expert{}.pack(w.expert, s, q)}, moe::matrix_view<const float>(x.data(), 2, 5), {to.data(), 2, 5}, ctx,
                  mem);
      q.rewind(0);
    };
    run(y);
    x[2] = std::nanf("");
    run(again);
    for (std::size_t j = 0; j < 5; ++j) CHECK(std::isnan(again[j]));
    for (std::size_t j = 5; j < 10; ++j) CHECK(again[j] == y[j]);
  }
}
