// SPDX-License-Identifier: Apache-2.0
#include "moe/moe.hpp"

#include "kernels/run.hpp"

static_assert(!std::same_as<moe::arch::native, moe::arch::compiled>);

std::vector<float> run_whole_swiglu() { return run_layer<moe::ffn_expert>(); }
std::vector<float> run_whole_gelu() { return run_layer<moe::basic_ffn_expert<moe::plain<moe::gelu>>>(); }
