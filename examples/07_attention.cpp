// SPDX-License-Identifier: Apache-2.0
// Gated attention over a text, trained for a while and then decoded one token at a time through a cache.
#include <cmath>
#include <cstdio>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"

constexpr moe::dim d = 32, tokens = 48;
constexpr moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 16, .dv = 16};
// [features]
/// Rotary positions, normalised heads, and a gate on each head whose logits are columns of the projection of queries.
struct gated : moe::attention_features {
  using rotary = moe::rotary<moe::half_split_pairs>;
  using output_gate = moe::output_gate<moe::headwise>;
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
  static constexpr bool normalises_heads = true;
};
using attention = moe::self_attention<gated, moe::cpu<>>;
/// The same over the two best blocks of 16 keys and the query's own (MoBA).
struct gated_blocks : gated {
  using selection = moe::block_attention;
};
// [/features]

/// Mean squared distance to a wanted output, and half of its gradient.
float loss(const std::vector<float>& y, const std::vector<float>& wanted, std::vector<float>& dy) {
  float sum = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    dy[i] = (y[i] - wanted[i]) / static_cast<float>(y.size());
    sum += (y[i] - wanted[i]) * dy[i];
  }
  return sum;
}

int main() {
  constexpr std::size_t n = tokens * d;
  std::vector<float> x(n), wanted(n), y(n), dy(n), again(n);
  for (std::size_t i = 0; i < n; ++i) {
    x[i] = moe::rng(1).normal(i);
    wanted[i] = i < 4 * d ? 0.f : x[i - 4 * d];  // each token is to repeat the fourth before it
  }
  const attention layer(d, heads);
  moe::buffer parameters(layer.weight_bytes()), slopes(layer.weight_bytes()), angles(1 << 14);
  moe::buffer work(layer.context_bytes(tokens) + layer.scratch_bytes(tokens));
  moe::arena params(parameters.bytes()), grads(slopes.bytes()), table(angles.bytes()), mem(work.bytes());
  const auto w = layer.make_weights(params);
  auto dw = layer.make_gradients(grads);
  moe::initialise(moe::serial{}, parameters.bytes(), layer.catalogue(), moe::rng(2));

  // [train]
  const attention::input in{{x.data(), tokens, d}, {}, layer.make_table(tokens, table)};
  auto context = layer.make_context(tokens, mem);
  float first = 0, last = 0;
  for (int step = 0; step < 400; ++step) {
    layer.forward(w, in, {y.data(), tokens, d}, context, mem);
    last = loss(y, wanted, dy);
    first = step == 0 ? last : first;
    layer.backward(w, in, context, {dy.data(), tokens, d}, {}, dw, mem, moe::gradient_mode::replace);
    for (std::size_t i = 0; i < slopes.as<float>().size(); ++i) parameters.as<float>()[i] -= 4.f * slopes.as<float>()[i];
  }
  // [/train]
  std::printf("loss fell to %s of what it was\n", last < 0.5f * first ? "less than half" : "more than half");

  // [decode]
  moe::buffer kept(layer.cache_bytes<moe::bf16>(1, tokens));
  moe::arena cache_memory(kept.bytes());
  auto cache = layer.make_cache<moe::bf16>(1, tokens, cache_memory);
  moe::buffer scratch(layer.scratch_bytes(tokens, cache));
  moe::arena step(scratch.bytes());
  for (moe::dim t = 0; t < tokens; ++t)  // one token at a time; several at once are a piece of a prefill
    layer.forward(w, {{x.data() + t * d, 1, d}, {}, in.angles}, {again.data() + t * d, 1, d}, cache, step);
  // [/decode]
  layer.forward(w, in, {y.data(), tokens, d}, context, mem);
  float worst = 0;
  for (std::size_t i = 0; i < n; ++i) worst = std::fmax(worst, std::fabs(again[i] - y[i]));
  std::printf("decoding through a cache of bf16 differs by less than %s\n", worst < 0.05f ? "0.05" : "1");
}
