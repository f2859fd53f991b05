// SPDX-License-Identifier: Apache-2.0
// Activations of bf16 at the border of a layer: the bits are those of float, widened on the way in and rounded once on the way
// out.
#include "moe/border.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "moe/backend/host_packed.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/combine/mix_before_trunk.hpp"
#include "moe/combine/residual.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/expert/packed_ffn.hpp"
#include "moe/expert/set.hpp"
#include "moe/expert/trivial.hpp"
#include "moe/gate/cosine.hpp"
#include "moe/gate/linear.hpp"
#include "moe/router/capacity.hpp"
#include "moe/router/top_k.hpp"
#include "moe/sum.hpp"
#include "support/any_weights.hpp"
#include "support/executors.hpp"
#include "support/testing.hpp"

namespace {

using moe::bf16;
using moe::dim;
using moe::matrix_view;
using backend = moe::scalar<testing::shuffling>;

template <class X, class Gate = moe::linear_gate, class Router = moe::top_k<2>, class Combine = moe::weighted_sum>
using layer = moe::layer<Gate, Router, X, Combine, backend>;
using packed = moe::packed_ffn_expert<float>;
using packed_bytes = moe::packed_ffn_expert<std::int8_t>;
using with_copies = moe::expert_set<moe::ffn_expert, moe::copy_expert>;

/// Forward of one layer with each of x and y in float and in bf16.
template <class L>
void check_border(const L& net, dim T) {
  testing::model<L> m(net, T, net.sizes().d, 3, false);
  testing::fill_other_weights(m);
  std::vector<bf16> x;
  for (float& v : m.x) v = static_cast<float>(x.emplace_back(v));  // the same numbers in both
  const dim d = net.sizes().d;
  const matrix_view<const bf16> in{x.data(), T, d};
  const moe::buffer bytes(m.net.template scratch_bytes<bf16>(T));
  moe::arena scratch(bytes.bytes());
  m.forward();
  std::vector<float> wide(m.y.size());
  m.net.forward(m.w, in, {wide.data(), T, d}, m.ctx, scratch);
  CHECK(wide == m.y);
  std::vector<bf16> rounded, y(m.y.size()), from_float(m.y.size());
  for (const float v : m.y) rounded.push_back(bf16(v));
  m.net.forward(m.w, in, matrix_view<bf16>{y.data(), T, d}, m.ctx, scratch);
  CHECK(y == rounded);
  m.net.forward(m.w, m.in, matrix_view<bf16>{from_float.data(), T, d}, m.ctx, scratch);
  CHECK(from_float == rounded);
  if (T > 0) CHECK(std::any_of(m.y.begin(), m.y.end(), [](float v) { return v != 0 && v == v; }));
}

constexpr moe::shape sizes{.d = 300, .f = 20, .experts = 4};

}  // namespace

TEST_SUITE("border") {
  TEST_CASE_TEMPLATE("tokens of bf16 give the bits of their floats, and results of bf16 are those of float rounded once", L,
                     layer<moe::ffn_expert>, layer<moe::bf16_ffn_expert>, layer<packed>, layer<packed_bytes>,
                     layer<moe::ffn_expert, moe::cosine_gate>,
                     layer<moe::ffn_expert, moe::biased_linear_gate, moe::capacity<moe::top_k<2>>, moe::residual<>>,
                     layer<moe::ffn_expert, moe::linear_gate, moe::top_k<1>, moe::mix_before_trunk<moe::ffn_expert>>) {
    for (const dim tokens : {0, 1, 40}) {
      CAPTURE(tokens);
      check_border(L(sizes), tokens);
    }
  }
  TEST_CASE("so do sets of experts, shared experts, gated or not, and their sums") {
    const with_copies experts{{.count = 3, .f = 20}, {.count = 1}};
    check_border(layer<with_copies>(sizes, experts), 33);
    check_border(moe::dense<moe::ffn_expert, backend>(sizes), 33);
    check_border(moe::gated_dense<moe::ffn_expert, backend>(sizes), 33);
    using routed = layer<moe::ffn_expert>;
    using shared = moe::gated_dense<moe::bf16_ffn_expert, backend>;
    check_border(moe::sum<routed, shared>(routed(sizes), shared(sizes)), 33);
  }
  TEST_CASE("numbers that are not finite stay so, and halves round to the even one") {
    const float from[] = {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), 0x1.01p0f, 0x1.03p0f};
    bf16 to[4];
    moe::detail::round(from, to, 4);
    CHECK(static_cast<float>(to[0]) != static_cast<float>(to[0]));
    CHECK(static_cast<float>(to[1]) == -std::numeric_limits<float>::infinity());
    CHECK(static_cast<float>(to[2]) == 1.f);
    CHECK(static_cast<float>(to[3]) == 0x1.04p0f);
  }
  TEST_CASE("rows of bf16 that do not fit are refused as those of float are, before anything is written") {
    testing::model<layer<moe::ffn_expert>> m(layer<moe::ffn_expert>(sizes), 5, sizes.d, 1);
    std::vector<bf16> x(static_cast<std::size_t>(5 * sizes.d)), y(x.size(), bf16(3.f));
    const matrix_view<const bf16> in{x.data(), 5, sizes.d};
    const auto refused = [&](auto given, auto to) {
      try {
        m.net.forward(m.w, given, to, m.ctx, m.work);
      } catch (const moe::shape_error& e) {
        return std::string(e.what());
      }
      return std::string("nothing was thrown");
    };
    CHECK(refused(in.slice(0, 4), matrix_view<bf16>{y.data(), 5, sizes.d}) ==
          "moe::layer::forward: x is 4 x 300, expected 5 x 300 (T x d)");
    CHECK(refused(in, matrix_view<bf16>{y.data(), 5, 299}) == "moe::layer::forward: y is 5 x 299, expected 5 x 300 (T x d)");
    CHECK(refused(in, matrix_view<bf16>{nullptr, 5, 300}) ==
          "moe::layer::forward: y has no memory, expected 5 x 300 (T x d)");
    const moe::buffer little(m.net.scratch_bytes(5));
    moe::arena scratch(little.bytes());
    CHECK(m.net.scratch_bytes<bf16>(5) > m.net.scratch_bytes(5));
    CHECK_THROWS_AS(m.net.forward(m.w, in, matrix_view<bf16>{y.data(), 5, sizes.d}, m.ctx, scratch), moe::shape_error);
    CHECK(y == std::vector<bf16>(y.size(), bf16(3.f)));
  }
}
