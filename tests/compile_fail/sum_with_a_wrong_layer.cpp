// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: argument 4 cannot combine this router's plan with this expert's output [docs/policies.md]
// lines: <= 15
#include <vector>

#include "moe/moe.hpp"

using B = moe::scalar<>;
using routed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::lse_merge, B>;
using net = moe::sum<routed, moe::dense<moe::ffn_expert, B>>;

int main() {
  const net layer(routed({.d = 32, .f = 64, .experts = 8}), moe::dense<moe::ffn_expert, B>({.d = 32, .f = 64}));
  moe::buffer params(layer.weight_bytes()), grads(layer.weight_bytes());
  moe::buffer work(layer.context_bytes(64) + layer.scratch_bytes(64));
  moe::arena p(params.bytes()), g(grads.bytes()), mem(work.bytes());
  const net::weights w = layer.make_weights(p);
  net::gradients dw = layer.make_gradients(g);
  net::context ctx = layer.make_context(64, mem);
  std::vector<float> x(64 * 32), y(64 * 32), dx(64 * 32);
  layer.forward(w, {x.data(), 64, 32}, {y.data(), 64, 32}, ctx, mem);
  layer.backward(w, {x.data(), 64, 32}, ctx, {y.data(), 64, 32}, {dx.data(), 64, 32}, dw, mem);
  return static_cast<int>(layer.catalogue().size());
}
