// SPDX-License-Identifier: Apache-2.0
/// Products on the host: how they are cut into tiles and shared between threads.
#pragma once

#include <type_traits>
#include <utility>

#include "moe/backend/host_products.hpp"
#include "moe/backend/host_rows.hpp"
#include "moe/backend/host_tiles.hpp"

namespace moe {

/// Rows that are multiplied by bf16 weights. Where the level rounds rows, products read `halves`, which may lie where the
/// floats lay; else that is empty. Forward, few rows of an expert meet its weights as floats at every level.
struct mixed_rows {
  gathered<float> floats;
  matrix_view<bf16> halves{};

  mixed_rows from(dim first) const noexcept {
    return {floats.from(first), halves.slice(first, halves.rows - first)};
  }
  mixed_rows columns(dim first, dim n) const noexcept {
    mixed_rows part = *this;
    part.floats.source = floats.source.columns(first, n);
    part.halves = halves.columns(first, n);
    return part;
  }
};
/// Rows that are multiplied by weights of type W.
template <class W>
using rows_for = std::conditional_t<std::same_as<W, bf16>, mixed_rows, gathered<float>>;

namespace detail {

/// The result of one tile, close together while it grows.
struct tile_result {
  float data[row_block * panel];
  matrix_view<float> view(const tile& t) noexcept { return {data, t.rows, t.columns}; }
  static bool holds(const tile& t) noexcept { return t.columns <= panel && t.rows * t.columns <= row_block * panel; }
};
inline matrix_view<bf16> part_of(matrix_view<bf16> m, const tile& t) noexcept {
  return m.slice(t.row, t.rows).columns(t.column, t.columns);
}
inline matrix_view<float> part_of(matrix_view<float> m, const tile& t) noexcept {
  return m.slice(t.row, t.rows).columns(t.column, t.columns);
}

/// The products of one tile with weights of type W, and how large tiles are.
template <class Arch, class W>
struct tile_products {
  static constexpr dim gradient_rows = arch::detail::gradient_rows;
  static constexpr dim columns(dim) noexcept { return panel; }
  static constexpr dim rows() noexcept { return row_block; }
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
  arch::half_kernels halves = kernels.halves;
  dim gradient_rows = kernels.gradient_rows;

