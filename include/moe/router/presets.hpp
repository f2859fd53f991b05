// SPDX-License-Identifier: Apache-2.0
/// The routers of published model families: score, selection key, weights, norm and scale of each, checked against a
/// reference written from their code. Numbers are those of a released model; a checkpoint's configuration may say otherwise,
/// and every one but K is a member to be set:
///
///   deepseek_v3_router<> router;
///   router.groups = 8;  router.kept = 4;  router.inner.inner.rule.scale = 2.5f;
///
/// Logits are float32 here; families that compute them or the softmax in the type of the model round on the way.
#pragma once

#include "moe/router/bias_balanced.hpp"
#include "moe/router/capacity.hpp"
#include "moe/router/grouped.hpp"
#include "moe/router/top_k.hpp"

namespace moe {

/// Softmax over the experts, top-k, renormalised: Mixtral, MiniMax-Text-01, HunYuan-A13B, and Qwen3-MoE, Qwen3-Next with
/// norm_topk_prob.
template <int K = 2>
using mixtral_router = top_k<K, softmax_over_kept>;
template <int K = 8>
using qwen3_moe_router = mixtral_router<K>;

/// Softmax over the experts, top-k, as they are: OLMoE, Jamba, and Qwen1.5-MoE, Qwen2-MoE without norm_topk_prob.
template <int K = 8>
using olmoe_router = top_k<K, score_rule<softmax_score>>;
template <int K = 2>
using jamba_router = olmoe_router<K>;
template <int K = 4>
using qwen2_moe_router = olmoe_router<K>;

/// Softmax over the experts, top-k, divided by the p-norm of the weights, p = moe_normalize_expert_weights: DBRX.
template <int K = 4, int P = 1>
using dbrx_router = top_k<K, score_rule<softmax_score, p_norm<P>>>;

/// Top-k of the logits, softmax over those: Granite-MoE, JetMoE; gpt-oss, whose gate has a bias (`biased_linear_gate`).
template <int K = 8>
using granite_router = top_k<K, softmax_over_kept>;
template <int K = 4>
using gpt_oss_router = granite_router<K>;

/// Top-k of the logits, the sigmoid of each: Llama-4, which applies it to the expert's input (expert/weigh_input.hpp).
template <int K = 1>
using llama4_router = top_k<K, score_rule<sigmoid_score>>;

/// Softmax over the experts, the best groups by their largest probability, scaled: DeepSeek-V2.
template <int K = 6>
using deepseek_v2_router = grouped<top_k<K, score_rule<softmax_score, unnormalised, 16>>, largest_key, 8, 3>;
template <int K = 6>
using deepseek_v2_lite_router = olmoe_router<K>;

/// Sigmoid with a bias for the selection, the best groups by their two largest, renormalised, scaled: DeepSeek-V3, R1;
/// Nemotron-H with its own numbers.
template <int K = 8>
using deepseek_v3_router =
    grouped<bias_balanced<top_k<K, score_rule<sigmoid_score, sum_plus<-20>, 5, 2>>>, two_largest_keys, 8, 4>;

/// The same without groups: Kimi-K2, GLM-4.5, dots.llm1, Trinity (AFMoE).
template <int K = 8>
using kimi_k2_router = bias_balanced<top_k<K, score_rule<sigmoid_score, sum_plus<-20>, 2827, 1000>>>;
template <int K = 8>
using glm4_moe_router = bias_balanced<top_k<K, score_rule<sigmoid_score, sum_plus<-20>>>>;
template <int K = 6>
using dots1_router = bias_balanced<top_k<K, score_rule<sigmoid_score, sum_plus<-20>, 5, 2>>>;

/// The square root of softplus in place of the sigmoid: DeepSeek-V4, layers that do not hash.
template <int K = 6>
using deepseek_v4_router = bias_balanced<top_k<K, score_rule<sqrt_softplus_score, sum_plus<-20>>>>;

/// A bias after the softmax, for the selection alone; the sum floored: ERNIE-4.5.
template <int K = 6>
using ernie45_router = bias_balanced<top_k<K, score_rule<softmax_score, sum_at_least<-12>>>>;

/// Sigmoid with a bias for the selection, the plain sum: MiniMax-M2.
template <int K = 8>
using minimax_m2_router = bias_balanced<top_k<K, score_rule<sigmoid_score, sum_norm>>>;

/// The same with 1e-6 in the sum: LFM2.
template <int K = 4>
using lfm2_moe_router = bias_balanced<top_k<K, score_rule<sigmoid_score, sum_plus<-6>>>>;

/// A bias after the softmax over feed-forward and zero-computation experts, scaled, not renormalised: LongCat-Flash. The
/// latter are a bank of `copy_expert`.
template <int K = 12>
using longcat_router = bias_balanced<top_k<K, score_rule<softmax_score, unnormalised, 6>>>;

/// One expert by softmax, with capacity in token order over the tokens of a call, one sequence: Switch Transformer.
using switch_router = capacity<top_k<1, score_rule<softmax_score>>, capacity_per_token>;

}  // namespace moe
