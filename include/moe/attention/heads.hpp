// SPDX-License-Identifier: Apache-2.0
/// How many heads attention has, how they lie in memory, and where packed sequences begin.
///
/// Activations are token-major: q[T, h*d], k[T, h_kv*d], v[T, h_kv*dv], the heads of a token side by side. One head seen
/// alone is a matrix [T, d] with the row stride of the whole; all of them are a `matrix_stack`, or `grouped_heads` where
/// other columns lie between the groups. Query head a reads key head a / (h / h_kv).
#pragma once

#include <concepts>
#include <span>

#include "moe/core/error.hpp"

namespace moe {

/// Sizes of grouped-query attention: h query heads of width d share h_kv keys of width d and values of width dv.
struct attention_heads {
  dim heads = 0;     ///< h
  dim kv_heads = 0;  ///< h_kv, divides h
  dim d = 0;         ///< width of a query and of a key
  dim dv = 0;        ///< width of a value

  /// Query heads that share a key head.
  MOE_HD constexpr dim group() const noexcept { return heads / kv_heads; }
  /// The key head that query head a reads.
  MOE_HD constexpr dim key_head(dim a) const noexcept { return a / group(); }
  MOE_HD constexpr dim query_cols() const noexcept { return heads * d; }
  MOE_HD constexpr dim key_cols() const noexcept { return kv_heads * d; }
  MOE_HD constexpr dim value_cols() const noexcept { return kv_heads * dv; }
  MOE_HD constexpr dim output_cols() const noexcept { return heads * dv; }

  void check(const char* what = "attention_heads") const {
    const auto positive = [&](dim n, const char* name) {
      if (n <= 0) throw shape_error(std::string(what) + ": " + name + " is " + std::to_string(n) + ", expected at least 1");
    };
    positive(heads, "heads");
    positive(kv_heads, "kv_heads");
    positive(d, "d");
    positive(dv, "dv");
    if (heads % kv_heads != 0)
      throw shape_error(std::string(what) + ": heads is " + std::to_string(heads) + ", expected a multiple of " +
                        std::to_string(kv_heads) + " (kv_heads)");
  }
};

/// The heads of token-major rows: matrix [T, n*width] as n matrices [T, width].
template <class T>
MOE_HD constexpr matrix_stack<T> split_heads(matrix_view<T> rows, dim n) noexcept {
  const dim width = n > 0 ? rows.cols / n : 0;
  return {rows.columns(0, width), width};
}

/// Heads of which each run of `group` lies side by side: what a fused projection with gate columns in every group gives.
template <class T>
struct grouped_heads {
  matrix_view<T> first;
  dim group = 1, step = 0;  ///< heads of a group, and elements from one to the next
  dim group_step = 0;       ///< elements from group to group

  MOE_HD constexpr matrix_view<T> operator[](dim a) const noexcept {
    return {first.data + a / group * group_step + a % group * step, first.rows, first.cols, first.ld};
  }
};

/// What functions over heads take: x[a] is head a, a matrix with a row for each token.
template <class X>
concept HeadViews = requires(const X& x, dim a) {
  { x[a].row(a) };
  { x[a].cols } -> std::convertible_to<dim>;
};

namespace detail {

/// f(0) + f(1) + ... + f(d-1), in eight sums that a vector adds side by side.
template <class F>
MOE_HD float sum_of(dim d, F f) noexcept {
  float s[8] = {};
  dim j = 0;
  for (; j + 8 <= d; j += 8) {
    MOE_UNROLL
    for (int l = 0; l < 8; ++l) s[l] += f(j + l);
  }
  for (; j < d; ++j) s[j % 8] += f(j);
  return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

}  // namespace detail

/// Sequences packed one after the other: sequence s holds tokens offsets[s] .. offsets[s+1]. Positions, blocks, convolution
/// and windows restart at each. Without offsets all tokens are one sequence. Of a sequence that goes on, `past` tokens came
/// before: a step of decoding S sequences has offsets 0 .. S and the lengths of their caches as `past`.
struct packed_sequences {
  std::span<const idx> offsets;  ///< [S+1], ascending from 0 to T; or empty
  std::span<const idx> past;     ///< [S]; empty: none

  constexpr dim count() const noexcept { return offsets.empty() ? 1 : static_cast<dim>(offsets.size()) - 1; }
  /// The sequence that holds token t: the last that begins at or before it.
  constexpr dim sequence(dim t) const noexcept {
    std::size_t low = 0, high = offsets.empty() ? 1 : offsets.size() - 1;
    while (high - low > 1) {
      const std::size_t middle = (low + high) / 2;
      (offsets[middle] <= t ? low : high) = middle;
    }
    return static_cast<dim>(low);
  }
  constexpr dim first(dim s) const noexcept { return offsets.empty() ? 0 : offsets[static_cast<std::size_t>(s)]; }
  /// One beyond the last token of sequence s, of `tokens` in all.
  constexpr dim last(dim s, dim tokens) const noexcept {
    return offsets.empty() ? tokens : offsets[static_cast<std::size_t>(s) + 1];
  }
  /// Of token t in its sequence, the past included.
  constexpr dim position(dim t) const noexcept {
    const dim s = sequence(t);
    return t - first(s) + (past.empty() ? 0 : past[static_cast<std::size_t>(s)]);
  }

  /// Errors name `what` and, after it, `part`.
  void check(dim tokens, const char* what, const char* part = "") const {
    if (!past.empty() && static_cast<dim>(past.size()) != count())
      expect(static_cast<dim>(past.size()), count(), (std::string(what) + part + ": past").c_str(), "lengths", "S");
    if (offsets.empty()) return;
    const auto refuse = [&](const std::string& came) {
      throw shape_error(std::string(what) + part + ": offsets " + came + ", expected to ascend from 0 to " +
                        std::to_string(tokens) + " (T)");
    };
    if (offsets.size() == 1) refuse("hold one number");
    if (offsets.front() != 0) refuse("start at " + std::to_string(offsets.front()));
    for (std::size_t s = 1; s < offsets.size(); ++s)
      if (offsets[s] < offsets[s - 1])
        refuse("fall from " + std::to_string(offsets[s - 1]) + " to " + std::to_string(offsets[s]));
    if (offsets.back() != tokens) refuse("end at " + std::to_string(offsets.back()));
  }
};

}  // namespace moe
