// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: argument 3 is not an Expert on this backend; static_assert(moe::Expert<X, B>) says why [docs/policies.md]
// lines: <= 15
// A layer that cannot exist, first met as a member, copied, put into a container and given parts of its own.
#include <utility>
#include <vector>

#include "moe/moe.hpp"

struct rowless_expert {
  using input = moe::matrix_view<const float>;
  using output = moe::matrix_view<float>;
  using weights = moe::nothing;
  using context = moe::nothing;
  template <class B>
  void forward(const moe::call<B>&, const weights&, const input&, moe::bank_rows, output, context&) const noexcept {}
};
using net = moe::layer<moe::linear_gate, moe::top_k<2>, rowless_expert, moe::weighted_sum, moe::scalar<>>;

struct block {
  net layer;
  net::weights w;
  net::context ctx;
  block(moe::shape s, moe::arena& mem) : layer(s), w(layer.make_weights(mem)), ctx(layer.make_inference_context(64, mem)) {}
};

int main() {
  moe::buffer memory(1 << 20);
  moe::arena mem(memory.bytes());
  block b({.tokens = 64, .d = 32, .f = 64, .experts = 8}, mem);
  std::vector<net> stack;
  stack.emplace_back(moe::shape{.d = 32, .f = 64, .experts = 8}, rowless_expert{});
  stack.push_back(b.layer);
  std::vector<float> x(64 * 32);
  const moe::matrix_view<float> view(x.data(), 64, 32);
  stack[0].forward(b.w, view, view, b.ctx, mem);
  stack[0].replay(b.w, view, b.ctx.plan, view, b.ctx, mem);
  const moe::matrix_view<float> up = b.w.experts.up;
  return up.rows > 0 && stack[0].sizes().d > 0 ? 1 : 0;
}
