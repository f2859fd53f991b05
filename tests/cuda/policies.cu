// SPDX-License-Identifier: Apache-2.0
/// The other policies. Those that read another input than rows, or keep no float32 weights, only have to compile.
#include "compare.cuh"

namespace {

using rows = moe::on_device<moe::matrix_view<float>>;

/// Instantiates forward, and backward where there is one.
template <class L>
void instantiate(const L& net, const typename L::weights& w, const typename L::input& x,
                 const rows& y, const typename L::input_grad& dx, typename L::gradients& dw,
                 typename L::context& ctx, moe::device_arena& mem) {
  net.forward(w, x, y, ctx, mem);
  net.backward(w, x, ctx, y, dx, dw, mem);
}
template <class L>
void instantiate_forward(const L& net, const typename L::weights& w, const typename L::input& x,
                         const rows& y, typename L::context& ctx, moe::device_arena& mem) {
  net.forward(w, x, y, ctx, mem);
}
template void instantiate(const moe::moba<2, moe::cuda<>>&, const moe::moba<2, moe::cuda<>>::weights&,
                          const moe::moba<2, moe::cuda<>>::input&, const rows&,
                          const moe::moba<2, moe::cuda<>>::input_grad&, moe::moba<2, moe::cuda<>>::gradients&,
                          moe::moba<2, moe::cuda<>>::context&, moe::device_arena&);
using shared_expert = moe::gated_dense<moe::ffn_expert, moe::cuda<>>;
template void instantiate(const shared_expert&, const shared_expert::weights&, const shared_expert::input&,
                          const rows&, const shared_expert::input_grad&,
                          shared_expert::gradients&, shared_expert::context&, moe::device_arena&);
template <class T>
using packed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::packed_ffn_expert<T>, moe::weighted_sum, moe::cuda<>>;
using ternary = packed<moe::ternary>;
template void instantiate_forward(const ternary&, const ternary::weights&, const ternary::input&,
                                  const rows&, ternary::context&, moe::device_arena&);
using bytes = packed<std::int8_t>;
template void instantiate_forward(const bytes&, const bytes::weights&, const bytes::input&, const rows&,
                                  bytes::context&, moe::device_arena&);

}  // namespace

int main() {
  namespace layers = testing::layers;
  if (compared::no_device()) return 77;
  const moe::shape s{.tokens = 150, .d = 64, .f = 40, .experts = 6};
  compared::compare<layers::balanced>("balanced", s);
  compared::compare<layers::nucleus>("nucleus", s, moe::top_p<3>{.p = 0.5f});
  compared::compare<layers::chosen>("chosen", s);
  compared::compare<layers::pressed>("pressed", s);
  return compared::failures == 0 ? 0 : 1;
}
