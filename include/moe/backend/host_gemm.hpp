// SPDX-License-Identifier: Apache-2.0
/// Products on the host: how they are cut into tiles and shared between threads.
#pragma once

#include "moe/backend/host_products.hpp"
#include "moe/backend/host_tiles.hpp"

namespace moe {

namespace detail {

/// The result of one tile, close together while it grows.
struct tile_result {
  float data[row_block * panel];
  matrix_view<float> view(const tile& t) noexcept { return {data, t.rows, t.columns}; }
};
inline matrix_view<float> part_of(matrix_view<float> m, const tile& t) noexcept {
  return m.slice(t.row, t.rows).columns(t.column, t.columns);
}

/// c += a b[e]^T for one tile.
template <class Arch>
void multiply_nt(Arch arch, const tile& t, gathered<float> a, matrix_stack<const float> b, matrix_view<float> c) noexcept {
  const matrix_view<const float> w = b[t.expert].slice(t.column, t.columns);
  if (!t.is_tall()) return gemm_nt(arch, a.from(t.row), w, c);
  gemm_nt_packed(arch, a.from(t.row), w, c);
}

template <class Arch>
void copy_tile(Arch arch, matrix_view<float> from, matrix_view<float> to) noexcept {
  for (dim r = 0; r < to.rows; ++r)
    for_each_lane(arch, to.cols, [&, r](dim j, auto lane) { lane.store(to.row(r) + j, lane.load(from.row(r) + j)); });
}
/// The rows of a tile, all equal to their columns of the bias v[e](j, 0), or 0 where there is none.
template <class Arch>
void start(Arch arch, matrix_view<float> c, const tile& t, matrix_stack<const float> v) noexcept {
  float bias[panel] = {};
  for (dim j = 0; v.first && j < t.columns; ++j) bias[j] = v[t.expert](t.column + j, 0);
  copy_tile(arch, {bias, c.rows, c.cols, 0}, c);
}

/// store(tile, start + a b[e]^T) over the tiles of a result; start(c, tile) sets what is added to.
template <HostBackend B, class Start, class Store>
void for_each_product(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b, Start start,
                      Store store) noexcept {
  for_each_tile(on, rows.offsets, b.first.rows, b.first.cols, 16, [&](const tile& t) {
    tile_result result;
    const matrix_view<float> c = result.view(t);
    start(c, t);
    multiply_nt(typename B::arch{}, t, a, b, c);
    store(t, c);
  });
}

}  // namespace detail

/// out[r] += a[r] b[e]^T for every row of a bank: a[A,k] read through the plan, b[e] of n x k, out[A,n].
template <HostBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  const typename B::arch arch{};
  detail::for_each_product(
      on, rows, a, b,
      [&](matrix_view<float> c, const detail::tile& t) { detail::copy_tile(arch, detail::part_of(out, t), c); },
      [&](const detail::tile& t, matrix_view<float> c) { detail::copy_tile(arch, c, detail::part_of(out, t)); });
}
/// out[r] = a[r] b[e]^T + bias[e], the bias a column per expert or empty.
template <HostBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_stack<const float> bias, matrix_view<float> out) noexcept {
  const typename B::arch arch{};
  detail::for_each_product(
      on, rows, a, b, [&](matrix_view<float> c, const detail::tile& t) { detail::start(arch, c, t, bias); },
      [&](const detail::tile& t, matrix_view<float> c) { detail::copy_tile(arch, c, detail::part_of(out, t)); });
}
/// out[r] += a[r] b[e] for every row of a bank: a[A,k] read through the plan, b[e] of k x n, out[A,n].
template <HostBackend B>
void grouped_gemm_nn(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  detail::for_each_tile(on, rows.offsets, b.first.cols, b.first.rows, detail::panel, [&](const detail::tile& t) {
    gemm_nn(typename B::arch{}, a.from(t.row), b[t.expert].columns(t.column, t.columns), detail::part_of(out, t));
  });
}
/// c[e] += the sum over e's rows of a[r]^T b[r]: a[A,m] and b[A,n] read through the plan, c[e] of m x n.
template <HostBackend B>
void grouped_gemm_tn(const call<B>& on, const bank_rows& rows, gathered<float> a, gathered<float> b,
                     matrix_stack<float> c) noexcept {
  constexpr dim height = 2 * detail::panel, breadth = 4 * detail::panel;
  const dim panels = detail::blocks(c.first.rows, height), bands = detail::blocks(c.first.cols, breadth);
  on.executor().for_each(rows.experts() * panels * bands, 1, [&](dim unit, dim last) {
    for (; unit < last; ++unit) {
      const dim e = unit / (panels * bands), i = unit / bands % panels * height, j = unit % bands * breadth;
      const dim m = detail::at_most(c.first.rows - i, height), n = detail::at_most(c.first.cols - j, breadth);
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
