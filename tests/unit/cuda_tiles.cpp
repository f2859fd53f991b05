// SPDX-License-Identifier: Apache-2.0
#include "moe/backend/cuda/tiles.hpp"

#include <doctest/doctest.h>

#include <vector>

#include "moe/core/rng.hpp"

namespace {

using moe::dim;
using moe::idx;
using moe::detail::block_tile;
using moe::detail::device_rows;

device_rows rows_of(const std::vector<idx>& offsets) { return device_rows(moe::bank_rows{.offsets = offsets}); }

/// Every element of the result is in exactly one tile of its own expert; blocks beyond the tiles have no rows.
void covers(const std::vector<idx>& offsets, dim width) {
  const device_rows rows = rows_of(offsets);
  const dim first = offsets.front(), n = offsets.back() - first;
  std::vector<int> hits(static_cast<std::size_t>(n * width));
  const dim blocks = moe::detail::most_row_tiles(n, rows.experts) * moe::detail::tiles_of(width);
  for (dim b = 0; b < blocks; ++b) {
    const block_tile t = moe::detail::find_tile(rows, width, b);
    for (dim r = t.row; r < t.row + t.rows; ++r) {
      REQUIRE(r >= rows.at(t.expert));
      REQUIRE(r < rows.at(t.expert + 1));
      for (dim c = t.column; c < t.column + t.columns; ++c) ++hits[static_cast<std::size_t>((r - first) * width + c)];
    }
  }
  dim wrong = 0;
  for (const int h : hits) wrong += h != 1;
  CHECK(wrong == 0);
}

}  // namespace

TEST_SUITE("backend/cuda/tiles") {
  TEST_CASE("Tiles cover every row of every expert once, whatever the sizes") {
    covers({0, 64, 128}, 64);
    covers({0, 1, 65, 65, 65, 194}, 100);
    covers({7, 7, 8, 72, 136, 137}, 1);
    covers({0, 0, 0}, 65);
    const moe::rng random(5);
    for (std::uint64_t trial = 0; trial < 40; ++trial) {
      std::vector<idx> offsets{static_cast<idx>(random(1000 * trial) % 50)};
      const auto experts = 1 + random(1000 * trial + 1) % 12;
      for (std::uint64_t e = 0; e < experts; ++e) {
        const auto rows = random(1000 * trial + 2 + e) % 150, some = random(1000 * trial + 500 + e) % 2;
        offsets.push_back(offsets.back() + static_cast<idx>(rows * some));
      }
      covers(offsets, 1 + static_cast<dim>(random(1000 * trial + 900) % 130));
    }
  }
  TEST_CASE("The grid has room for the worst case, and no more than a tile an expert above the least") {
    CHECK(moe::detail::most_row_tiles(0, 8) == 0);
    CHECK(moe::detail::most_row_tiles(3, 8) == 3);        // three experts of one row
    CHECK(moe::detail::most_row_tiles(64 + 7, 8) == 9);   // one of 64 and seven of one
    CHECK(moe::detail::most_row_tiles(640, 8) == 18);
  }
  TEST_CASE("Without offsets there is one expert with all rows") {
    const device_rows rows(130);
    CHECK(rows.experts == 1);
    CHECK(rows.count(0) == 130);
    const block_tile t = moe::detail::find_tile(rows, 10, 2);
    CHECK(t.row == 128);
    CHECK(t.rows == 2);
    CHECK(t.columns == 10);
    CHECK(moe::detail::find_tile(rows, 10, 3).rows == 0);
  }
  TEST_CASE("A stack of matrices is covered matrix by matrix") {
    std::vector<int> hits(3 * 65 * 130);
    for (dim b = 0; b < 3 * 2 * 3; ++b) {
      const block_tile t = moe::detail::find_tile_of_stack(65, 130, b);
      for (dim r = t.row; r < t.row + t.rows; ++r)
        for (dim c = t.column; c < t.column + t.columns; ++c)
          ++hits[static_cast<std::size_t>((t.expert * 65 + r) * 130 + c)];
    }
    for (const int h : hits) REQUIRE(h == 1);
  }
  TEST_CASE("The expert of a row is found between empty experts") {
    const std::vector<idx> offsets{4, 4, 6, 6, 6, 7};
    const device_rows rows = rows_of(offsets);
    CHECK(rows.expert_of(4) == 1);
    CHECK(rows.expert_of(5) == 1);
    CHECK(rows.expert_of(6) == 4);
    CHECK_FALSE(rows.holds(3));
    CHECK_FALSE(rows.holds(7));
  }
  TEST_CASE("Threads share a range in their order, without a gap") {
    for (const dim n : {dim{0}, dim{1}, dim{255}, dim{256}, dim{1000}}) {
      dim at = 0;
      for (int thread = 0; thread < 256; ++thread) {
        const moe::detail::run_of run(n, thread, 256);
        REQUIRE(run.first == at);
        at = run.last;
      }
      CHECK(at == n);
    }
  }
}
