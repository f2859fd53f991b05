// SPDX-License-Identifier: Apache-2.0
// Linked with a program that includes the same: what a header defines must be inline.
#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"
