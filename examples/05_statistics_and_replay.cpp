// SPDX-License-Identifier: Apache-2.0
// Looks at the routing of a layer with capacity, records the plan, and replays it with other weights.
#include <cstdio>
#include <moe/moe.hpp>
#include <vector>

using router = moe::capacity<moe::top_k<2>>;
using ffn = moe::layer<moe::linear_gate, router, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

int main() {
  const moe::dim T = 512, d = 16;
  const ffn layer({.tokens = T, .d = d, .f = 32, .experts = 8}, router{.inner = {}, .limit = {.factor = 1.25f}});
  moe::buffer params(layer.weight_bytes()), grads(layer.weight_bytes());
  moe::buffer work(2 * layer.context_bytes(T) + layer.scratch_bytes(T));
  moe::arena p(params.bytes()), g(grads.bytes()), mem(work.bytes());
  const ffn::weights w = layer.make_weights(p);
  ffn::gradients dw = layer.make_gradients(g);
  moe::initialise(moe::serial{}, params.bytes(), layer.catalogue(), moe::rng(1));

  std::vector<float> x(T * d), y(T * d);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = moe::rng(2).normal(i) + (i % d == 0 ? 1.f : 0.f);  // tokens lean one way
  const auto view = [&](auto& v) { return moe::matrix_view(v.data(), T, d); };

  ffn::context ctx = layer.make_context(T, mem);
  layer.forward(w, view(x), view(y), ctx, mem);
  const moe::routing_statistics s(ctx.plan);
  std::printf("rows %td, dropped %td; busiest expert %td of %td (%.2f times the mean), entropy %.2f of %.2f nats\n", s.rows,
              s.dropped, s.busiest, T, s.imbalance, s.entropy, 2.08);

  const moe::recorded_plan recorded = moe::record(ctx.plan);  // a value: moe/io/plan_file.hpp writes and reads it
  for (moe::dim i = 0; i < w.gate.w.rows * w.gate.w.cols; ++i) w.gate.w.data[i] += 0.3f * moe::rng(3).normal(static_cast<unsigned>(i));

  ffn::context again = layer.make_context(T, mem);
  layer.replay(w, view(x), recorded.plan(), view(y), again, mem);  // the old choices, weighed by today's scores
  layer.backward(w, view(x), again, view(x), {}, dw, mem);         // and their gradients
  ffn::context fresh = again;
  moe::dim kept = 0, moved = 0;
  for (moe::dim r = 0; r < s.rows; ++r) kept += again.plan.token[static_cast<std::size_t>(r)] == ctx.plan.token[static_cast<std::size_t>(r)];
  for (moe::dim r = 0; r < s.rows; ++r)
    moved += again.plan.weight[static_cast<std::size_t>(r)] != ctx.plan.weight[static_cast<std::size_t>(r)];
  std::printf("replayed: %td of %td assignments are the same, %td have another weight\n", kept, s.rows, moved);

  layer.forward(w, view(x), view(y), fresh, mem);
  const moe::routing_statistics now(fresh.plan);
  std::printf("routed anew: rows %td, dropped %td\n", now.rows, now.dropped);
}
