// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "moe/backend/cpu.hpp"
#include "moe/expert/packed_ffn.hpp"
#include "moe/moe.hpp"
#include "support/testing.hpp"

/// What cpu<> computes as a file compiles it: with kernels of its own (whole/run.cpp) or of the library (separate.cpp). Every
/// file has these functions for itself, since they differ.
namespace {

using std::size_t;

/// y and all gradients of a layer of these experts.
template <class Expert, class Arch>
std::vector<float> run_layer() {
  using layer = moe::layer<moe::linear_gate, moe::top_k<2>, Expert, moe::weighted_sum, moe::cpu<Arch>>;
  testing::model<layer> m(layer({.tokens = 70, .d = 37, .f = 51, .experts = 5}), 70, 37, 1);
  if (m.net.catalogue().back().type == moe::element::bf16) {
    const auto names = m.net.gradient_catalogue();
    std::vector<float> masters(m.net.gradient_bytes() / sizeof(float));
    testing::randomise(names, masters, 3);
    moe::weight_copy(names, m.net.catalogue(), m.params.bytes()).write(masters);
  }
  m.forward();
  m.backward();
  std::vector<float> all = m.y;
  all.insert(all.end(), m.dx.begin(), m.dx.end());
  const auto gradients = m.gradients();
  all.insert(all.end(), gradients.begin(), gradients.end());
  return all;
}

/// y of a layer with packed weights.
template <class T>
std::vector<float> run_packed() {
  using dense = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::cpu<>>;
  using packed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::packed_ffn_expert<T>, moe::weighted_sum, moe::cpu<>>;
  testing::model<dense> from(dense({.tokens = 70, .d = 37, .f = 51, .experts = 5}), 70, 37, 1, false);
  const packed net(from.net.sizes());
  const moe::buffer params(net.weight_bytes()), work(net.inference_context_bytes(70) + net.scratch_bytes(70));
  moe::arena p(params.bytes()), mem(work.bytes());
  auto w = net.make_weights(p);
  for (moe::dim r = 0; r < w.gate.w.rows; ++r) std::copy_n(from.w.gate.w.row(r), w.gate.w.cols, w.gate.w.row(r));
  net.experts().pack(from.w.experts, net.sizes(), w.experts);
  auto ctx = net.make_inference_context(70, mem);
  net.forward(w, from.x_view(), from.y_view(), ctx, mem);
  return from.y;
}

/// Attention over a sequence and, token by token, over a cache of elements T.
template <class T>
std::vector<float> run_attention() {
  constexpr moe::dim d = 12, N = 37;
  const moe::self_attention<moe::attention_features, moe::cpu<>> net(d, {.heads = 4, .kv_heads = 2, .d = 8, .dv = 6});
  const moe::buffer params(net.weight_bytes()), cached(net.template cache_bytes<T>(1, N));
  moe::arena p(params.bytes()), c(cached.bytes());
  const auto w = net.make_weights(p);
  testing::randomise(net.catalogue(), params.template as<float>(), 3);
  auto cache = net.template make_cache<T>(1, N, c);
  const moe::buffer work(std::max(net.scratch_bytes(N), net.scratch_bytes(1, cache)));
  moe::arena mem(work.bytes());
  const std::vector<float> x = testing::normals(N * d, 5);
  std::vector<float> y(2 * N * d);
  net.forward(w, {{x.data(), N, d}, {}, {}}, {y.data(), N, d}, mem);
  for (moe::dim t = 0; t < N; ++t) net.forward(w, {{x.data() + t * d, 1, d}, {}, {}}, {y.data() + (N + t) * d, 1, d}, cache, mem);
  return y;
}

/// All of them, one after another.
std::vector<std::vector<float>> run_all() {
  using namespace moe;
  return {run_layer<ffn_expert, arch::native>(),       run_layer<basic_ffn_expert<plain<gelu>>, arch::native>(),
          run_layer<ffn_expert, arch::dynamic>(),      run_layer<bf16_ffn_expert, arch::native>(),
          run_packed<float>(),                         run_packed<bf16>(),
          run_packed<f16>(),                           run_packed<std::int8_t>(),
          run_packed<int4_groups<32>>(),               run_packed<int4_groups<128, bf16>>(),
          run_packed<ternary>(),
          run_attention<float>(),                      run_attention<bf16>(),
          run_attention<f16>(),                        run_attention<std::int8_t>()};
}

}  // namespace

/// Of whole/run.cpp.
std::vector<std::vector<float>> run_whole();
