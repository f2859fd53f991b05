// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "layers/library.hpp"

namespace bench {
namespace {

// bf16 as training has it: rounded from float32 masters, in the order of memory.
struct rounded_weights {
  moe::buffer memory;
  moe::bf16_ffn_expert::weights views{};
  double bytes;

  rounded_weights(const std::shared_ptr<const layer_source>& w, moe::shape s, const moe::bf16_ffn_expert& x) {
    moe::arena count;
    (void)x.make_weights(s, count);
    memory = moe::buffer(count.used());
    bytes = static_cast<double>(memory.size());
    moe::arena mem(memory.bytes());
    views = x.make_weights(s, mem);
    const auto round = [](matrix_view<const float> from, matrix_view<moe::bf16> to) {
      std::transform(from.data, from.data + from.rows * from.cols, to.data, [](float v) { return moe::bf16(v); });
    };
    round(w->up, views.up);
    round(w->gate, views.gate);
    round(w->down, views.down);
  }
  void read_back(layer_source& to, moe::shape) const {
    const auto widen = [](matrix_view<const moe::bf16> from, matrix_view<float> as) {
      std::transform(from.data, from.data + from.rows * from.cols, as.data, [](moe::bf16 v) { return static_cast<float>(v); });
    };
    widen(views.up, to.up);
    widen(views.gate, to.gate);
    widen(views.down, to.down);
  }
};

}  // namespace

std::unique_ptr<contestant> make_bf16_training(const model_shape& s) {
  return std::make_unique<library_training<moe::bf16_ffn_expert, rounded_weights>>(s);
}

}  // namespace bench
