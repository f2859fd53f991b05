// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using ffn = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

// [infer]
/// Tokens of bf16 to results of bf16.
std::vector<moe::bf16> infer(const ffn& layer, const ffn::weights& w, const std::vector<moe::bf16>& tokens) {
  const moe::dim d = layer.sizes().d, T = static_cast<moe::dim>(tokens.size()) / d;
  moe::buffer work(layer.inference_context_bytes(T) + layer.scratch_bytes<moe::bf16>(T));
  moe::arena mem(work.bytes());
  ffn::context ctx = layer.make_inference_context(T, mem);

  std::vector<moe::bf16> results(tokens.size());
  const moe::matrix_view<const moe::bf16> x{tokens.data(), T, d};
  const moe::matrix_view<moe::bf16> y{results.data(), T, d};
  layer.forward(w, x, y, ctx, mem);
  return results;
}
// [/infer]

}  // namespace

TEST_SUITE("docs/backends") {
  TEST_CASE("a layer takes and gives bf16") {
    testing::model<ffn> m(ffn({.d = 16, .f = 32, .experts = 4}), 9, 16, 1, false);
    std::vector<moe::bf16> tokens, rounded;
    for (float& v : m.x) v = static_cast<float>(tokens.emplace_back(v));
    m.forward();
    for (const float v : m.y) rounded.emplace_back(v);
    CHECK(infer(m.net, m.w, tokens) == rounded);
  }
}
