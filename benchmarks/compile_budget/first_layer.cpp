// SPDX-License-Identifier: Apache-2.0
#include "train_step.hpp"

TRAIN_STEP(layer_of<moe::ffn_expert>);
