// SPDX-License-Identifier: Apache-2.0
// Rows of feed-forward experts carry no log-sum-exp, so this combine cannot merge them.
#include "moe/combine/lse_merge.hpp"
#include "moe/moe.hpp"

void f(moe::matrix_view<const float> x, moe::matrix_view<float> y, moe::arena& mem) {
  using wrong = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::lse_merge, moe::scalar<>>;
  const wrong net({.d = 8, .f = 8, .experts = 4});
  auto w = net.make_weights(mem);
  auto ctx = net.make_context(4, mem);
  net.forward(w, x, y, ctx, mem);
}
