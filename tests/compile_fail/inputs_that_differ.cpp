// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: arguments 1 and 3, gate and expert, read different inputs [docs/policies.md]
// lines: <= 15
#include <vector>

#include "moe/moe.hpp"

using net = moe::layer<moe::linear_gate, moe::top_k<2>, moe::kv_block_expert, moe::lse_merge, moe::scalar<>>;

int main() {
  const net layer({.tokens = 64, .d = 32, .f = 64, .experts = 8});
  moe::buffer params(layer.weight_bytes()), grads(layer.weight_bytes());
  moe::buffer work(layer.context_bytes(64) + layer.scratch_bytes(64));
  moe::arena p(params.bytes()), g(grads.bytes()), mem(work.bytes());
  const net::weights w = layer.make_weights(p);
  net::gradients dw = layer.make_gradients(g);
  net::context ctx = layer.make_context(64, mem);
  std::vector<float> x(64 * 32), y(64 * 32), dx(64 * 32);
  layer.forward(w, {x.data(), 64, 32}, {y.data(), 64, 32}, ctx, mem);
  layer.backward(w, {x.data(), 64, 32}, ctx, {y.data(), 64, 32}, {dx.data(), 64, 32}, dw, mem);
  moe::check(ctx.plan);
  return w.gate.w(0, 0) > 0 ? static_cast<int>(layer.catalogue().size()) : 0;
}
