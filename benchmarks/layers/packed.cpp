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
  void read_back(layer_source& to, moe::shape s) const {
    const dim inner = moe::detail::panels_of(s.f), outer = moe::detail::panels_of(s.d);
    for (dim e = 0; e < s.experts; ++e) {
      unpack(views.gate_up, 2 * e * inner, 2, to.gate.slice(e * s.f, s.f));
      unpack(views.gate_up, 2 * e * inner + 1, 2, to.up.slice(e * s.f, s.f));
      unpack(views.down, e * outer, 1, to.down.slice(e * s.d, s.d));
    }
  }

 private:
  /// Panels first, first + step, ...
  static void unpack(const moe::packed_matrix<T>& from, dim first, dim step, matrix_view<float> to) {
    constexpr dim rows = moe::detail::panel_rows;
    for (dim r = 0; r < to.rows; ++r)
      for (dim k = 0; k < to.cols; ++k) to(r, k) = from.weight(first + r / rows * step, r % rows, k);
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

}  // namespace bench
