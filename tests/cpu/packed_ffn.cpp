// SPDX-License-Identifier: Apache-2.0
#include "moe/expert/packed_ffn.hpp"
#include "moe/io/safetensors.hpp"

#include <doctest/doctest.h>

#include <cstdio>
#include <limits>

#include "moe/backend/executor/thread_pool.hpp"
#include "support/levels.hpp"
#include "support/packed_model.hpp"

namespace {

using moe::dim;
using backend = moe::cpu<>;
using dense_layer = testing::dense_layer<>;
template <class T>
using packed_layer = testing::packed_layer<T>;
using testing::packed_model, testing::reference_of, testing::distance, testing::packed_tolerance;

using int4_32 = moe::int4_groups<32>;
using int4_128 = moe::int4_groups<128, moe::bf16>;
static_assert(moe::Expert<moe::packed_ffn_expert<moe::bf16>, backend>);
static_assert(!moe::TrainableExpert<moe::packed_ffn_expert<moe::bf16>, backend>, "inference only");

std::size_t at(dim i) { return static_cast<std::size_t>(i); }

using testing::at_every_level;

}  // namespace

TEST_SUITE("expert/packed_ffn") {
  TEST_CASE_TEMPLATE("a layer of packed experts equals the formulas in double at every level", T, float, moe::bf16, moe::f16,
                     std::int8_t, int4_32, int4_128, moe::ternary) {
    for (const moe::shape s : {moe::shape{.d = 70, .f = 50, .experts = 5}, moe::shape{.d = 1, .f = 1, .experts = 2},
                               moe::shape{.d = 160, .f = 129, .experts = 3}}) {
      CAPTURE(s.d);
      testing::model<dense_layer> dense(dense_layer(s), 300, s.d, 1);
      at_every_level([&] {
        for (const dim tokens : {1, 3, 7, 40, 300}) {
          CAPTURE(tokens);
          const packed_model<T> m(dense, tokens);
          CHECK(distance(m.y, reference_of(m, {dense.x.data(), tokens, s.d})) < packed_tolerance<T>);
        }
      });
    }
  }

  TEST_CASE_TEMPLATE("results are equal bits for any number of threads, by chunks of rows and by runs of panels", T, float,
                     moe::bf16, moe::f16, std::int8_t, int4_32, moe::ternary) {
    using pooled = moe::cpu<moe::arch::native, moe::pool_executor>;
    const moe::shape s{.d = 96, .f = 200, .experts = 3};
    testing::model<dense_layer> dense(dense_layer(s), 700, s.d, 2);
    at_every_level([&] {
      const packed_model<T, moe::cpu<moe::arch::native, moe::serial>> alone(dense, 700);  // chunks of rows
      for (const int threads : {2, 3, 64}) {  // few chunks a thread: runs of panels
        const moe::thread_pool pool(threads);
        const packed_model<T, pooled> shared(dense, 700, pooled(pool));
        CHECK(shared.y == alone.y);
      }
    });
  }
  TEST_CASE_TEMPLATE("one expert may have all rows, others none, and a batch no tokens, at every level", T, moe::bf16, int4_32) {
    const moe::shape s{.d = 40, .f = 24, .experts = 4};
    testing::model<dense_layer> dense(dense_layer(s), 50, s.d, 3);
    for (dim j = 0; j < s.d; ++j) dense.w.gate.w(2, j) = dense.w.gate.w(3, j) = 0;
    for (dim t = 0; t < 50; ++t) dense.x[at(t * s.d)] = 5;
    for (dim e = 0; e < 2; ++e) dense.w.gate.w(e, 0) = 50;
    at_every_level([&] {
      packed_model<T> m(dense, 50);
      CHECK(m.ctx.plan.offsets[1] == 50);
      CHECK(m.ctx.plan.offsets[4] == 100);
      CHECK(distance(m.y, reference_of(m, {dense.x.data(), 50, s.d})) < packed_tolerance<T>);
      m.run({dense.x.data(), 0, s.d});
      CHECK(m.y.empty());
    });
  }
  TEST_CASE("rows of x and of y may lie apart, and what lies between them is left alone") {
    const moe::shape s{.d = 40, .f = 24, .experts = 4};
    const dim apart = s.d + 7, tokens = 30;
    testing::model<dense_layer> dense(dense_layer(s), tokens, s.d, 3);
    at_every_level([&] {
      const packed_model<moe::bf16> m(dense, tokens);
      std::vector<float> x(at(tokens * apart), NAN), y(at(tokens * apart), -77.f);
      for (dim t = 0; t < tokens; ++t) std::copy_n(&dense.x[at(t * s.d)], s.d, &x[at(t * apart)]);
      moe::arena mem(m.work.bytes());
      auto ctx = m.net.make_inference_context(tokens, mem);
      m.net.forward(m.w, moe::matrix_view<const float>{x.data(), tokens, s.d, apart},
                    moe::matrix_view<float>{y.data(), tokens, s.d, apart}, ctx, mem);
      for (dim t = 0; t < tokens; ++t) {
        CHECK(std::equal(&y[at(t * apart)], &y[at(t * apart)] + s.d, &m.y[at(t * s.d)]));
        for (dim j = s.d; j < apart; ++j) CHECK(y[at(t * apart + j)] == -77.f);
      }
    });
  }
  TEST_CASE("other forms, layouts and biases run as in the expert that was packed") {
    using gpt_oss_layer =
        moe::layer<moe::biased_linear_gate, moe::top_k<2>, moe::gpt_oss_expert, moe::weighted_sum, backend>;
    using packed_gpt_oss = moe::packed_ffn_expert<float, moe::gpt_oss_glu, true>;
    const moe::shape s{.d = 40, .f = 70, .experts = 3};
    testing::model<gpt_oss_layer> from(gpt_oss_layer(s), 9, s.d, 4);
    from.forward();
    moe::layer<moe::biased_linear_gate, moe::top_k<2>, packed_gpt_oss, moe::weighted_sum, backend> net(s);
    moe::buffer params(net.weight_bytes()), work(net.inference_context_bytes(9) + net.scratch_bytes(9));
    moe::arena p(params.bytes()), mem(work.bytes());
    auto w = net.make_weights(p);
    w.gate = from.w.gate;
    net.experts().pack<moe::interleaved>(from.w.experts, s, w.experts);
    auto ctx = net.make_inference_context(9, mem);
    std::vector<float> y(9 * 40);
    net.forward(w, from.in, {y.data(), 9, 40}, ctx, mem);
    for (std::size_t i = 0; i < y.size(); ++i) REQUIRE(y[i] == doctest::Approx(from.y[i]).epsilon(1e-4));

    using plain_layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::basic_ffn_expert<moe::plain<moe::relu>>,
                                   moe::weighted_sum, backend>;
    using packed_plain =
        moe::layer<moe::linear_gate, moe::top_k<2>, moe::packed_ffn_expert<float, moe::plain<moe::relu>>, moe::weighted_sum, backend>;
    testing::model<plain_layer> plain(plain_layer(s), 9, s.d, 5);
    plain.forward();
    const packed_plain one(s);
    moe::buffer one_params(one.weight_bytes()), one_work(one.inference_context_bytes(9) + one.scratch_bytes(9));
    moe::arena op(one_params.bytes()), omem(one_work.bytes());
    auto ow = one.make_weights(op);
    ow.gate.w = plain.w.gate.w;
    one.experts().pack(plain.w.experts, s, ow.experts);
    auto octx = one.make_inference_context(9, omem);
    one.forward(ow, plain.in, {y.data(), 9, 40}, octx, omem);
    for (std::size_t i = 0; i < y.size(); ++i) REQUIRE(y[i] == doctest::Approx(plain.y[i]).epsilon(1e-4));
  }
  TEST_CASE_TEMPLATE("packed weights are written to a checkpoint and read back as they were", T, moe::bf16, std::int8_t, int4_32,
                     moe::ternary) {
    const moe::shape s{.d = 40, .f = 70, .experts = 3};
    testing::model<dense_layer> dense(dense_layer(s), 6, s.d, 7);
    packed_model<T> m(dense, 6);
    const std::string path = "packed_ffn_test.safetensors";
    moe::save(path, {{"block", m.net.catalogue(), m.params.bytes()}});
    moe::buffer again(m.net.weight_bytes());
    moe::load(path, {{"block", m.net.catalogue(), again.bytes()}});
    std::remove(path.c_str());
    const auto kept = m.y;
    moe::arena p(again.bytes());
    m.w = m.net.make_weights(p);
    m.run({dense.x.data(), 6, s.d});
    CHECK(m.y == kept);
  }
  TEST_CASE("what does not fit is a clear error") {
    const moe::shape s{.d = 40, .f = 24, .experts = 2};
    testing::model<dense_layer> dense(dense_layer(s), 4, s.d, 3);
    CHECK_THROWS_WITH_AS((packed_layer<float>({.d = 4, .f = 0, .experts = 2})),
                         "packed_ffn_expert: f is 0, expected at least 1", moe::shape_error);
    CHECK_THROWS_WITH_AS((packed_layer<std::int8_t>({.d = 70000, .f = 8, .experts = 2})),
                         "packed_ffn_expert: d is 70000 and f 8, expected at most 65536", moe::shape_error);
    const moe::packed_ffn_expert<std::int8_t> expert;
    moe::buffer memory(1 << 16);
    moe::arena mem(memory.bytes());
    CHECK_THROWS_WITH_AS(expert.pack(dense.w.experts, {.d = 40, .f = 32, .experts = 2}, mem),
                         "ffn_expert: up is 48 x 40, expected 64 x 40 (E*f x d)", moe::shape_error);
    auto w = expert.pack(dense.w.experts, s, mem);
    w.down.cols = 23;
    CHECK_THROWS_WITH_AS(expert.check(w, s), "packed_ffn_expert: down has 23 columns, expected 24 (unpacked)",
                         moe::shape_error);
  }
}
