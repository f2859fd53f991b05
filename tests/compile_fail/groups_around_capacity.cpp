// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: argument 2 is not a Router on this backend; static_assert(moe::Router<R, B>) says why [docs/policies.md]
// lines: <= 15
#include <vector>

#include "moe/moe.hpp"

// Groups limit the keys of a choice, capacity bounds the choice that was made: capacity<grouped<top_k<2>>> would do.
using router = moe::grouped<moe::capacity<moe::top_k<2>>>;
using net = moe::layer<moe::linear_gate, router, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

int main() {
  const net layer({.tokens = 64, .d = 32, .f = 64, .experts = 8}, router{.groups = 4, .kept = 2});
  moe::buffer params(layer.weight_bytes()), work(layer.context_bytes(64) + layer.scratch_bytes(64));
  moe::arena p(params.bytes()), mem(work.bytes());
  const net::weights w = layer.make_weights(p);
  net::context ctx = layer.make_context(64, mem);
  std::vector<float> x(64 * 32), y(64 * 32);
  layer.forward(w, {x.data(), 64, 32}, {y.data(), 64, 32}, ctx, mem);
}
