// SPDX-License-Identifier: Apache-2.0
/// Products on the host: how they are cut into tiles and shared between threads.
#pragma once

#include "moe/backend/host_halves.hpp"

namespace moe {

namespace detail {

/// The result of one tile, close together while it grows.
struct tile_result {
  float data[row_block * panel];
  matrix_view<float> view(const tile& t) noexcept { return {data, t.rows, t.columns}; }
};

/// The products of one tile with weights of type W.
template <class Arch, class W>
struct tile_products {
  static void nt(gathered<float> a, matrix_view<const W> b, matrix_view<float> c) noexcept { gemm_nt(Arch{}, a, b, c); }
  static void nt_packed(gathered<float> a, matrix_view<const W> b, matrix_view<float> c) noexcept {
    gemm_nt_packed(Arch{}, a, b, c);
  }
  static void nn(gathered<float> a, matrix_view<const W> b, matrix_view<float> c) noexcept { gemm_nn(Arch{}, a, b, c); }
  static void tn(gathered<float> a, gathered<float> b, dim i, dim j, dim depth, matrix_view<float> c) noexcept {
    a.source = a.source.columns(i, c.rows);
    b.source = b.source.columns(j, c.cols);
    gemm_tn(Arch{}, a, b, depth, c);
  }
};
template <class Arch>
struct tile_products<Arch, bf16> {
  arch::mixed_kernels kernels = mixed_kernels_of(Arch{});

