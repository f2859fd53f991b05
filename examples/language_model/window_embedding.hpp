// SPDX-License-Identifier: Apache-2.0
/// What the model sees of a text: the last few bytes one by one, and which bytes were frequent before them.
#pragma once

#include <cstdint>
#include <span>

#include "moe/core/call.hpp"

namespace demo {

/// Positions in a text; token t is to predict text[position[t]]. Each has at least `window_embedding::reach` bytes before it.
struct windows {
  std::span<const std::uint8_t> text;
  std::span<const moe::idx> position;

  moe::dim tokens() const noexcept { return static_cast<moe::dim>(position.size()); }
  std::uint8_t byte(moe::dim t, moe::dim back) const noexcept {
    return text[static_cast<std::size_t>(position[static_cast<std::size_t>(t)] - back)];
  }
  std::uint8_t target(moe::dim t) const noexcept { return byte(t, 0); }
};

/// y[t] = the sum over i = 1 .. window of table_i[byte i before t]  +  counts[t] bag
///
/// with counts[t,b]: how often byte b is among the last `reach` bytes, times 4 / reach. Only the table of the last byte and the
/// bag start at random. What the bytes before it add is then learned, not first unlearned.
///
/// weights  last[256,d] earlier[(window-1)*256,d] bag[256,d]      saves  counts[T,256]      adds to  all three
struct window_embedding {
  static constexpr moe::dim reach = 256;
  moe::dim window = 8;

  struct weights {
    moe::matrix_view<float> last, earlier, bag;

    /// Row of the byte `back` positions before the one to predict.
    float* row(const windows& in, moe::dim t, moe::dim back) const noexcept {
      const moe::dim byte = in.byte(t, back);
      return back == 1 ? last.row(byte) : earlier.row((back - 2) * 256 + byte);
    }
  };
  struct context { moe::matrix_view<float> counts; };

  weights make_weights(moe::dim d, moe::arena& mem) const noexcept {
    return {mem.matrix<float>("last", 256, d), mem.matrix<float>("earlier", (window - 1) * 256, d, moe::initial::zeros),
            mem.matrix<float>("bag", 256, d)};
  }
  context make_context(moe::dim tokens, moe::arena& mem) const noexcept { return {mem.matrix<float>("counts", tokens, 256)}; }

  template <class B>
  void forward(const moe::call<B>& on, const weights& w, const windows& in, moe::matrix_view<float> y,
               context& ctx) const noexcept {
    fill(on, y, 0.f);
    fill(on, ctx.counts, 0.f);
    for_each_token(on, in.tokens(), [&](moe::dim t) {
      for (moe::dim i = 1; i <= window; ++i) axpy(typename B::arch{}, 1.f, w.row(in, t, i), y.row(t), y.cols);
      for (moe::dim i = 1; i <= reach; ++i) ctx.counts(t, in.byte(t, i)) += 4.f / static_cast<float>(reach);
    });
    gemm_nn(on, ctx.counts, w.bag, y);
  }
  /// One task a table: no two write to the same row.
  template <class B>
  void backward(const moe::call<B>& on, const windows& in, const context& ctx, moe::matrix_view<const float> dy,
                weights& dw) const noexcept {
    on.executor().for_each(window, 1, [&](moe::dim i, moe::dim last) {
      for (; i < last; ++i)
        for (moe::dim t = 0; t < in.tokens(); ++t)
          axpy(typename B::arch{}, 1.f, dy.row(t), dw.row(in, t, i + 1), dy.cols);
    });
    gemm_tn(on, ctx.counts, dy, dw.bag);
  }
};

}  // namespace demo
