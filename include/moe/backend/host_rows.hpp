// SPDX-License-Identifier: Apache-2.0
/// Primitives over rows on the host.
#pragma once

#include "moe/backend/host_backend.hpp"

namespace moe {

namespace detail {

/// f(e, first, last) over blocks of rows that lie in one expert.
template <HostBackend B, class F>
void for_each_block(const call<B>& on, const bank_rows& rows, F f) noexcept {
  const dim first = rows.first(), n = rows.last() - first;
  on.executor().for_each(n, 16, [&](dim a, dim b) {
    dim e = 0;
    const auto end = [&] { return dim{rows.offsets[static_cast<std::size_t>(e) + 1]} - first; };
    while (a < b) {
      while (end() <= a) ++e;
      const dim stop = b < end() ? b : end();
      f(e, first + a, first + stop);
      a = stop;
    }
  });
}

}  // namespace detail

/// m = v
template <HostBackend B, class T>
void fill(const call<B>& on, matrix_view<T> m, T v) noexcept {
  on.executor().for_each(m.rows, 256, [&](dim r, dim last) {
    for (; r < last; ++r)
      for (dim c = 0; c < m.cols; ++c) m(r, c) = v;
  });
}
/// m[r] = v for the rows of a bank
template <HostBackend B>
void fill_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> m, float v) noexcept {
  fill(on, m.slice(rows.first(), rows.last() - rows.first()), v);
}
/// to = from
template <HostBackend B, class T>
void copy(const call<B>& on, matrix_view<const T> from, matrix_view<T> to) noexcept {
  on.executor().for_each(to.rows, 256, [&](dim r, dim last) {
    for (; r < last; ++r)
      for (dim c = 0; c < to.cols; ++c) to(r, c) = from(r, c);
  });
}

/// to += from
template <HostBackend B>
void add(const call<B>& on, matrix_view<const float> from, matrix_view<float> to) noexcept {
  for_each_token(on, to.rows, [&](dim t) { axpy(typename B::arch{}, 1.f, from.row(t), to.row(t), to.cols); });
}

/// f(e, r) for every row r of a bank, e counted from the bank's first expert. `f` is called from many threads.
template <HostBackend B, class F>
void for_each_row(const call<B>& on, const bank_rows& rows, F f) noexcept {
  detail::for_each_block(on, rows, [&](dim e, dim r, dim last) {
    for (; r < last; ++r) f(e, r);
  });
}
/// The rows of a layer that every token passes through: one expert, row t is token t. Its offsets live in scratch.
template <HostBackend B>
bank_rows dense_rows(const call<B>& on) noexcept {
  const std::span<idx> offsets = on.scratch.template vector<idx>("offsets", 2);
  offsets[0] = 0;
  offsets[1] = static_cast<idx>(on.sizes.tokens);
  bank_rows rows;
  rows.offsets = offsets;
  return rows;
}
/// f(t) for every t in 0 .. n, and then() after every few of them.
template <HostBackend B, class F, class... Then>
void for_each_token(const call<B>& on, dim n, F f, const Then&... then) noexcept {
  on.executor().for_each(n, 16, [&](dim t, dim last) {
    for (; t < last; ++t) f(t);
    (then(), ...);
  });
}
/// ys(r, j) = f(e, r, j) for every row of a bank.
template <HostBackend B, class F>
void map_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> ys, F f) noexcept {
  for_each_row(on, rows, [&](dim e, dim r) {
    for (dim j = 0; j < ys.cols; ++j) ys(r, j) = f(e, r, j);
  });
}
/// v[e] += the sum of e's rows, each times its weight where `xs` has weights.
template <HostBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_view<float> v) noexcept {
  on.executor().for_each(rows.experts(), 1, [&](dim e, dim last) {
    for (; e < last; ++e)
      for (dim r = rows.offsets[static_cast<std::size_t>(e)]; r < rows.offsets[static_cast<std::size_t>(e) + 1]; ++r)
        axpy(typename B::arch{}, xs.scale(r), xs.row(r), v.row(e), v.cols);
  });
}
template <HostBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, matrix_view<const float> xs, matrix_view<float> v) noexcept {
  sum_rows(on, rows, gathered<float>{xs}, v);
}
template <HostBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> xs, matrix_view<float> v) noexcept {
  sum_rows(on, rows, gathered<float>{xs}, v);
}

