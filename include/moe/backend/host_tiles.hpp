// SPDX-License-Identifier: Apache-2.0
/// How products over the rows of a plan are cut into tiles. The cut follows from shapes and plan alone.
#pragma once

#include <span>

#include "moe/backend/host_backend.hpp"
#include "moe/backend/host_parts.hpp"

namespace moe::detail {

inline constexpr dim panel = 64;      // most columns of a tile of float32: that many weight rows stay in the second cache
inline constexpr dim row_block = 216;  // most rows of a tile: a whole number of every kernel's blocks
inline constexpr dim few_rows = 36;    // and of the chunks that an expert's rows are cut to where there are few tiles

/// Rows of an expert, and the columns of a panel.
struct tile {
  dim expert, row, rows, column, columns;

  /// Whether weights are worth packing. Either all tiles of an expert are tall or none is, so that all its rows are added up
  /// in one order.
  bool is_tall() const noexcept { return rows >= few_rows; }
};

/// Each expert's rows in chunks of equal height, give or take one, times panels of columns. Within a chunk the panel stays in
/// cache, so in small batches each weight is read once, by one thread, and an expert with many rows feeds all of them.
class tile_grid {
 public:
  /// Over results of `width` columns, each a sum of `depth` products, in panels of `widest` columns and chunks of at most
  /// `tallest` rows. Where there are few tiles, wide panels are halved, then chunks cut, then, where experts have few rows,
  /// panels halved down to `narrowest`, as long as a tile is worth handing out. Blocks of many rows are a panel wide: a
  /// narrower tile would take as long.
  tile_grid(std::span<const idx> offsets, dim width, dim depth, dim narrowest, dim widest = panel,
            dim tallest = row_block) noexcept
      : offsets_(offsets), width_(width), panel_(widest), chunk_(tallest) {
    constexpr dim enough = 64, worthwhile = 1 << 15;
    const dim products = rows() * width * depth;
    const auto finer = [&] { return tiles() < enough && products >= 2 * worthwhile * tiles(); };
    count();
    while (panel_ > panel && finer()) panel_ /= 2;
    if (finer()) {
      chunk_ = 2 * few_rows;
      count();
    }
    const bool few = rows() < few_rows * (static_cast<dim>(offsets.size()) - 1);
    while (few && panel_ > narrowest && finer()) panel_ /= 2;
    serial_ = products < 2 * worthwhile;
  }

  dim width() const noexcept { return width_; }
  dim rows() const noexcept { return dim{offsets_.back()} - offsets_.front(); }
  dim chunks() const noexcept { return chunks_; }
  dim panels() const noexcept { return blocks(width_, panel_); }
  dim panel_columns() const noexcept { return panel_; }
  dim tiles() const noexcept { return chunks_ * panels(); }
  /// Tiles that one thread takes at a time.
  dim grain() const noexcept { return serial_ && tiles() > 0 ? tiles() : 1; }

  /// The i-th tile, chunk after chunk.
  tile operator[](dim i) const noexcept { return at(i / panels(), i % panels()); }
  tile at(dim chunk, dim p) const noexcept {
    const dim column = p * panel_;
    dim e = 0;
    for (dim n; chunk >= (n = chunks_of(e)); ++e) chunk -= n;
    const dim first = rows(e) * chunk / chunks_of(e), last = rows(e) * (chunk + 1) / chunks_of(e);
    return {e, row(e) + first, last - first, column, at_most(width_ - column, panel_)};
  }

 private:
  dim row(dim e) const noexcept { return offsets_[static_cast<std::size_t>(e)]; }
  dim rows(dim e) const noexcept { return row(e + 1) - row(e); }
  dim chunks_of(dim e) const noexcept {
    const dim n = rows(e);
    return n <= chunk_ ? n > 0 : blocks(n, chunk_);
  }
  void count() noexcept {
    chunks_ = 0;
    for (dim e = 0; e + 1 < static_cast<dim>(offsets_.size()); ++e) chunks_ += chunks_of(e);
  }

