// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: this layer cannot train: one of its parts has no backward [docs/policies.md]
// lines: <= 15
#include <vector>

#include "moe/moe.hpp"

// A gate with constant scores and no backward.
struct fixed_gate {
  using input = moe::matrix_view<const float>;
  using input_grad = moe::matrix_view<float>;
  using weights = moe::nothing;
  using context = moe::nothing;
  template <class B>
  void forward(const moe::call<B>& on, const weights&, const input&, moe::matrix_view<float> scores, context&) const noexcept {
    moe::fill(on, scores, 1.f);
  }
};
using net = moe::layer<fixed_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

int main() {
  const net layer({.tokens = 64, .d = 32, .f = 64, .experts = 8});
  moe::buffer params(layer.weight_bytes()), work(layer.context_bytes(64) + layer.scratch_bytes(64));
  moe::arena p(params.bytes()), mem(work.bytes());
  const net::weights w = layer.make_weights(p);
  net::context ctx = layer.make_context(64, mem);
  std::vector<float> x(64 * 32), y(64 * 32);
  layer.forward(w, {x.data(), 64, 32}, {y.data(), 64, 32}, ctx, mem);
  net::gradients dw{};
  layer.backward(w, {x.data(), 64, 32}, ctx, {y.data(), 64, 32}, {}, dw, mem);
}
