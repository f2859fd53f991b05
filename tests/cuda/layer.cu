// SPDX-License-Identifier: Apache-2.0
/// A feed-forward layer and a set of different experts.
#include "compare.cuh"

int main() {
  namespace layers = testing::layers;
  if (compared::no_device()) return 77;
  compared::compare<layers::ffn>("ffn", {.tokens = 200, .d = 96, .f = 160, .experts = 6});
  compared::compare<layers::ffn>("one", {.tokens = 1, .d = 32, .f = 48, .experts = 4});
  compared::compare<layers::mixed>("mixed", {.tokens = 150, .d = 64, .f = 80, .experts = 7}, layers::mixed_banks);
  return compared::failures == 0 ? 0 : 1;
}
