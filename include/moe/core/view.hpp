// SPDX-License-Identifier: Apache-2.0
/// Non-owning views. Trivially copyable, valid in device code, no space: the edge of a layer checks that.
#pragma once

#include <concepts>
#include <type_traits>

#include "moe/core/config.hpp"
#include "moe/core/types.hpp"

namespace moe {

/// A row-major matrix: `rows` x `cols`, `ld` elements from one row to the next.
template <class T>
struct matrix_view {
  using value_type = std::remove_const_t<T>;

  T* data = nullptr;
  dim rows = 0, cols = 0, ld = 0;

  constexpr matrix_view() = default;
  MOE_HD constexpr matrix_view(T* p, dim r, dim c) noexcept : matrix_view(p, r, c, c) {}
  MOE_HD constexpr matrix_view(T* p, dim r, dim c, dim stride) noexcept : data(p), rows(r), cols(c), ld(stride) {}
  template <class U>
    requires std::same_as<const U, T> && (!std::same_as<U, T>)
  MOE_HD constexpr matrix_view(matrix_view<U> v) noexcept : matrix_view(v.data, v.rows, v.cols, v.ld) {}

  MOE_HD constexpr T* row(dim r) const noexcept { return data + r * ld; }
  MOE_HD constexpr T& operator()(dim r, dim c) const noexcept { return data[r * ld + c]; }
  /// Rows first .. first + n.
  MOE_HD constexpr matrix_view slice(dim first, dim n) const noexcept { return {data ? row(first) : data, n, cols, ld}; }
  /// Columns first .. first + n.
  MOE_HD constexpr matrix_view columns(dim first, dim n) const noexcept { return {data ? data + first : data, rows, n, ld}; }
  MOE_HD constexpr explicit operator bool() const noexcept { return data != nullptr; }
};

/// One matrix per expert, `step` elements apart. A layout of gate and up is nothing but such a stack:
/// interleaved rows are two stacks with twice the row stride (expert/layout.hpp).
template <class T>
struct matrix_stack {
  matrix_view<T> first;
  dim step = 0;

  constexpr matrix_stack() = default;
  MOE_HD constexpr matrix_stack(matrix_view<T> m, dim s) noexcept : first(m), step(s) {}
  template <class U>
    requires std::same_as<const U, T> && (!std::same_as<U, T>)
  MOE_HD constexpr matrix_stack(matrix_stack<U> v) noexcept : first(v.first), step(v.step) {}

  MOE_HD constexpr matrix_view<T> operator[](dim e) const noexcept {
    return {first.data + e * step, first.rows, first.cols, first.ld};
  }
};

/// The stack [E*n, c] of E matrices with n rows each.
template <class T>
MOE_HD constexpr matrix_stack<T> stack(matrix_view<T> m, dim n) noexcept {
  return {matrix_view<T>{m.data, n, m.cols, m.ld}, n * m.ld};
}

/// Rows of `source` in the order of a plan: row r is source[token[r]], weighed by weight[r]. A null `token` is the
/// identity, a null `weight` is one. Nothing is copied: products read their operand through it.
template <class T>
struct gathered {
  matrix_view<const T> source;
  const idx* token = nullptr;
  const float* weight = nullptr;

  MOE_HD constexpr const T* row(dim r) const noexcept { return source.row(token ? token[r] : r); }
  MOE_HD constexpr float scale(dim r) const noexcept { return weight ? weight[r] : 1.f; }
  MOE_HD constexpr dim cols() const noexcept { return source.cols; }
  /// The same rows, renumbered from row `first`.
  MOE_HD constexpr gathered from(dim first) const noexcept {
    return {token ? source : matrix_view<const T>{source.row(first), source.rows - first, source.cols, source.ld},
            token ? token + first : nullptr, weight ? weight + first : nullptr};
  }
};

}  // namespace moe
