// SPDX-License-Identifier: Apache-2.0
// Feed-forward experts alone on a plan made by hand.
#include <doctest/doctest.h>

#include "moe/backend/scalar.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;
using moe::matrix_view;
using backend = moe::scalar<>;
using chunked_biased = moe::basic_ffn_expert<moe::glu<moe::silu>, moe::chunked, true>;

constexpr moe::shape sizes{.tokens = 4, .d = 24, .f = 40, .experts = 3};
constexpr dim rows = 6;
// Experts 0 and 2 take three tokens each, expert 1 none.
constexpr idx offsets[] = {0, 3, 3, 6}, token[] = {0, 1, 3, 1, 2, 3}, token_offsets[] = {0, 1, 3, 4, 6},
              position[] = {0, 1, 3, 4, 2, 5};
constexpr float weight[] = {0.3f, 0, 1.7f, -0.5f, 1, 1e-30f}, ones[] = {1, 1, 1, 1, 1, 1};

std::size_t at(dim i) { return static_cast<std::size_t>(i); }

template <class W>
void fill(matrix_view<W> m, std::uint64_t seed) {
  const auto v = testing::normals(m.rows * m.cols, seed, 0.2f);
  for (dim i = 0; i < m.rows * m.cols; ++i) m(i / m.cols, i % m.cols) = W(v[at(i)]);
}

/// One forward and one backward of an expert.
template <class X>
struct run {
  std::vector<float> x = testing::normals(sizes.tokens * sizes.d, 1), dy = testing::normals(sizes.tokens * sizes.d, 2),
                     dweight;
  moe::buffer memory{1 << 20};
  moe::arena mem{memory.bytes()};
  moe::ffn_weights dw;
  matrix_view<float> ys;

  run(const float* combine, moe::gradient_mode mode) : dweight(at(rows)) {
    const X expert{};
    auto w = expert.make_weights(sizes, mem);
    dw = expert.make_gradients(sizes, mem);
    auto ctx = expert.make_context(sizes, rows, mem);
    ys = expert.make_output(sizes, rows, mem);
    std::uint64_t seed = 10;
    for (auto* m : {&w.up, &w.gate, &w.gate_up, &w.down}) fill(*m, seed++);
    for (auto* m : {&w.up_bias, &w.gate_bias, &w.gate_up_bias, &w.down_bias}) fill(*m, seed++);
    if (mode == moe::gradient_mode::replace)
      for (auto* m : {&dw.up, &dw.gate, &dw.down})
        for (dim i = 0; i < m->rows * m->cols; ++i) m->data[i] = NAN;
    moe::call<backend> on = testing::on<backend>(sizes);
    on.gradients = mode;
    const moe::bank_rows plan{offsets, token, {combine, at(rows)}, token_offsets, position};
    expert.forward(on, w, {x.data(), sizes.tokens, sizes.d}, plan, ys, ctx);
    expert.backward(on, w, {x.data(), sizes.tokens, sizes.d}, plan, ctx,
                    moe::gathered<float>{{dy.data(), sizes.tokens, sizes.d}, token, combine}, {}, dw, dweight);
  }
};

}  // namespace

TEST_SUITE("expert/ffn") {
  TEST_CASE_TEMPLATE("the router's gradient is <dy, ys> of every row, though no row is kept, whatever the row weighs", X,
                     moe::ffn_expert, moe::bf16_ffn_expert, moe::basic_ffn_expert<moe::plain<moe::gelu>>,
                     moe::gpt_oss_expert, chunked_biased) {
    const run<X> got(weight, moe::gradient_mode::add);
    for (dim r = 0; r < rows; ++r) {
      CAPTURE(r);
      double wanted = 0, terms = 0;
      for (dim j = 0; j < sizes.d; ++j) {
        const double term = double{got.dy[at(token[r] * sizes.d + j)]} * got.ys(r, j);
        wanted += term;
        terms += std::fabs(term);
      }
      REQUIRE(terms > 0);
      CHECK(std::fabs(got.dweight[at(r)] - wanted) < 1e-6 * terms);
    }
    CHECK(run<X>(ones, moe::gradient_mode::add).dweight == got.dweight);
  }
  TEST_CASE_TEMPLATE("gradients of an expert without rows are 0 where they are replaced", X, moe::ffn_expert,
                     moe::bf16_ffn_expert) {
    const run<X> got(weight, moe::gradient_mode::replace);
    for (const auto& m : {got.dw.up, got.dw.gate, got.dw.down}) {
      const dim n = m.rows / sizes.experts;
      for (dim i = 0; i < m.rows; ++i)
        for (dim j = 0; j < m.cols; ++j) REQUIRE((m(i, j) == 0) == (i / n == 1));
    }
  }
}
