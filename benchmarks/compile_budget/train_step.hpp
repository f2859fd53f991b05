// SPDX-License-Identifier: Apache-2.0
/// One forward and one backward of any layer, for the units whose compile time is measured.
#pragma once

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"

template <class L>
void train_step(const L& net, const typename L::weights& w, moe::matrix_view<const float> x, moe::matrix_view<float> y,
                typename L::gradients& dw, typename L::context& ctx, moe::arena& mem) {
  net.forward(w, x, y, ctx, mem);
  net.backward(w, x, ctx, y, {}, dw, mem);
}

template <class Expert, int K = 2>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<K>, Expert, moe::weighted_sum, moe::cpu<>>;

// Instantiates the step, so that the unit holds its code.
#define TRAIN_STEP(...)                                                                                    \
  template void train_step(const __VA_ARGS__&, const __VA_ARGS__::weights&, moe::matrix_view<const float>, \
                           moe::matrix_view<float>, __VA_ARGS__::gradients&, __VA_ARGS__::context&, moe::arena&)
