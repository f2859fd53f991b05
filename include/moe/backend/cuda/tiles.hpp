// SPDX-License-Identifier: Apache-2.0
/// How products are cut into the blocks of a grid. The host knows how many rows there may be, not how many there are: it
/// launches for the most, and each block finds its tile in the offsets or has none.
#pragma once

#include "moe/backend/cuda/device.hpp"

namespace moe::detail {

inline constexpr dim tile_side = 64;  ///< rows and columns of a tile of the result

MOE_HD constexpr dim tiles_of(dim n) noexcept { return (n + tile_side - 1) / tile_side; }
MOE_HD constexpr dim tile_part(dim left) noexcept { return left < tile_side ? left : tile_side; }

/// Rows of one expert, and columns. Without rows there is nothing to do.
struct block_tile {
  dim expert = 0, row = 0, rows = 0, column = 0, columns = 0;
};

/// The most row tiles that at most `room` rows of a number of experts have: each expert begins tiles of its own.
constexpr dim most_row_tiles(dim room, dim experts) noexcept {
  return room / tile_side + (experts < room ? experts : room);
}

/// The tile of a block, columns fastest, so that blocks side by side read the same rows.
MOE_HD inline block_tile find_tile(const device_rows& rows, dim width, dim block) noexcept {
  const dim across = tiles_of(width), column = block % across * tile_side;
  dim i = block / across;
  for (dim e = 0; e < rows.experts; ++e) {
    const dim n = rows.count(e), tiles = tiles_of(n);
    if (i < tiles) return {e, rows.at(e) + i * tile_side, tile_part(n - i * tile_side), column, tile_part(width - column)};
    i -= tiles;
  }
  return {};
}

/// The tile of a block in a matrix per expert, height x width: row and column count from the matrix's first.
MOE_HD inline block_tile find_tile_of_stack(dim height, dim width, dim block) noexcept {
  const dim down = tiles_of(height), across = tiles_of(width);
  const dim row = block / across % down * tile_side, column = block % across * tile_side;
  return {block / (across * down), row, tile_part(height - row), column, tile_part(width - column)};
}

/// The part of 0 .. n that falls to one of `threads` threads: consecutive, in the order of threads.
struct run_of {
  dim first, last;
  MOE_HD run_of(dim n, int thread, int threads) noexcept : first(n * thread / threads), last(n * (thread + 1) / threads) {}
};

}  // namespace moe::detail
