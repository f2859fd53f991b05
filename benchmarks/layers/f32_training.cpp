// SPDX-License-Identifier: Apache-2.0
#include "layers/library.hpp"

namespace bench {
namespace {

// float32 as training has it: the experts read the source itself.
struct whole_weights {
  std::shared_ptr<const layer_source> source;
  moe::ffn_weights views{};
  double bytes;

  whole_weights(const std::shared_ptr<const layer_source>& w, moe::shape, const moe::ffn_expert&)
      : source(w), bytes(4. * static_cast<double>(3 * w->up.rows * w->up.cols)) {
    views.up = w->up;
    views.gate = w->gate;
    views.down = w->down;
  }
  void read_back(layer_source&, moe::shape) const {}
};

}  // namespace

std::unique_ptr<contestant> make_f32_training(const model_shape& s) {
  return std::make_unique<library_training<moe::ffn_expert, whole_weights>>(s);
}

}  // namespace bench
