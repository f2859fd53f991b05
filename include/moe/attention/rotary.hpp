// SPDX-License-Identifier: Apache-2.0
/// Rotary position embedding: queries and keys are turned by angles that grow with their position.
#pragma once

#include <cmath>

#include "moe/attention/heads.hpp"
#include "moe/concepts.hpp"

namespace moe {

/// Channels i and i + R/2 turn together (GPT-NeoX, LLaMA in its Hugging Face form).
struct half_split_pairs {
  MOE_HD static constexpr dim first(dim i, dim) noexcept { return i; }
  MOE_HD static constexpr dim second(dim i, dim width) noexcept { return i + width / 2; }
};
/// Channels 2i and 2i + 1 turn together (the paper, GPT-J).
struct interleaved_pairs {
  MOE_HD static constexpr dim first(dim i, dim) noexcept { return 2 * i; }
  MOE_HD static constexpr dim second(dim i, dim) noexcept { return 2 * i + 1; }
};

/// cos and sin of position * base^(-2i/R).
struct rotary_table {
  matrix_view<float> cosine, sine;  ///< [positions, R/2]
};

/// x <- the first R channels of every head of token t turned by the angles of its position, in pairs (a, b):
///   a' = a cos - b sin,  b' = a sin + b cos.  The channels from R on stay as they are.
///
/// The table is made once: angles in double, rounded to float once. Backward turns back, in place as forward does.
/// errors   shape_error for an odd R, R above the width of a head, a base that is not above 0, a table that is too short
/// Su et al. 2021, arXiv:2104.09864
template <class Pairs = half_split_pairs>
struct rotary {
  using table = rotary_table;

  double base = 10000;
  dim width = 0;  ///< R; 0: all channels

  constexpr dim rotated(dim d) const noexcept { return width > 0 ? width : d; }

  void check(dim d) const {
    const dim r = rotated(d);
    const auto refuse = [](const std::string& what) { throw shape_error("rotary: " + what); };
    if (width < 0 || r > d) refuse("width is " + std::to_string(width) + ", expected at most " + std::to_string(d) + " (d)");
    if (r % 2 != 0) refuse("width is " + std::to_string(r) + ", expected an even number");
    if (!(base > 0)) refuse("base is " + std::to_string(base) + ", expected a number above 0");
  }
  /// Throws where tokens of these sequences stand beyond the table.
  void check(const table& w, const packed_sequences& sequences, dim tokens) const {
    for (dim s = 0; s < sequences.count(); ++s) {
      const dim n = sequences.last(s, tokens) - sequences.first(s);
      const dim end = n + (sequences.past.empty() ? 0 : sequences.past[static_cast<std::size_t>(s)]);
      if (n > 0 && end > w.cosine.rows)
        throw shape_error("rotary: sequence " + std::to_string(s) + " has " + std::to_string(end) +
                          " positions, expected at most " + std::to_string(w.cosine.rows) + " (of the table)");
    }
  }

  /// Carves the table and, where there is memory, fills it.
  table make_table(dim positions, dim d, arena& mem) const noexcept {
    const dim r = rotated(d);
    const table w{mem.matrix<float>("cosine", positions, r / 2), mem.matrix<float>("sine", positions, r / 2)};
    if (!w.cosine) return w;
    for (dim i = 0; i < r / 2; ++i) {
      const double turn = std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(r));
      for (dim p = 0; p < positions; ++p) {
        w.cosine(p, i) = static_cast<float>(std::cos(static_cast<double>(p) * turn));
        w.sine(p, i) = static_cast<float>(std::sin(static_cast<double>(p) * turn));
      }
    }
    return w;
  }

  /// Turns the first `n` heads of x, in place. Elements are float or halves; arithmetic is in float.
  template <class B, HeadViews X>
  void forward(const call<B>& on, const table& w, const X& x, dim n, const packed_sequences& sequences) const noexcept {
    for_each_token(on, x[0].rows, turn_token<X>{w, x, n, sequences, 1.f});
  }
  /// Turns their gradients back, in place.
  template <class B, HeadViews X>
  void backward(const call<B>& on, const table& w, const X& dx, dim n, const packed_sequences& sequences) const noexcept {
    for_each_token(on, dx[0].rows, turn_token<X>{w, dx, n, sequences, -1.f});
  }
  /// One head of one token.
  template <class T>
  MOE_HD static void turn(const table& w, dim position, float direction, T* x) noexcept {
    const dim half = w.cosine.cols, r = 2 * half;
    const float *c = w.cosine.row(position), *s = w.sine.row(position);
    for (dim i = 0; i < half; ++i) {
      const float a = static_cast<float>(x[Pairs::first(i, r)]), b = static_cast<float>(x[Pairs::second(i, r)]);
      const float sine = direction * s[i];
      x[Pairs::first(i, r)] = T(a * c[i] - b * sine);
      x[Pairs::second(i, r)] = T(a * sine + b * c[i]);
    }
  }

  // What kernels are made of is public: nvcc wants to name it.
  template <class X>
  struct turn_token {
    table w;
    X x;
    dim n;
    packed_sequences sequences;
    float direction;
    MOE_HD void operator()(dim t) const noexcept {
      const dim position = sequences.position(t);
      for (dim a = 0; a < n; ++a) turn(w, position, direction, x[a].row(t));
    }
  };
};

/// No position embedding.
struct no_rotary {
  using table = nothing;

  void check(dim) const noexcept {}
  void check(const table&, const packed_sequences&, dim) const noexcept {}
  table make_table(dim, dim, arena&) const noexcept { return {}; }
  template <class B, HeadViews X>
  void forward(const call<B>&, const table&, const X&, dim, const packed_sequences&) const noexcept {}
  template <class B, HeadViews X>
  void backward(const call<B>&, const table&, const X&, dim, const packed_sequences&) const noexcept {}
};

}  // namespace moe
