// SPDX-License-Identifier: Apache-2.0
/// Products with bf16 weights on the host, at levels that multiply bf16: how they are cut into tiles and shared between
/// threads. Tiles are large, so that weights are packed once for many rows; they grow in memory of their thread.
#pragma once

#include <type_traits>
#include <utility>

#include "moe/backend/host_products.hpp"
#include "moe/backend/host_rows.hpp"
#include "moe/backend/host_slots.hpp"
#include "moe/backend/host_tiles.hpp"

namespace moe {

/// Rows that are multiplied by bf16 weights. Where the level rounds rows, products read `halves`, which may lie where the
/// floats lay; else that is empty. Forward, few rows of an expert meet its weights as floats at every level.
struct mixed_rows {
  gathered<float> floats;
  matrix_view<bf16> halves{};

  mixed_rows from(dim first) const noexcept { return {floats.from(first), halves.slice(first, halves.rows - first)}; }
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
/// The same of rows of a bank, whose halves will lie in `room`, half as wide.
template <HostBackend B>
mixed_rows mixed(const call<B>& on, const bank_rows& rows, gathered<float> x, matrix_view<float> room) noexcept {
  mixed_rows to = mixed(on, room);
  to.floats = x;
  if (const dim ld = detail::blocks(x.cols(), 32) / 2 * 64 + 32; room.cols == room.ld && ld <= to.halves.ld)
    to.halves = {to.halves.row(rows.first()) - rows.first() * ld, room.rows, x.cols(), ld};
  to.halves.cols = x.cols();
  return to;
}
/// Rounds them where the level does that, token after token: the floats of a token that several experts take are read from
/// memory once.
template <HostBackend B>
void round_by_token(const call<B>& on, const bank_rows& rows, const mixed_rows& x) noexcept {
  if (const arch::half_kernels k = mixed_kernels_of(typename B::arch{}).halves; k.round)
    for_each_row_by_token(
        on, rows, [&](dim, dim r) { k.round_past(x.floats.row(r), x.halves.row(r), x.halves.cols); }, k.settle);
}

namespace detail {

inline constexpr dim half_rows = 512, half_columns = 256;                      ///< most of a tile of a product,
inline constexpr dim half_gradient_rows = 1024, half_gradient_columns = 2048;  ///< and of a gradient

/// What a thread needs for a tile of a product.
struct half_slot {
  matrix_view<float> sums;
  std::byte* room;
};
/// For tiles of at most `rows` x `columns`. Rows of sums are an odd number of lines apart: a power of two would bring them
/// together in few sets of a cache.
inline half_slot carve_half_slot(const arch::half_kernels& k, dim rows, dim columns, arena& mem) noexcept {
  const dim width = at_most(round_up(columns, 32), half_columns);
  const matrix_view<float> sums = mem.matrix<float>("sums", at_most(rows, half_rows), width + 16).columns(0, width);
  return {sums, reinterpret_cast<std::byte*>(mem.vector<std::int8_t>("packed", k.product_room(width)).data())};
}
/// The same for the sizes of a product of `B`, a slot for each thread.
template <HostBackend B>
struct half_slots {
  arch::half_kernels kernels = mixed_kernels_of(typename B::arch{}).halves;
  dim rows, columns;
  slot_memory memory;

