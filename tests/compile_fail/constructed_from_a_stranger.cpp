// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: a constructor argument is none of this layer's five parts [docs/policies.md]
// lines: <= 15
#include "moe/moe.hpp"

using net = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;

int main() {
  const net layer({.tokens = 64, .d = 32, .f = 64, .experts = 8}, moe::top_k<3>{});
  return static_cast<int>(layer.weight_bytes());
}