  /// Rounded rows pass by packed weights again for every 32 columns. Where a chunk of them is larger than the second cache,
  /// tiles are wide, and pass a piece of the rows by all their columns before the next.
  dim columns(dim depth) const noexcept { return !halves.round ? kernels.columns : depth > 2048 ? 512 : 32; }
  dim rows() const noexcept { return halves.round ? 384 : row_block; }
  void nt(const mixed_rows& a, matrix_view<const bf16> b, matrix_view<float> c) const noexcept {
    kernels.gemm_nt(a.floats, b, c);
  }
  void nt_packed(const mixed_rows& a, matrix_view<const bf16> b, matrix_view<float> c) const noexcept {
    if (halves.round) halves.gemm_nt(a.halves.slice(0, c.rows), b, c);
    else kernels.gemm_nt_packed(a.floats, b, c);
  }
  void nn(const mixed_rows& a, matrix_view<const bf16> b, matrix_view<float> c) const noexcept {
    if (halves.round) halves.gemm_nn(a.halves.slice(0, c.rows), b, c);
    else kernels.gemm_nn(a.floats, b, c);
  }
  void tn(const mixed_rows& a, const mixed_rows& b, dim i, dim j, dim depth, matrix_view<float> c) const noexcept {
    const mixed_rows left = a.columns(i, c.rows), right = b.columns(j, c.cols);
    if (halves.round) halves.gemm_tn(left.halves.slice(0, depth), right.halves.slice(0, depth), c);
    else kernels.gemm_tn(left.floats, right.floats, depth, c);
  }
};

/// c += a b[e]^T for one tile.
template <class Products, class Rows, class W>
void multiply_nt(const Products& products, const tile& t, const Rows& a, matrix_stack<W> b, matrix_view<float> c) noexcept {
  const auto w = b[t.expert].slice(t.column, t.columns);
  if (!t.is_tall()) return products.nt(a.from(t.row), w, c);
  products.nt_packed(a.from(t.row), w, c);
}

template <class Arch>
void copy_tile(Arch arch, matrix_view<float> from, matrix_view<float> to) noexcept {
  for (dim r = 0; r < to.rows; ++r)
    for_each_lane(arch, to.cols, [&, r](dim j, auto lane) { lane.store(to.row(r) + j, lane.load(from.row(r) + j)); });
}
/// The rows of a tile, all equal to their columns of the bias v[e](j, 0), or 0 where there is none.
template <class Arch>
void start(Arch arch, matrix_view<float> c, const tile& t, matrix_stack<const float> v) noexcept {
  for (dim first = 0; first < t.columns; first += panel) {
    const dim n = at_most(t.columns - first, panel);
    float bias[panel] = {};
    for (dim j = 0; v.first && j < n; ++j) bias[j] = v[t.expert](t.column + first + j, 0);
    copy_tile(arch, {bias, c.rows, n, 0}, c.columns(first, n));
  }
}

/// Rows, at most `height`, and columns of a tile of the gradients of E matrices. Large ones read their operands the fewest
/// times; they are halved where there are few.
inline std::pair<dim, dim> gradient_tile(dim experts, dim rows, dim cols, dim height) noexcept {
  constexpr dim enough = 64, area = 1 << 17;
  dim breadth = area / height;
  const auto few = [&] { return experts * blocks(rows, height) * blocks(cols, breadth) < enough; };
  while (breadth > panel && few()) {
    breadth /= 2;
    if (height > panel && few()) height /= 2;
  }
  return {height, breadth};
}

/// out = start + a b[e]^T over the tiles of a result, which run(grid, f) visits; start(c, tile) sets what is added to.
/// Narrow tiles grow close together, wide ones where they belong.
template <class Arch, class W, class Start, class Run>
void for_each_product(Arch arch, const bank_rows& rows, const rows_for<W>& a, matrix_stack<const W> b,
                      matrix_view<float> out, Start start, Run run) noexcept {
  const tile_products<Arch, W> products;
  const dim depth = b.first.cols;
  run(tile_grid(rows.offsets, b.first.rows, depth, 16, products.columns(depth), products.rows()), [&](const tile& t) {
    tile_result near;
    const matrix_view<float> to = part_of(out, t), c = near.holds(t) ? near.view(t) : to;
    start(c, t);
    multiply_nt(products, t, a, b, c);
    if (c.data != to.data) copy_tile(arch, c, to);
  });
}

}  // namespace detail

/// Rounds the rows of a bank to their halves.
template <HostBackend B>
void round_rows(const call<B>& on, const bank_rows& rows, const mixed_rows& x) noexcept {
  const auto round = mixed_kernels_of(typename B::arch{}).halves.round;
  if (!round) return;
  for_each_row(on, rows, [&](dim, dim r) { round(x.floats.row(r), x.halves.row(r), x.halves.cols); });
}
/// The floats of `m` as rows for bf16 weights, rounded where the level does that.
template <HostBackend B>
mixed_rows mixed(const call<B>&, matrix_view<float> m) noexcept {
  mixed_rows rows{gathered<float>{m}};
  if (mixed_kernels_of(typename B::arch{}).halves.round)
    rows.halves = {reinterpret_cast<bf16*>(m.data), m.rows, m.cols, 2 * m.ld};
  return rows;
}
/// The same of rows of a bank, which are rounded into `room`, half as wide.
template <HostBackend B>
mixed_rows mixed(const call<B>& on, const bank_rows& rows, gathered<float> x, matrix_view<float> room) noexcept {
  mixed_rows to = mixed(on, room);
  to.floats = x;
  to.halves.cols = x.cols();
  round_rows(on, rows, to);
  return to;
}
/// out[r] += a[r] b[e]^T for every row of a bank: a[A,k] read through the plan, b[e] of n x k, out[A,n]. Weights of type W
/// are float or bf16 here, results are floats.
template <HostBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  const auto start = [&](matrix_view<float> c, const detail::tile& t) {
    if (const matrix_view<float> from = detail::part_of(out, t); from.data != c.data)
      detail::copy_tile(typename B::arch{}, from, c);
  };
  detail::for_each_product(typename B::arch{}, rows, a, b, out, start,
                           [&](const detail::tile_grid& grid, const auto& f) { detail::for_each_tile(on, grid, f); });
}
/// out[r] = a[r] b[e]^T + bias[e], the bias a column per expert or empty. Where there is a `then`, it is called as
/// then(result_part) once for every part of the columns that is there in all rows, from any thread.
template <HostBackend B, class W, class... Then>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, const rows_for<W>& a, matrix_stack<const W> b,
                     matrix_stack<const float> bias, matrix_view<float> out, const Then&... then) noexcept {
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
  const detail::tile_products<typename B::arch, W> products;
  const dim depth = w.first.rows * (w2.first ? 2 : 1);
  const detail::tile_grid grid(rows.offsets, w.first.cols, depth, detail::panel, products.columns(depth), products.rows());
  detail::for_each_tile(on, grid, [&](const detail::tile& t) {
    detail::tile_result near;
    const matrix_view<float> to = detail::part_of(dx, t), c = near.holds(t) ? near.view(t) : to;
    detail::start(typename B::arch{}, c, t, {});
    products.nn(dz.from(t.row), w[t.expert].columns(t.column, t.columns), c);
    if (w2.first) products.nn(dz2.from(t.row), w2[t.expert].columns(t.column, t.columns), c);
    if (c.data != to.data) detail::copy_tile(typename B::arch{}, c, to);
  });
}
/// c[e] += the sum over e's rows of a[r]^T b[r]: a[A,m] and b[A,n] read through the plan, c[e] of m x n. The gradient of
/// weights of type W: with bf16, levels that multiply bf16 round a and b to it.
template <class W, HostBackend B>
void grouped_wgrad(const call<B>& on, const bank_rows& rows, const rows_for<W>& a, const rows_for<W>& b,
                   matrix_stack<float> c) noexcept {
  const detail::tile_products<typename B::arch, W> products;
  const auto [h, w] = detail::gradient_tile(rows.experts(), c.first.rows, c.first.cols, products.gradient_rows);
  const dim height = h, breadth = w, panels = detail::blocks(c.first.rows, h), bands = detail::blocks(c.first.cols, w);
  on.executor().for_each(rows.experts() * panels * bands, 1, [&](dim unit, dim last) {
    for (; unit < last; ++unit) {
      const dim e = unit / (panels * bands), i = unit / bands % panels * height, j = unit % bands * breadth;
      const dim m = detail::at_most(c.first.rows - i, height), n = detail::at_most(c.first.cols - j, breadth);
      const dim r = rows.offsets[static_cast<std::size_t>(e)], depth = rows.offsets[static_cast<std::size_t>(e) + 1] - r;
      products.tn(a.from(r), b.from(r), i, j, depth, c[e].slice(i, m).columns(j, n));
    }
  });
}
/// The same in float32.
template <HostBackend B>
void grouped_gemm_tn(const call<B>& on, const bank_rows& rows, gathered<float> a, gathered<float> b,
                     matrix_stack<float> c) noexcept {
  grouped_wgrad<float>(on, rows, a, b, c);
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