  half_slots(const B& backend, dim r, dim n, arena& mem) noexcept : rows(r), columns(n) {
    if (kernels.round)
      memory = make_slots(backend, mem, [&](arena& a) { (void)carve_half_slot(kernels, rows, columns, a); });
  }
  /// One slot where a grid is not worth sharing.
  slot_memory used(const tile_grid& grid) const noexcept {
    return {memory.first, memory.bytes, grid.grain() > 1 ? 1 : memory.count};
  }
  half_slot carve(arena mem) const noexcept { return carve_half_slot(kernels, rows, columns, mem); }
};
/// Memory of each thread for tiles of a gradient of m x n; none where the level does not round rows.
template <HostBackend B>
slot_memory make_gradient_slots(const B& backend, dim m, dim n, arena& mem) noexcept {
  const arch::half_kernels k = mixed_kernels_of(typename B::arch{}).halves;
  if (!k.round) return {};
  const dim bytes = k.gradient_room(at_most(m, half_gradient_rows), at_most(n, half_gradient_columns));
  return make_slots(backend, mem, [&](arena& a) { (void)a.vector<std::int8_t>("packed", bytes); });
}

/// Tiles of a product of n columns, each a sum over `depth`; a tile is `together` products of as many columns.
inline tile_grid half_grid(std::span<const idx> offsets, dim n, dim depth, dim together = 1) noexcept {
  return {offsets, n, depth, 32, half_columns / together, half_rows};
}

/// The weights of a tile, none where it has no columns.
inline matrix_view<const bf16> rows_of(matrix_stack<const bf16> b, const tile& t) noexcept {
  return t.columns > 0 ? b[t.expert].slice(t.column, t.columns) : matrix_view<const bf16>{};
}

/// f(unit, next) for all units that a thread takes, each of which it takes before it does the one before; `units` where
/// there is none.
template <class Take, class F>
void for_each_taken(dim units, Take take, F f) noexcept {
  dim unit, next;
  for (bool more = take(unit); more; unit = next) {
    more = take(next);
    f(unit, more ? next : units);
  }
}
/// f(slot, tile, the thread's next tile, of no columns after the last one) for all tiles of a grid.
template <HostBackend B, class F>
void for_each_tile(const call<B>& on, const half_slots<B>& slots, const tile_grid& grid, F f) noexcept {
  share_units(on, slots.used(grid), grid.tiles(), [&](arena mem, auto take) {
    const half_slot slot = slots.carve(mem);
    for_each_taken(grid.tiles(), take,
                   [&](dim i, dim next) { f(slot, grid[i], next < grid.tiles() ? grid[next] : tile{}); });
  });
}
/// The same, and then(first column, columns) once for every stripe of columns that is there in all rows.
template <HostBackend B, class F, class Then>
void for_each_tile_by_columns(const call<B>& on, const half_slots<B>& slots, const tile_grid& grid, F f,
                              Then then) noexcept {
  if (grid.tiles() == 0) return then(dim{0}, grid.width());
  tiles_by_columns tiles(grid);
  share_units(on, slots.used(grid), grid.tiles(), [&](arena mem, auto take) {
    const half_slot slot = slots.carve(mem);
    for_each_taken(grid.tiles(), take, [&](dim i, dim next) {
      tiles.visit(i, [&](const tile& t) { f(slot, t, next < grid.tiles() ? tiles[next] : tile{}); }, then);
    });
  });
}

/// c = a b[e]^T + bias for one tile, to which few rows come as floats, also to `out`; then the product with `next`.
template <class Arch>
void half_product(Arch arch, const half_slot& slot, const tile& t, const mixed_rows& a, matrix_stack<const bf16> b,
                  matrix_stack<const float> bias, matrix_view<float> c, matrix_view<float> out,
                  matrix_view<const bf16> next) noexcept {
  const arch::mixed_kernels k = mixed_kernels_of(arch);
  const matrix_view<const bf16> w = rows_of(b, t);
  if (bias.first || !t.is_tall()) start(arch, c, t, bias);
  if (t.is_tall())
    return k.halves.gemm_nt(a.halves.slice(t.row, t.rows), w, c, static_cast<bool>(bias.first), out, next, slot.room);
  k.gemm_nt(a.floats.from(t.row), w, c);
  if (out) k.halves.stream(c, out);
}
/// grouped_gemm_nt of halves.
template <HostBackend B, class... Then>
void halves_nt(const call<B>& on, const bank_rows& rows, const mixed_rows& a, matrix_stack<const bf16> b,
               matrix_stack<const float> bias, matrix_view<float> out, const Then&... then) noexcept {
  scratch_frame frame(on.scratch);
  const dim n = b.first.rows;
  const half_slots<B> slots(on.backend, out.rows, n, on.scratch);
  const tile_grid grid = half_grid(rows.offsets, n, b.first.cols);
  const auto product = [&](const half_slot& slot, const tile& t, const tile& next) {
    const matrix_view<float> c = slot.sums.slice(0, t.rows).columns(0, t.columns);
    half_product(typename B::arch{}, slot, t, a, b, bias, c, part_of(out, t), rows_of(b, next));
  };
  if constexpr (sizeof...(then) == 0)
    for_each_tile(on, slots, grid, product);
  else
    for_each_tile_by_columns(on, slots, grid, product,
                             [&](dim first, dim count) { (then(result_part{0, on.sizes.tokens, first, count}), ...); });
}
/// grouped_dgrad of halves.
template <HostBackend B>
void halves_dgrad(const call<B>& on, const bank_rows& rows, const mixed_rows& dz, matrix_stack<const bf16> w,
                  const mixed_rows& dz2, matrix_stack<const bf16> w2, matrix_view<float> dx) noexcept {
  scratch_frame frame(on.scratch);
  const dim n = w.first.cols;
  const half_slots<B> slots(on.backend, dx.rows, n, on.scratch);
  for_each_tile(on, slots, half_grid(rows.offsets, n, w.first.rows), [&](const half_slot& slot, const tile& t, const tile&) {
    const matrix_view<float> c = slot.sums.slice(0, t.rows).columns(0, t.columns);
    const auto add = [&](const mixed_rows& from, matrix_stack<const bf16> b, bool more, matrix_view<float> out) {
      slots.kernels.gemm_nn(from.halves.slice(t.row, t.rows), b[t.expert].columns(t.column, t.columns), c, more, out,
                            slot.room);
    };
    add(dz, w, false, w2.first ? matrix_view<float>{} : part_of(dx, t));
    if (w2.first) add(dz2, w2, true, part_of(dx, t));
  });
}
/// grouped_wgrad of halves, of one gradient or, where there is a c2, of two.
template <HostBackend B>
void halves_wgrad(const call<B>& on, const bank_rows& rows, const mixed_rows& a, const mixed_rows& b, matrix_stack<float> c,
                  const mixed_rows& a2, matrix_stack<float> c2, gradient_mode mode) noexcept {
  scratch_frame frame(on.scratch);
  const arch::half_kernels k = mixed_kernels_of(typename B::arch{}).halves;
  const gradient_grid grid(rows.offsets, c.first.rows, c.first.cols, half_gradient_rows, half_gradient_columns);
  const slot_memory slots = make_gradient_slots(on.backend, c.first.rows, c.first.cols, on.scratch);
  share_units(on, slots, grid.tiles(), [&](arena mem, auto take) {
    auto* room = reinterpret_cast<std::byte*>(mem.vector<std::int8_t>("packed", 0).data());
    for (dim i; take(i);) {
      const gradient_tile t = grid[i];
      const auto part = [&](const mixed_rows& m, dim first, dim n) -> matrix_view<const bf16> {
        return m.halves.slice(t.first, t.depth).columns(first, n);
      };
      const matrix_view<const bf16> second = c2.first ? part(a2, t.row, t.rows) : matrix_view<const bf16>{};
      k.gemm_tn(part(a, t.row, t.rows), part(b, t.column, t.columns), t.of(c), second,
                c2.first ? t.of(c2) : matrix_view<float>{}, mode == gradient_mode::add, room);
    }
  });
}

}  // namespace detail

/// What products with bf16 weights of a feed-forward layer of shape s take from its scratch, at levels that round rows.
template <HostBackend B>
void count_half_products(const B& backend, shape s, dim rows, bool backward, arena& mem) noexcept {
  const auto product = [&](dim n) {
    scratch_frame frame(mem);
    (void)detail::half_slots<B>(backend, rows, n, mem);
  };
  product(2 * detail::round_up(s.f, 32));
  product(s.d);
  if (!backward) return;
  const auto gradient = [&](dim m, dim n) {
    scratch_frame frame(mem);
    (void)detail::make_gradient_slots(backend, m, n, mem);
  };
  gradient(s.d, s.f);
  gradient(s.f, s.d);
}

}  // namespace moe
