// SPDX-License-Identifier: Apache-2.0
/// MoBA: attention as a layer of experts.
#pragma once

#include "moe/attention/block_gate.hpp"
#include "moe/attention/kv_block.hpp"
#include "moe/combine/lse_merge.hpp"
#include "moe/layer.hpp"
#include "moe/router/top_k.hpp"

namespace moe {

/// One head of one sequence, for reading: tokens are queries, experts are blocks of keys. K counts the query's own block.
/// With every past block kept it equals dense causal attention. Lu et al. 2025, arXiv:2502.13189
///
///   moba<3, scalar<>> head({.tokens = T, .d = d, .experts = blocks}, block_mean_gate{B}, kv_block_expert{B});
template <int K, class B>
using moba = layer<block_mean_gate, top_k<K, select_only>, kv_block_expert, lse_merge, B>;

}  // namespace moe
