// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "moe/backend/cpu.hpp"
#include "support/testing.hpp"

/// y and all gradients of a layer of these experts on cpu<>, as the including file compiles it.
template <class Expert>
std::vector<float> run_layer() {
  using layer = moe::layer<moe::linear_gate, moe::top_k<2>, Expert, moe::weighted_sum, moe::cpu<>>;
  testing::model<layer> m(layer({.tokens = 70, .d = 37, .f = 51, .experts = 5}), 70, 37, 1);
  m.forward();
  m.backward();
  std::vector<float> all = m.y;
  all.insert(all.end(), m.dx.begin(), m.dx.end());
  all.insert(all.end(), m.gradients().begin(), m.gradients().end());
  return all;
}

/// The same, compiled in a file that includes the kernels (whole/run.cpp).
std::vector<float> run_whole_swiglu();
std::vector<float> run_whole_gelu();
