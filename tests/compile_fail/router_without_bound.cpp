// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: argument 2 is not a Router on this backend; static_assert(moe::Router<R, B>) says why [docs/policies.md]
// lines: <= 15
#include <vector>

#include "moe/moe.hpp"

// Forgets max_rows.
struct round_robin {
  using plan = moe::routing_plan;
  using weights = moe::nothing;
  using context = moe::nothing;
  template <class B>
  void forward(const moe::call<B>&, const weights&, moe::matrix_view<const float>, plan&, context&) const noexcept {}
};
using net = moe::layer<moe::linear_gate, round_robin, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

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