/// The same into a column per expert, v[e](j, 0), as biases are laid out.
template <HostBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_stack<float> v) noexcept {
  on.executor().for_each(rows.experts(), 1, [&](dim e, dim last) {
    for (; e < last; ++e) {
      const matrix_view<float> to = v[e];
      for (dim r = rows.offsets[static_cast<std::size_t>(e)]; r < rows.offsets[static_cast<std::size_t>(e) + 1]; ++r)
        for (dim j = 0; j < to.rows; ++j) to(j, 0) += xs.scale(r) * xs.row(r)[j];
    }
  });
}
/// s[r] += <x[r], v[e]> for every row of a bank, unweighted.
template <HostBackend B>
void dot_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_view<const float> v,
              std::span<float> s) noexcept {
  for_each_row(on, rows, [&](dim e, dim r) {
    s[static_cast<std::size_t>(r)] += dot(typename B::arch{}, xs.row(r), v.row(e), v.cols);
  });
}
/// s[r] += <x[r], z[r]> for every row of a bank, unweighted.
template <HostBackend B>
void dot_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, gathered<float> zs,
              std::span<float> s) noexcept {
  for_each_row(on, rows, [&](dim, dim r) {
    s[static_cast<std::size_t>(r)] += dot(typename B::arch{}, xs.row(r), zs.row(r), xs.cols());
  });
}
/// f(t, r) for every row r of token t that lies in this bank, in the order of the token's choices, one thread a token, and
/// then() after every few tokens.
template <HostBackend B, class F, class... Then>
void for_each_row_by_token(const call<B>& on, const bank_rows& rows, F f, const Then&... then) noexcept {
  const dim first = rows.first(), last = rows.last();
  if (rows.token_offsets.empty()) return for_each_token(on, last - first, [&](dim i) { f(i + first, i + first); }, then...);
  const auto token = [&](dim t) {
    for (idx i = rows.token_offsets[static_cast<std::size_t>(t)]; i < rows.token_offsets[static_cast<std::size_t>(t) + 1];
         ++i)
      if (const dim r = rows.position[static_cast<std::size_t>(i)]; r >= first && r < last) f(t, r);
  };
  for_each_token(on, rows.tokens(), token, then...);
}
/// to[t] += the rows of token t that lie in this bank, each times its weight where `from` has weights, in the order of the
/// token's choices. Without token_offsets row r is token r.
template <HostBackend B>
void scatter_add_rows(const call<B>& on, const bank_rows& rows, gathered<float> from, matrix_view<float> to) noexcept {
  for_each_row_by_token(on, rows,
                        [&](dim t, dim r) { axpy(typename B::arch{}, from.scale(r), from.row(r), to.row(t), to.cols); });
}

/// y[0 .. n] = the sum over t's rows of weight[r] ys[r], in the order of its choices; 0 for a token without rows. A run of
/// columns after another: its rows lie in pages of their own, which memory serves faster together than in turn.
template <HostBackend B, class Rows>
void combine_row(const call<B>& on, const routing_plan& p, const Rows& ys, std::span<const float> weight, dim t, float* y,
                 dim n) noexcept {
  constexpr dim run = 512;
  if constexpr (std::same_as<Rows, matrix_view<float>> || std::same_as<Rows, matrix_view<const float>>)
    if (n > run) {
      for (dim j = 0; j < n; j += run)
        combine_row(on, p, ys.columns(j, detail::at_most(n - j, run)), weight, t, y + j, detail::at_most(n - j, run));
      return;
    }
  for (dim j = 0; j < n; ++j) y[j] = 0;
  for (idx i = p.token_offsets[static_cast<std::size_t>(t)]; i < p.token_offsets[static_cast<std::size_t>(t) + 1]; ++i)
    if (const idx r = p.position[static_cast<std::size_t>(i)]; r >= 0)
      add_one_row(typename B::arch{}, ys, r, weight.empty() ? 1.f : weight[static_cast<std::size_t>(r)], y, n);
}
/// The same for every row t of y.
template <HostBackend B, class Rows>
void combine_rows(const call<B>& on, const routing_plan& p, const Rows& ys, std::span<const float> weight,
                  matrix_view<float> y) noexcept {
  for_each_token(on, p.tokens(), [&](dim t) { combine_row(on, p, ys, weight, t, y.row(t), y.cols); });
}

/// For experts that store rows: dys[r] = weight[r] dy[token[r]] and dweight[r] += <dy[token[r]], ys[r]>, where wanted.
template <HostBackend B>
void split_row_gradient(const call<B>& on, const bank_rows& rows, gathered<float> dy, matrix_view<const float> ys,
                        matrix_view<float> dys, std::span<float> dweight) noexcept {
  for_each_row(on, rows, [&](dim, dim r) {
    if (!dweight.empty()) dweight[static_cast<std::size_t>(r)] += dot(typename B::arch{}, dy.row(r), ys.row(r), ys.cols);
    for (dim j = 0; j < dys.cols; ++j) dys(r, j) = dy.scale(r) * dy.row(r)[j];
  });
}

}  // namespace moe
