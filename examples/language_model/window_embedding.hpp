// SPDX-License-Identifier: Apache-2.0
/// What a token is before any block: the sum of a row for each of the last bytes, and for the last two together.
#pragma once

#include <cstdint>
#include <span>

#include "moe/core/call.hpp"

namespace demo {

/// Positions in a text; token t is to predict text[position[t]]. Each has at least `window` bytes before it.
struct windows {
  std::span<const std::uint8_t> text;
  std::span<const moe::idx> position;
  std::span<const moe::idx> offsets;  ///< of the sequences of tokens, as in moe::packed_sequences

  moe::dim tokens() const noexcept { return static_cast<moe::dim>(position.size()); }
  std::uint8_t byte(moe::dim t, moe::dim back) const noexcept {
    return text[static_cast<std::size_t>(position[static_cast<std::size_t>(t)] - back)];
  }
  std::uint8_t target(moe::dim t) const noexcept { return byte(t, 0); }
};

/// y[t] = sum over i = 1 .. window of table_i[byte i before t]  +  pairs[hash of the last two bytes]
///
/// Only the table of the last byte starts at random. What the others add is then learned, not first
/// unlearned.
///
/// weights  last[256,d] earlier[(window-1)*256,d] pairs[hashes,d]      saves  nothing      adds to  all three
/// Hashed runs of bytes: Pagnoni et al. 2024 (Byte Latent Transformer), arXiv:2412.09871, section 3.2.1
struct window_embedding {
  moe::dim window = 8;     ///< at least 2
  moe::dim hashes = 4096;  ///< rows of the table of pairs

  struct weights {
    moe::matrix_view<float> last, earlier, pairs;
  };

  moe::dim tables() const noexcept { return window + 1; }
  weights make_weights(moe::dim d, moe::arena& mem) const noexcept {
    return {mem.matrix<float>("last", 256, d), mem.matrix<float>("earlier", (window - 1) * 256, d, moe::initial::zeros),
            mem.matrix<float>("pairs", hashes, d, moe::initial::zeros)};
  }
  /// The row of table i that token t reads.
  float* row(const weights& w, const windows& in, moe::dim t, moe::dim i) const noexcept {
    if (i == 0) return w.last.row(in.byte(t, 1));
    if (i < window) return w.earlier.row((i - 1) * 256 + in.byte(t, i + 1));
    const std::uint32_t hash = (in.byte(t, 1) * 256u + in.byte(t, 2)) * 2654435761u >> 8;  // Knuth's multiplicative hash
    return w.pairs.row(static_cast<moe::dim>(hash) % hashes);
  }

  template <class B>
  void forward(const moe::call<B>& on, const weights& w, const windows& in, moe::matrix_view<float> y) const noexcept {
    fill(on, y, 0.f);
    for_each_token(on, in.tokens(), [&](moe::dim t) {
      for (moe::dim i = 0; i < tables(); ++i) axpy(typename B::arch{}, 1.f, row(w, in, t, i), y.row(t), y.cols);
    });
  }
  /// One task a table: no two write to the same row.
  template <class B>
  void backward(const moe::call<B>& on, const windows& in, moe::matrix_view<const float> dy, weights& dw) const noexcept {
    on.executor().for_each(tables(), 1, [&](moe::dim i, moe::dim last) {
      for (; i < last; ++i)
        for (moe::dim t = 0; t < in.tokens(); ++t) axpy(typename B::arch{}, 1.f, dy.row(t), row(dw, in, t, i), dy.cols);
    });
  }
};

}  // namespace demo
