// SPDX-License-Identifier: Apache-2.0
// Packs the experts of a layer into smaller types for inference and shows what each costs and keeps.
#include <cmath>
#include <cstdio>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"

using dense = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::cpu<>>;
constexpr moe::shape sizes{.d = 128, .f = 256, .experts = 8};
constexpr moe::dim tokens = 64;

// [pack]
template <class T>
using packed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::packed_ffn_expert<T>, moe::weighted_sum, moe::cpu<>>;

template <class T>
std::vector<float> run(const dense::weights& from, moe::matrix_view<const float> x, moe::buffer& memory) {
  const packed<T> net(sizes);
  memory = moe::buffer(net.weight_bytes());
  moe::buffer work(net.inference_context_bytes(x.rows) + net.scratch_bytes(x.rows));
  moe::arena params(memory.bytes()), mem(work.bytes());

  auto w = net.make_weights(params);
  w.gate = from.gate;                                  // the router stays in float32
  net.experts().pack(from.experts, sizes, w.experts);  // once, at load time

  std::vector<float> y(static_cast<std::size_t>(x.rows * x.cols));
  auto context = net.make_inference_context(x.rows, mem);
  net.forward(w, x, {y.data(), x.rows, x.cols}, context, mem);
  return y;
}
// [/pack]

template <class T>
void show(const char* name, const dense::weights& from, moe::matrix_view<const float> x, const std::vector<float>& exact) {
  moe::buffer memory;
  const std::vector<float> y = run<T>(from, x, memory);
  double error = 0, size = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    error += std::pow(y[i] - exact[i], 2.0);
    size += std::pow(exact[i], 2.0);
  }
  const double weights = 3.0 * sizes.d * sizes.f * sizes.experts, off = std::sqrt(error / size);
  std::printf("%-17s %.2f bytes a weight, output off by less than %s %%\n", name, static_cast<double>(memory.size()) / weights,
              off < 1e-5 ? "0.001" : off < 0.01 ? "1" : off < 0.05 ? "5" : off < 0.2 ? "20" : "100");
}

int main() {
  const dense net(sizes);
  moe::buffer memory(net.weight_bytes()), work(net.inference_context_bytes(tokens) + net.scratch_bytes(tokens));
  moe::arena params(memory.bytes()), mem(work.bytes());
  const auto w = net.make_weights(params);
  moe::initialise(moe::serial{}, memory.bytes(), net.catalogue(), moe::rng(1));
  std::vector<float> x(tokens * sizes.d), y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = moe::rng(2).normal(i);
  auto context = net.make_inference_context(tokens, mem);
  net.forward(w, {x.data(), tokens, sizes.d}, {y.data(), tokens, sizes.d}, context, mem);

  const moe::matrix_view<const float> in{x.data(), tokens, sizes.d};
  show<float>("float", w, in, y);
  show<moe::bf16>("bf16", w, in, y);
  show<moe::f16>("f16", w, in, y);
  show<std::int8_t>("int8", w, in, y);
  show<moe::int4_groups<128>>("int4, 128 a group", w, in, y);
  show<moe::int4_groups<32>>("int4, 32 a group", w, in, y);
  show<moe::ternary>("ternary", w, in, y);  // for weights that were trained to be: of others little is left
}
