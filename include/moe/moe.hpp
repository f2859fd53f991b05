// SPDX-License-Identifier: Apache-2.0
/// Everything but the accelerated backends: core, layer, all policies, the scalar backend. No third-party headers.
#pragma once

#include "moe/attention/block_gate.hpp"
#include "moe/attention/input.hpp"
#include "moe/attention/kv_block.hpp"
#include "moe/backend/host_ffn.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/combine/lse_merge.hpp"
#include "moe/combine/mix_before_trunk.hpp"
#include "moe/combine/weighted_sum.hpp"
#include "moe/expert/activation.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/expert/film.hpp"
#include "moe/expert/layout.hpp"
#include "moe/expert/set.hpp"
#include "moe/expert/ternary.hpp"
#include "moe/expert/trivial.hpp"
#include "moe/gate/linear.hpp"
#include "moe/layer.hpp"
#include "moe/recipe/moba.hpp"
#include "moe/router/top_k.hpp"
#include "moe/version.hpp"
