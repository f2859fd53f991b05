// SPDX-License-Identifier: Apache-2.0
#include "moe/moe.hpp"

#include "kernels/run.hpp"

static_assert(!std::same_as<moe::arch::native, moe::arch::compiled>);

std::vector<std::vector<float>> run_whole() { return run_all(); }
