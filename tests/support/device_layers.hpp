// SPDX-License-Identifier: Apache-2.0
/// Layers that between them use every policy, on any backend: what a device has to compute as the scalar backend does.
#pragma once

#include "moe/moe.hpp"

namespace testing::layers {

template <class G, class R, class X, class C, class B>
using of = moe::layer<G, R, X, C, B>;

template <class B>
using ffn = of<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, B>;

using mixed_experts =
    moe::expert_set<moe::ffn_expert, moe::copy_expert, moe::film_expert, moe::constant_expert, moe::zero_expert>;
inline const mixed_experts mixed_banks{{.count = 2, .f = 24}, {.count = 1}, {.count = 2}, {.count = 1}, {.count = 1}};
template <class B>
using mixed = of<moe::linear_gate, moe::top_k<3>, mixed_experts, moe::weighted_sum, B>;

using sigmoid_top = moe::bias_balanced<moe::top_k<2, moe::score_rule<moe::sigmoid_score>>>;
using balanced_router = moe::capacity<moe::grouped<sigmoid_top, moe::largest_key, 2, 1>>;
template <class B>
using balanced = of<moe::biased_linear_gate, balanced_router, moe::gpt_oss_expert, moe::residual<>, B>;

template <class B>
using nucleus = of<moe::cosine_gate, moe::top_p<3>, moe::film_expert, moe::mix_before_trunk<moe::ffn_expert>, B>;

template <class B>
using chosen = of<moe::noisy<>, moe::expert_choice<2>, moe::weigh_input<moe::ffn_expert>, moe::unweighted_sum, B>;

template <class B>
using pressed = of<moe::linear_gate, moe::with_loss<moe::renormalised<moe::threshold<>>, moe::load_balance>,
                   moe::basic_ffn_expert<moe::plain<moe::gelu>>, moe::weighted_sum, B>;

}  // namespace testing::layers
