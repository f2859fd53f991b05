// SPDX-License-Identifier: Apache-2.0
// Experts of different kinds in one layer, and a shared expert beside the plan.
#include <cstdio>
#include <moe/moe.hpp>

using backend = moe::scalar<>;
using mixed = moe::expert_set<moe::ffn_expert, moe::constant_expert, moe::copy_expert, moe::zero_expert>;
using routed = moe::layer<moe::linear_gate, moe::top_k<2>, mixed, moe::weighted_sum, backend>;
using shared = moe::gated_dense<moe::ffn_expert, backend>;  // y += sigmoid(<g, x>) F(x) for every token

int main() {
  const moe::dim T = 64, d = 32;
  // Experts 0 to 5 are feed-forward, then one of each kind that costs nothing.
  const mixed experts{{.count = 6, .f = 64}, {.count = 1}, {.count = 1}, {.count = 1}};
  const moe::sum net(routed({.tokens = T, .d = d, .experts = 9}, experts), shared({.tokens = T, .d = d, .f = 48}));

  moe::buffer params(net.weight_bytes()), work(net.inference_context_bytes(T) + net.scratch_bytes(T));
  moe::arena p(params.bytes()), mem(work.bytes());
  const auto w = net.make_weights(p);
  moe::initialise(moe::serial{}, params.bytes(), net.catalogue(), moe::rng(1));
  for (const moe::slot& s : net.catalogue()) std::printf("%-26s %4td x %td\n", s.name.c_str(), s.rows, s.cols);

  moe::buffer tokens(2 * T * d * sizeof(float));
  const auto v = tokens.as<float>();
  const moe::matrix_view<float> x(v.data(), T, d), y(v.data() + T * d, T, d);
  for (moe::dim i = 0; i < T * d; ++i) x.data[i] = moe::rng(2).normal(static_cast<unsigned>(i));
  auto ctx = net.make_inference_context(T, mem);
  net.forward(w, x, y, ctx, mem);

  const auto& offsets = ctx.routed.plan.offsets;
  const auto rows = [&](int first, int last) { return offsets[last] - offsets[first]; };
  std::printf("%d assignments: feed-forward %d, constant %d, copy %d, zero %d\n", offsets[9], rows(0, 6), rows(6, 7),
              rows(7, 8), rows(8, 9));
}
