// SPDX-License-Identifier: Apache-2.0
/// What a token is before any block: the sum of a row for each of the last bytes, and for the last few together.
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

/// y[t] = sum over i = 1 .. window of table_i[byte i before t]  +  sum over n = 2 .. longest of run_n[hash of the last n bytes]
///
/// Only the table of the last byte starts at random. What the others add is then learned, not first unlearned.
///
/// weights  last[256,d] earlier[(window-1)*256,d] runs[(longest-1)*hashes,d]      saves  nothing      adds to  all three
/// Hashed runs of bytes: Pagnoni et al. 2024 (Byte Latent Transformer), arXiv:2412.09871, section 3.2.1
struct window_embedding {
  moe::dim window = 8;     ///< at least `longest`
  moe::dim longest = 4;    ///< run of bytes that has a table, at least 1
  moe::dim hashes = 8192;  ///< rows of a table of runs

  struct weights {
    moe::matrix_view<float> last, earlier, runs;
  };

  moe::dim tables() const noexcept { return window + longest - 1; }
  weights make_weights(moe::dim d, moe::arena& mem) const noexcept {
    return {mem.matrix<float>("last", 256, d), mem.matrix<float>("earlier", (window - 1) * 256, d, moe::initial::zeros),
            mem.matrix<float>("runs", (longest - 1) * hashes, d, moe::initial::zeros)};
  }
  /// The row of table i that token t reads.
  float* row(const weights& w, const windows& in, moe::dim t, moe::dim i) const noexcept {
    if (i == 0) return w.last.row(in.byte(t, 1));
    if (i < window) return w.earlier.row((i - 1) * 256 + in.byte(t, i + 1));
    return w.runs.row((i - window) * hashes + hash(in, t, i - window + 2));
  }
  /// Of the n bytes before the one to predict.
  moe::dim hash(const windows& in, moe::dim t, moe::dim n) const noexcept {
    std::uint64_t h = 0;
    for (moe::dim i = 1; i <= n; ++i) h = (h + in.byte(t, i) + 1) * 0x9E3779B97F4A7C15u;
    return static_cast<moe::dim>(h >> 32) % hashes;
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
