// SPDX-License-Identifier: Apache-2.0
// core, concepts, layer
#include "moe/layer.hpp"
