// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: this router cannot weigh a given plan, so it cannot replay one [docs/policies.md]
// lines: <= 15
#include <vector>

#include "moe/moe.hpp"

// Chooses as top_k does and does not offer `weigh`.
struct private_router {
  using plan = moe::routing_plan;
  using weights = moe::nothing;
  using context = moe::nothing;
  moe::dim max_rows(moe::shape s) const noexcept { return 2 * s.tokens; }
  template <class B>
  void forward(const moe::call<B>& on, const weights& w, moe::matrix_view<const float> scores, plan& p, context&) const noexcept {
    moe::top_k<2>::context none;
    moe::top_k<2>{}.forward(on, w, scores, p, none);
  }
};
using net = moe::layer<moe::linear_gate, private_router, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

int main() {
  const net layer({.tokens = 64, .d = 32, .f = 64, .experts = 8});
  moe::buffer params(layer.weight_bytes()), work(layer.context_bytes(64) + layer.scratch_bytes(64));
  moe::arena p(params.bytes()), mem(work.bytes());
  const net::weights w = layer.make_weights(p);
  net::context ctx = layer.make_context(64, mem);
  std::vector<float> x(64 * 32), y(64 * 32);
  layer.forward(w, {x.data(), 64, 32}, {y.data(), 64, 32}, ctx, mem);
  const moe::recorded_plan recorded = moe::record(ctx.plan);
  layer.replay(w, {x.data(), 64, 32}, recorded.plan(), {y.data(), 64, 32}, ctx, mem);
}
