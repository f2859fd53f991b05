// SPDX-License-Identifier: Apache-2.0
#include "moe/expert/packed_ffn.hpp"

#include "layers/library.hpp"

namespace bench {
namespace {

template <class T>
struct packed_weights {
  using expert = moe::packed_ffn_expert<T>;
  moe::buffer memory;
  typename expert::weights views{};
  double bytes;

  packed_weights(const std::shared_ptr<const layer_source>& w, moe::shape s, const expert& x) {
    moe::arena count;
    (void)x.make_weights(s, count);
    memory = moe::buffer(count.used());
    bytes = static_cast<double>(memory.size());
    moe::arena mem(memory.bytes());
    moe::ffn_weights from;
    from.up = w->up;
    from.gate = w->gate;
    from.down = w->down;
    views = x.pack(from, s, mem);
  }
};

template <class T>
std::unique_ptr<contestant> make(const model_shape& s) {
  return std::make_unique<library_layer<moe::packed_ffn_expert<T>, packed_weights<T>>>(s);
}

}  // namespace

std::unique_ptr<contestant> make_f32(const model_shape& s, bool backward) {
  return backward ? make_f32_training(s) : make<float>(s);
}
std::unique_ptr<contestant> make_bf16(const model_shape& s, bool backward) {
  return backward ? make_bf16_training(s) : make<moe::bf16>(s);
}
std::unique_ptr<contestant> make_f16(const model_shape& s, bool) { return make<moe::f16>(s); }
std::unique_ptr<contestant> make_int8(const model_shape& s, bool) { return make<std::int8_t>(s); }
std::unique_ptr<contestant> make_int4(const model_shape& s, bool) { return make<moe::int4_groups<32>>(s); }
std::unique_ptr<contestant> make_ternary(const model_shape& s, bool) { return make<moe::ternary>(s); }

void round_ternary(matrix_view<float> w, dim experts) {
  using rule = moe::packing<moe::ternary>;
  const dim rows = w.rows / experts;
  for (dim e = 0; e < experts; ++e) {
    const matrix_view<float> one = w.slice(e * rows, rows);
    const float scale = rule::scale_of(matrix_view<const float>(one));
    for (dim r = 0; r < rows; ++r)
      for (dim k = 0; k < w.cols; ++k) one(r, k) = scale * rule::rounded(one(r, k), scale);
  }
}

}  // namespace bench