  std::span<const idx> offsets_;
  dim width_, panel_, chunk_, chunks_ = 0;
  bool serial_ = false;
};

inline matrix_view<bf16> part_of(matrix_view<bf16> m, const tile& t) noexcept {
  return m.slice(t.row, t.rows).columns(t.column, t.columns);
}
inline matrix_view<float> part_of(matrix_view<float> m, const tile& t) noexcept {
  return m.slice(t.row, t.rows).columns(t.column, t.columns);
}

template <class Arch>
void copy_tile(Arch arch, matrix_view<float> from, matrix_view<float> to) noexcept {
  for (dim r = 0; r < to.rows; ++r)
    for_each_lane(arch, to.cols, [&, r](dim j, auto lane) { lane.store(to.row(r) + j, lane.load(from.row(r) + j)); });
}
template <class Arch>
void clear_tile(Arch arch, matrix_view<float> c) noexcept {
  for (dim r = 0; r < c.rows; ++r)
    for_each_lane(arch, c.cols, [&, r](dim j, auto lane) { lane.store(c.row(r) + j, typename decltype(lane)::value(0)); });
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

/// A tile of the gradients of E matrices: a sum over `depth` rows of an expert, from row `first` on.
struct gradient_tile {
  dim expert, first, depth, row, rows, column, columns;

  matrix_view<float> of(matrix_stack<float> c) const noexcept { return c[expert].slice(row, rows).columns(column, columns); }
};
/// All of them, at most height x breadth. Large ones read their operands the fewest times; they are halved where there are few.
class gradient_grid {
 public:
  gradient_grid(std::span<const idx> offsets, dim rows, dim cols, dim height, dim breadth) noexcept
      : offsets_(offsets), rows_(rows), cols_(cols), height_(height), breadth_(breadth) {
    constexpr dim enough = 64;
    while (breadth_ > panel && tiles() < enough) {
      breadth_ /= 2;
      if (height_ > panel && tiles() < enough) height_ /= 2;
    }
  }
  dim tiles() const noexcept { return (static_cast<dim>(offsets_.size()) - 1) * panels() * bands(); }
  gradient_tile operator[](dim i) const noexcept {
    const dim e = i / (panels() * bands()), row = i / bands() % panels() * height_, column = i % bands() * breadth_;
    const dim first = offsets_[static_cast<std::size_t>(e)], depth = offsets_[static_cast<std::size_t>(e) + 1] - first;
    return {e, first, depth, row, at_most(rows_ - row, height_), column, at_most(cols_ - column, breadth_)};
  }

 private:
  dim panels() const noexcept { return blocks(rows_, height_); }
  dim bands() const noexcept { return blocks(cols_, breadth_); }

  std::span<const idx> offsets_;
  dim rows_, cols_, height_, breadth_;
};

/// f(tile) for all tiles of a grid.
template <HostBackend B, class F>
void for_each_tile(const call<B>& on, const tile_grid& grid, F f) noexcept {
  on.executor().for_each(grid.tiles(), grid.grain(), [&](dim i, dim last) {
    for (; i < last; ++i) f(grid[i]);
  });
}
/// Tiles in the order of stripes of columns.
class tiles_by_columns {
 public:
  explicit tiles_by_columns(const tile_grid& grid) noexcept
      : grid_(grid), stripes_(grid.chunks(), grid.rows(), grid.panels(), grid.panel_columns()) {}

  tile operator[](dim i) const noexcept {
    const column_stripes::unit u = stripes_[i];
    return grid_.at(u.chunk, u.piece);
  }
  /// f(the i-th tile), and then(first column, columns) where it is the last of a stripe.
  template <class F, class Then>
  void visit(dim i, const F& f, const Then& then) noexcept {
    const auto [stripe, chunk, piece] = stripes_[i];
    f(grid_.at(chunk, piece));
    if (!left_.is_last(stripe, stripes_.units(stripe))) return;
    const dim column = stripes_.first(stripe) * grid_.panel_columns();
    then(column, at_most(grid_.width() - column, stripes_.pieces(stripe) * grid_.panel_columns()));
  }

 private:
  const tile_grid& grid_;
  column_stripes stripes_;
  countdown left_;
};
/// The same, and then(first column, columns) once for every stripe of columns that is there in all rows.
template <HostBackend B, class F, class Then>
void for_each_tile_by_columns(const call<B>& on, const tile_grid& grid, F f, Then then) noexcept {
  if (grid.tiles() == 0) return then(dim{0}, grid.width());
  tiles_by_columns tiles(grid);
  on.executor().for_each(grid.tiles(), grid.grain(), [&](dim i, dim last) {
    for (; i < last; ++i) tiles.visit(i, f, then);
  });
}
/// The same of one matrix, and then(first row, rows) once for every band of rows that is there in all columns.
template <HostBackend B, class F, class Then>
void for_each_tile_by_rows(const call<B>& on, const tile_grid& grid, F f, Then then) noexcept {
  const dim chunks = blocks(grid.chunks(), countdown::most);  // of a band
  countdown left;
  on.executor().for_each(grid.tiles(), grid.grain(), [&](dim i, dim last) {
    for (; i < last; ++i) {
      f(grid[i]);
      const dim band = i / grid.panels() / chunks, n = at_most(grid.chunks() - band * chunks, chunks);
      if (!left.is_last(band, n * grid.panels())) continue;
      const tile end = grid.at(band * chunks + n - 1, 0);
      const dim row = grid.at(band * chunks, 0).row;
      then(row, end.row + end.rows - row);
    }
  });
}

}  // namespace moe::detail
