// SPDX-License-Identifier: Apache-2.0
// expect: moe::layer: argument 3 is a set of experts that read different inputs [docs/policies.md]
// lines: <= 15
#include "moe/moe.hpp"

using experts = moe::expert_set<moe::ffn_expert, moe::kv_block_expert>;
using net = moe::layer<moe::linear_gate, moe::top_k<2>, experts, moe::weighted_sum, moe::scalar<>>;

int main() {
  const net layer({.d = 32, .f = 64, .experts = 8}, experts{{.count = 4}, {.count = 4}});
  return static_cast<int>(layer.weight_bytes());
}
