// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <moe/moe.hpp>
using ffn = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

int main() {
  const ffn layer({.tokens = 3, .d = 4, .f = 8, .experts = 4});
  moe::buffer params(layer.weight_bytes()), work(layer.context_bytes(3) + layer.scratch_bytes(3));
  moe::arena p(params.bytes()), mem(work.bytes());
  const ffn::weights w = layer.make_weights(p);     // views into params
  ffn::context ctx = layer.make_context(3, mem);    // the plan, and what backward will need
  moe::initialise(moe::serial{}, params.bytes(), layer.catalogue(), moe::rng(1));
  float x[3][4] = {{1, 2, 3, 4}, {4, 3, 2, 1}, {0, 1, 0, -1}}, y[3][4];
  layer.forward(w, {x[0], 3, 4}, {y[0], 3, 4}, ctx, mem);  // allocates nothing
  for (int e = 0; e < 4; ++e)
    for (int r = ctx.plan.offsets[e]; r < ctx.plan.offsets[e + 1]; ++r)
      std::printf("expert %d takes token %d with weight %.2f\n", e, ctx.plan.token[r], ctx.plan.weight[r]);
}
