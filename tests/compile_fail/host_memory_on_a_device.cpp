// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer::forward: x is not what the gate reads, in memory of the backend [docs/backends.md]
// lines: <= 15
#include "moe/backend/cuda/primitives.hpp"
#include "moe/moe.hpp"

struct accelerator {
  using space = moe::device;
  using arch = moe::arch::cuda;
  template <class F>
  void for_each(moe::dim, const F&) const noexcept {}
  template <class P>
  void run(moe::dim, const P&) const noexcept {}
};
using net = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, accelerator>;

void infer(const net& layer, const net::weights& w, moe::matrix_view<const float> x,
           moe::on_device<moe::matrix_view<float>> y, net::context& ctx, moe::device_arena& mem) {
  layer.forward(w, x, y, ctx, mem);
}
