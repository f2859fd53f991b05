// SPDX-License-Identifier: Apache-2.0
/// How the rows of gate and up lie in memory. A wrong choice gives plausible, wrong output, so each layout is a type: two
/// stacks of views over what a checkpoint holds, and nothing is ever copied or reordered.
#pragma once

#include "moe/core/view.hpp"

namespace moe {

/// Two tensors: up[E*f, c] and gate[E*f, c].
struct separate {
  static constexpr bool fused = false;
};

/// One tensor gate_up[E*2f, c]; of each expert the gate rows first, then the up rows.
struct chunked {
  static constexpr bool fused = true;
  template <class T>
  static matrix_stack<T> gate(matrix_view<T> m, dim f) noexcept { return {{m.data, f, m.cols, m.ld}, 2 * f * m.ld}; }
  template <class T>
  static matrix_stack<T> up(matrix_view<T> m, dim f) noexcept {
    return {{m.data ? m.row(f) : nullptr, f, m.cols, m.ld}, 2 * f * m.ld};
  }
};

/// One tensor gate_up[E*2f, c]; gate rows are the even ones, up rows the odd ones.
struct interleaved {
  static constexpr bool fused = true;
  template <class T>
  static matrix_stack<T> gate(matrix_view<T> m, dim f) noexcept { return {{m.data, f, m.cols, 2 * m.ld}, 2 * f * m.ld}; }
  template <class T>
  static matrix_stack<T> up(matrix_view<T> m, dim f) noexcept {
    return {{m.data ? m.row(1) : nullptr, f, m.cols, 2 * m.ld}, 2 * f * m.ld};
  }
};

}  // namespace moe
