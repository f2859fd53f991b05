// SPDX-License-Identifier: Apache-2.0
// Learns a function in pieces, saves the layer, loads it again, and gets the same output bit for bit.
#include <cmath>
#include <cstdio>
#include <moe/io/safetensors.hpp>
#include <moe/moe.hpp>
#include <vector>

using ffn = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

int main() {
  const moe::dim T = 256, d = 4;
  const ffn layer({.tokens = T, .d = d, .f = 16, .experts = 6});
  const auto n = static_cast<moe::dim>(layer.weight_bytes() / sizeof(float));
  const moe::adamw optimizer{.decay = 0.f};
  moe::buffer params(layer.weight_bytes()), grads(layer.weight_bytes()), state(optimizer.state_bytes(n));
  moe::buffer work(layer.context_bytes(T) + layer.scratch_bytes(T));
  moe::arena p(params.bytes()), g(grads.bytes()), s(state.bytes()), mem(work.bytes());
  const ffn::weights w = layer.make_weights(p);
  ffn::gradients dw = layer.make_gradients(g);
  const auto moments = optimizer.make_state(n, s);
  ffn::context ctx = layer.make_context(T, mem);
  moe::initialise(moe::serial{}, params.bytes(), layer.catalogue(), moe::rng(1));

  std::vector<float> x(T * d), y(x.size()), dy(x.size());
  const auto view = [&](auto& v) { return moe::matrix_view(v.data(), T, d); };
  const moe::warmup_cosine rate{.peak = 1e-2f, .warmup = 20, .steps = 400};
  for (moe::dim step = 0; step < 400; ++step) {
    const moe::rng random(2, static_cast<unsigned>(step));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = 2 * random.uniform(i) - 1;
    layer.forward(w, view(x), view(y), ctx, mem);

    double loss = 0;  // mean squared error against |x| where the first coordinate is positive, x^2 elsewhere
    for (std::size_t i = 0; i < x.size(); ++i) {
      const float wanted = x[i / d * d] > 0 ? std::fabs(x[i]) : x[i] * x[i];
      dy[i] = 2 * (y[i] - wanted) / static_cast<float>(x.size());
      loss += (y[i] - wanted) * (y[i] - wanted) / static_cast<double>(x.size());
    }
    // {}: no gradient of x is wanted; those of the weights take the place of the last step's
    layer.backward(w, view(x), ctx, view(dy), {}, dw, mem, moe::gradient_mode::replace);
    const double norm = moe::global_norm(moe::serial{}, grads.as<float>());
    optimizer.step(moe::serial{}, {.rate = rate(step), .step = step, .scale = moe::clip_factor(norm, 1.f)}, params.as<float>(),
                   grads.as<float>(), moments);
    if (step == 0 || step == 100 || step == 399) std::printf("step %3td  loss %.1e\n", step, loss);
  }

  moe::save("layer.safetensors", {{"block0", layer.catalogue(), params.bytes()}});
  moe::buffer again(layer.weight_bytes());
  moe::load("layer.safetensors", {{"block0", layer.catalogue(), again.bytes()}});
  moe::arena q(again.bytes());
  std::vector<float> reloaded(y.size());
  layer.forward(w, view(x), view(y), ctx, mem);
  layer.forward(layer.make_weights(q), view(x), view(reloaded), ctx, mem);
  std::printf("the reloaded layer %s\n", y == reloaded ? "gives the same bits" : "differs");
  std::remove("layer.safetensors");
  return y == reloaded ? 0 : 1;
}
