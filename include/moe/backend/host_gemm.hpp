// SPDX-License-Identifier: Apache-2.0
/// Products on the host: how they are cut into tiles and shared between threads.
#pragma once

#include "moe/backend/host_tiles.hpp"

namespace moe {

namespace detail {

/// The rows of one tile, all equal to columns j .. of expert e's bias, v[e](j, 0), or 0 where there is none.
inline void start(matrix_view<float> to, matrix_stack<const float> v, dim e, dim j) noexcept {
  const matrix_view<const float> bias = v.first ? v[e] : v.first;
  for (dim r = 0; r < to.rows; ++r)
    for (dim c = 0; c < to.cols; ++c) to(r, c) = bias ? bias(j + c, 0) : 0.f;
}

/// f(tile, the tile of out) over the tiles of out[A,n] = a[A,k] b[e]^T.
template <HostBackend B, class F>
void for_each_product(const call<B>& on, const bank_rows& rows, matrix_stack<const float> b, matrix_view<float> out, F f) noexcept {
  for_each_tile(on, rows.offsets, b.first.rows, b.first.cols, 16,
                [&](const tile& t) { f(t, out.slice(t.row, t.rows).columns(t.column, t.columns)); });
}

}  // namespace detail

/// out[r] += a[r] b[e]^T for every row of a bank: a[A,k] read through the plan, b[e] of n x k, out[A,n].
template <HostBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  detail::for_each_product(on, rows, b, out, [&](const detail::tile& t, matrix_view<float> c) {
    gemm_nt(typename B::arch{}, a.from(t.row), b[t.expert].slice(t.column, t.columns), c);
  });
}
/// out[r] = a[r] b[e]^T + bias[e], the bias a column per expert or empty.
template <HostBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_stack<const float> bias, matrix_view<float> out) noexcept {
  detail::for_each_product(on, rows, b, out, [&](const detail::tile& t, matrix_view<float> c) {
    detail::start(c, bias, t.expert, t.column);
    gemm_nt(typename B::arch{}, a.from(t.row), b[t.expert].slice(t.column, t.columns), c);
  });
}
/// out[r] += a[r] b[e] for every row of a bank: a[A,k] read through the plan, b[e] of k x n, out[A,n].
template <HostBackend B>
void grouped_gemm_nn(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  detail::for_each_tile(on, rows.offsets, b.first.cols, b.first.rows, detail::panel, [&](const detail::tile& t) {
    gemm_nn(typename B::arch{}, a.from(t.row), b[t.expert].columns(t.column, t.columns),
            out.slice(t.row, t.rows).columns(t.column, t.columns));
  });
}
/// c[e] += the sum over e's rows of a[r]^T b[r]: a[A,m] and b[A,n] read through the plan, c[e] of m x n.
template <HostBackend B>
void grouped_gemm_tn(const call<B>& on, const bank_rows& rows, gathered<float> a, gathered<float> b,
                     matrix_stack<float> c) noexcept {
  constexpr dim breadth = 4 * detail::panel;
  const dim panels = detail::blocks(c.first.rows, detail::panel), bands = detail::blocks(c.first.cols, breadth);
  on.executor().for_each(rows.experts() * panels * bands, 1, [&](dim unit, dim last) {
    for (; unit < last; ++unit) {
      const dim e = unit / (panels * bands), i = unit / bands % panels * detail::panel, j = unit % bands * breadth;
      const dim m = detail::at_most(c.first.rows - i, detail::panel), n = detail::at_most(c.first.cols - j, breadth);
      const dim r = rows.offsets[static_cast<std::size_t>(e)], depth = rows.offsets[static_cast<std::size_t>(e) + 1] - r;
      gathered<float> left = a.from(r), right = b.from(r);
      left.source = left.source.columns(i, m);
      right.source = right.source.columns(j, n);
      gemm_tn(typename B::arch{}, left, right, depth, c[e].slice(i, m).columns(j, n));
    }
  });
}

/// c[m,n] += a[m,k] b[n,k]^T
template <HostBackend B>
void gemm_nt(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  grouped_gemm_nt(on, {.offsets = offsets}, {a}, {b, 0}, c);
}
/// c[m,n] = a[m,k] b[n,k]^T + bias, the same bias[n,1] in every row, or none where it is empty
template <HostBackend B>
void gemm_nt(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<const float> bias,
             matrix_view<float> c) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  grouped_gemm_nt(on, {.offsets = offsets}, {a}, {b, 0}, {bias, 0}, c);
}
/// c[m,n] += a[m,k] b[k,n]
template <HostBackend B>
void gemm_nn(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  grouped_gemm_nn(on, {.offsets = offsets}, {a}, {b, 0}, c);
}
/// c[m,n] += a[k,m]^T b[k,n]
template <HostBackend B>
void gemm_tn(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  grouped_gemm_tn(on, {.offsets = offsets}, {a}, {b}, {c, 0});
}

}  // namespace moe
