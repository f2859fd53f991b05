// SPDX-License-Identifier: Apache-2.0
/// What the model sees of a text: the bytes before a position, each through a table of its own.
#pragma once

#include <cstdint>
#include <span>

#include "moe/core/call.hpp"

namespace demo {

/// Positions in a text; token t is to predict text[position[t]]. Each position has at least `window` bytes before it.
struct windows {
  std::span<const std::uint8_t> text;
  std::span<const moe::idx> position;

  moe::dim tokens() const noexcept { return static_cast<moe::dim>(position.size()); }
  std::uint8_t byte(moe::dim t, moe::dim back) const noexcept {
    return text[static_cast<std::size_t>(position[static_cast<std::size_t>(t)] - back)];
  }
  std::uint8_t target(moe::dim t) const noexcept { return byte(t, 0); }
};

/// y[t] = the sum over i = 1 .. window of table_i[text[position[t] - i]]: a product with one-hot columns, without the product.
/// Only the table of the last byte starts at random. What the bytes before it add is then learned, not first unlearned.
///
/// weights  last[256,d] earlier[(window-1)*256,d]      saves  nothing      adds to  dlast, dearlier
struct window_embedding {
  moe::dim window = 16;

  struct weights {
    moe::matrix_view<float> last, earlier;

    /// Row of the byte `back` positions before the one to predict.
    float* row(const windows& in, moe::dim t, moe::dim back) const noexcept {
      const moe::dim byte = in.byte(t, back);
      return back == 1 ? last.row(byte) : earlier.row((back - 2) * 256 + byte);
    }
  };

  weights make_weights(moe::dim d, moe::arena& mem) const noexcept {
    return {mem.matrix<float>("last", 256, d), mem.matrix<float>("earlier", (window - 1) * 256, d, moe::initial::zeros)};
  }

  template <class B>
  void forward(const moe::call<B>& on, const weights& w, const windows& in, moe::matrix_view<float> y) const noexcept {
    for_each_token(on, in.tokens(), [&](moe::dim t) {
      float* out = y.row(t);
      for (moe::dim j = 0; j < y.cols; ++j) out[j] = 0;
      for (moe::dim i = 1; i <= window; ++i) axpy(typename B::arch{}, 1.f, w.row(in, t, i), out, y.cols);
    });
  }
  /// One task a table: no two write to the same row.
  template <class B>
  void backward(const moe::call<B>& on, const windows& in, moe::matrix_view<const float> dy, weights& dw) const noexcept {
    on.executor().for_each(window, 1, [&](moe::dim i, moe::dim last) {
      for (; i < last; ++i)
        for (moe::dim t = 0; t < in.tokens(); ++t)
          axpy(typename B::arch{}, 1.f, dy.row(t), dw.row(in, t, i + 1), dy.cols);
    });
  }
};

}  // namespace demo
