// SPDX-License-Identifier: Apache-2.0
// A layer on the CPU backend says the same as on the scalar one: what the packages of moe::cpu are tried with.
#include <cmath>
#include <cstdio>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"

constexpr moe::dim T = 16, d = 24;

template <class Backend>
std::vector<float> output() {
  using ffn = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, Backend>;
  const ffn layer({.tokens = T, .d = d, .f = 40, .experts = 6});
  moe::buffer params(layer.weight_bytes()), work(layer.context_bytes(T) + layer.scratch_bytes(T));
  moe::arena p(params.bytes()), mem(work.bytes());
  const auto w = layer.make_weights(p);
  auto ctx = layer.make_context(T, mem);

  float phase = 0;
  for (float& value : params.template as<float>()) value = std::sin(phase += 0.7f);
  std::vector<float> x(T * d), y(T * d);
  for (float& value : x) value = std::cos(phase += 0.3f);
  layer.forward(w, {x.data(), T, d}, {y.data(), T, d}, ctx, mem);
  return y;
}

int main() {
  const auto scalar = output<moe::scalar<>>(), cpu = output<moe::cpu<>>();
  float largest = 0, difference = 0;
  for (std::size_t i = 0; i < scalar.size(); ++i) {
    largest = std::fmax(largest, std::fabs(scalar[i]));
    difference = std::fmax(difference, std::fabs(scalar[i] - cpu[i]));
  }
  const bool equal = largest > 0 && difference < 1e-4f * largest;
  std::puts(equal ? "scalar and cpu agree" : "scalar and cpu differ");
  return equal ? 0 : 1;
}