  void nt(const mixed_rows& a, matrix_view<const bf16> b, matrix_view<float> c) const noexcept {
    kernels.gemm_nt(a.floats, b, c);
  }
  void nt_packed(const mixed_rows& a, matrix_view<const bf16> b, matrix_view<float> c) const noexcept {
    kernels.gemm_nt_packed(a.floats, b, c);
  }
  void nn(const mixed_rows& a, matrix_view<const bf16> b, matrix_view<float> c) const noexcept {
    kernels.gemm_nn(a.floats, b, c);
  }
  void tn(const mixed_rows& a, const mixed_rows& b, dim i, dim j, dim depth, matrix_view<float> c) const noexcept {
    kernels.gemm_tn(a.columns(i, c.rows).floats, b.columns(j, c.cols).floats, depth, c);
  }
};

/// c += a b[e]^T for one tile.
template <class Products, class Rows, class W>
void multiply_nt(const Products& products, const tile& t, const Rows& a, matrix_stack<W> b, matrix_view<float> c) noexcept {
  const auto w = b[t.expert].slice(t.column, t.columns);
  if (!t.is_tall()) return products.nt(a.from(t.row), w, c);
  products.nt_packed(a.from(t.row), w, c);
}

/// out = start + a b[e]^T over the tiles of a result, which run(grid, f) visits; start(c, tile) sets what is added to.
template <class Arch, class W, class Start, class Run>
void for_each_product(Arch arch, const bank_rows& rows, const rows_for<W>& a, matrix_stack<const W> b,
                      matrix_view<float> out, Start start, Run run) noexcept {
  const tile_products<Arch, W> products;
  run(tile_grid(rows.offsets, b.first.rows, b.first.cols, 16), [&](const tile& t) {
    tile_result near;
    const matrix_view<float> c = near.view(t);
    start(c, t);
    multiply_nt(products, t, a, b, c);
    copy_tile(arch, c, part_of(out, t));
  });
}

}  // namespace detail

/// out[r] += a[r] b[e]^T for every row of a bank: a[A,k] read through the plan, b[e] of n x k, out[A,n]. Weights of type W
/// are float or bf16 here, results are floats.
template <HostBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  const auto start = [&](matrix_view<float> c, const detail::tile& t) {
    detail::copy_tile(typename B::arch{}, detail::part_of(out, t), c);
  };
  detail::for_each_product(typename B::arch{}, rows, a, b, out, start,
                           [&](const detail::tile_grid& grid, const auto& f) { detail::for_each_tile(on, grid, f); });
}
/// out[r] = a[r] b[e]^T + bias[e], the bias a column per expert or empty. Where there is a `then`, it is called as
/// then(result_part) once for every part of the columns that is there in all rows, from any thread.
template <HostBackend B, class W, class... Then>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, const rows_for<W>& a, matrix_stack<const W> b,
                     matrix_stack<const float> bias, matrix_view<float> out, const Then&... then) noexcept {
  if constexpr (std::same_as<W, bf16>)
    if (a.halves) return detail::halves_nt(on, rows, a, b, bias, out, then...);
  const auto start = [&](matrix_view<float> c, const detail::tile& t) { detail::start(typename B::arch{}, c, t, bias); };
  const auto run = [&](const detail::tile_grid& grid, const auto& f) {
    if constexpr (sizeof...(then) == 0) detail::for_each_tile(on, grid, f);
    else detail::for_each_tile_by_columns(
        on, grid, f, [&](dim first, dim n) { (then(result_part{0, on.sizes.tokens, first, n}), ...); });
  };
  detail::for_each_product(typename B::arch{}, rows, a, b, out, start, run);
}
/// out[r] += a[r] b[e] for every row of a bank: a[A,k] read through the plan, b[e] of k x n, out[A,n].
template <HostBackend B>
void grouped_gemm_nn(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  const detail::tile_grid grid(rows.offsets, b.first.cols, b.first.rows, detail::panel, detail::panel);
  detail::for_each_tile(on, grid, [&](const detail::tile& t) {
    gemm_nn(typename B::arch{}, a.from(t.row), b[t.expert].columns(t.column, t.columns), detail::part_of(out, t));
  });
}
/// dx[r] = dz[r] w[e] + dz2[r] w2[e] for every row of a bank, the second product only where there is a w2: both w[e] of
/// k x n, dx[A,n] overwritten.
template <HostBackend B, class W>
void grouped_dgrad(const call<B>& on, const bank_rows& rows, const rows_for<W>& dz, matrix_stack<const W> w,
                   const rows_for<W>& dz2, matrix_stack<const W> w2, matrix_view<float> dx) noexcept {
  if constexpr (std::same_as<W, bf16>)
    if (dz.halves) return detail::halves_dgrad(on, rows, dz, w, dz2, w2, dx);
  const detail::tile_products<typename B::arch, W> products;
  const detail::tile_grid grid(rows.offsets, w.first.cols, w.first.rows * (w2.first ? 2 : 1), detail::panel);
  detail::for_each_tile(on, grid, [&](const detail::tile& t) {
    detail::tile_result near;
    const matrix_view<float> c = near.view(t);
    detail::start(typename B::arch{}, c, t, {});
    products.nn(dz.from(t.row), w[t.expert].columns(t.column, t.columns), c);
    if (w2.first) products.nn(dz2.from(t.row), w2[t.expert].columns(t.column, t.columns), c);
    detail::copy_tile(typename B::arch{}, c, detail::part_of(dx, t));
  });
}
/// c[e] += or, to replace it, = the sum over e's rows of a[r]^T b[r]: a[A,m] and b[A,n] read through the plan, c[e] of m x
/// n. The gradient of weights of type W: with bf16, levels that multiply bf16 round a and b to it.
template <class W, HostBackend B>
void grouped_wgrad(const call<B>& on, const bank_rows& rows, const rows_for<W>& a, const rows_for<W>& b,
                   matrix_stack<float> c, gradient_mode mode) noexcept {
  if constexpr (std::same_as<W, bf16>)
    if (a.halves) return detail::halves_wgrad(on, rows, a, b, c, {}, {}, mode);
  const detail::tile_products<typename B::arch, W> products;
  const detail::gradient_grid grid(rows.offsets, c.first.rows, c.first.cols, arch::detail::gradient_rows, 1024);
  on.executor().for_each(grid.tiles(), 1, [&](dim i, dim last) {
    for (; i < last; ++i) {
      const detail::gradient_tile t = grid[i];
      if (mode == gradient_mode::replace) detail::clear_tile(typename B::arch{}, t.of(c));
      products.tn(a.from(t.first), b.from(t.first), t.row, t.column, t.depth, t.of(c));
    }
  });
}
/// The same, and c2[e] likewise of a2[r]^T b[r]. Either of c and c2 may be empty.
template <class W, HostBackend B>
void grouped_wgrad(const call<B>& on, const bank_rows& rows, const rows_for<W>& a, const rows_for<W>& b,
                   matrix_stack<float> c, const rows_for<W>& a2, matrix_stack<float> c2, gradient_mode mode) noexcept {
  if constexpr (std::same_as<W, bf16>)
    if (a.halves && c.first && c2.first) return detail::halves_wgrad(on, rows, a, b, c, a2, c2, mode);
  if (c.first) grouped_wgrad<W>(on, rows, a, b, c, mode);
  if (c2.first) grouped_wgrad<W>(on, rows, a2, b, c2, mode);
}
/// c[e] += the sum over e's rows of a[r]^T b[r], in float32.
template <HostBackend B>
void grouped_gemm_tn(const call<B>& on, const bank_rows& rows, gathered<float> a, gathered<float> b,
                     matrix_stack<float> c) noexcept {
  grouped_wgrad<float>(on, rows, a, b, c, gradient_mode::add);
}

/// c[m,n] += a[m,k] b[n,k]^T
template <HostBackend B>
void gemm_nt(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  grouped_gemm_nt(on, {.offsets = offsets}, {a}, {b, 0}, c);
}
/// c[m,n] = a[m,k] b[n,k]^T + bias, the same bias[n,1] in every row, or none where it is empty. Where there is a `then`, it
/// is called as then(first, n) once for every run of rows that is there in all columns, from any thread.
template <HostBackend B, class... Then>
void gemm_nt(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<const float> bias,
             matrix_view<float> c, const Then&... then) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  const auto start = [&](matrix_view<float> to, const detail::tile& t) {
    detail::start(typename B::arch{}, to, t, {bias, 0});
  };
  const auto run = [&](const detail::tile_grid& grid, const auto& f) {
    if constexpr (sizeof...(then) == 0) detail::for_each_tile(on, grid, f);
    else detail::for_each_tile_by_rows(on, grid, f, then...);
  };
  detail::for_each_product(typename B::arch{}, {.offsets = offsets}, {a}, matrix_stack<const float>{b, 0}, c, start, run);
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
