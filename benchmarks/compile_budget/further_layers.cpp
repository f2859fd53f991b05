// SPDX-License-Identifier: Apache-2.0
// The first layer and eight more types: other routers, forms, layouts and sets.
#include "train_step.hpp"

using namespace moe;

TRAIN_STEP(layer_of<ffn_expert>);
TRAIN_STEP(layer_of<ffn_expert, 1>);
TRAIN_STEP(layer_of<ffn_expert, 4>);
TRAIN_STEP(layer_of<basic_ffn_expert<plain<relu>>>);
TRAIN_STEP(layer_of<basic_ffn_expert<plain<gelu>>>);
TRAIN_STEP(layer_of<basic_ffn_expert<glu<silu>, chunked>>);
TRAIN_STEP(layer_of<gpt_oss_expert>);
TRAIN_STEP(layer_of<expert_set<ffn_expert, zero_expert>>);
TRAIN_STEP(layer_of<expert_set<ffn_expert, copy_expert, constant_expert>>);
