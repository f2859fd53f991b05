// SPDX-License-Identifier: Apache-2.0
/// A feed-forward layer and a set of different experts.
#include "compare.cuh"

namespace {

namespace layers = testing::layers;

// [use]
using ffn = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::cuda<>>;

/// y[T,d] of x[T,d]; `weights` is the flat buffer of a layer on any backend, they have one layout.
std::vector<float> infer(moe::shape s, std::span<const float> weights, std::span<const float> x) {
  const moe::cuda<> gpu;
  const ffn net(s, gpu);
  const moe::dim T = s.tokens;
  const moe::device_buffer params(net.weight_bytes()), work(net.inference_context_bytes(T) + net.scratch_bytes(T));
  const moe::device_buffer in(x.size_bytes()), out(x.size_bytes());
  moe::device_arena p(params.bytes()), mem(work.bytes()), in_mem(in.bytes()), out_mem(out.bytes());
  const ffn::weights w = net.make_weights(p);
  ffn::context ctx = net.make_inference_context(T, mem);
  const auto x_device = in_mem.matrix<float>("x", T, s.d), y_device = out_mem.matrix<float>("y", T, s.d);

  gpu.upload(weights, params.as<float>());
  gpu.upload(x, moe::flat(x_device));
  net.forward(w, x_device, y_device, ctx, mem);  // queued: nothing waits
  std::vector<float> y(x.size());
  gpu.download(moe::flat(y_device), std::span(y));
  gpu.sync();  // waits, and throws what went wrong on the way
  return y;
}
// [/use]

void compare_inference(moe::shape s) {
  testing::model<layers::ffn<moe::scalar<>>> host(layers::ffn<moe::scalar<>>(s), s.tokens, s.d, 3);
  host.forward();
  compared::expect_close("ffn", "inference", infer(s, host.weights(), host.x), host.y);
}

}  // namespace

int main() {
  if (compared::no_device()) return 77;
  compare_inference({.tokens = 50, .d = 32, .f = 48, .experts = 4});
  compared::compare<layers::ffn>("ffn", {.tokens = 200, .d = 96, .f = 160, .experts = 6});
  compared::compare<layers::ffn>("one", {.tokens = 1, .d = 32, .f = 48, .experts = 4});
  compared::compare<layers::mixed>("mixed", {.tokens = 150, .d = 64, .f = 80, .experts = 7}, layers::mixed_banks);
  return compared::failures == 0 ? 0 : 1;
}
