// SPDX-License-Identifier: Apache-2.0
// Linked with a program that includes the same: a function defined in a header must be inline.
#include "moe/moe.hpp"
