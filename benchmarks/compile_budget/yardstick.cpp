// SPDX-License-Identifier: Apache-2.0
// A piece of the standard library, whose compile time says how fast this machine is.
#include <algorithm>
#include <array>
#include <concepts>
#include <span>
#include <vector>
