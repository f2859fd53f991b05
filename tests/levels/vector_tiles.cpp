// SPDX-License-Identifier: Apache-2.0
#include "moe/backend/cpu/vector_tiles.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/emulated_tiles.hpp"
#include "support/levels.hpp"

#if defined(MOE_X86)

namespace {

using moe::bf16, moe::dim;

bool has_halves() { return includes(testing::highest_level(), moe::cpu_level::avx512_bf16); }

/// Two blocks of rows by two tiles of columns, as kernels multiply them: so many products, the rows of the left operand
/// `gap` lines apart, those of the sums 40 floats.
struct trial {
  dim upper, lower, products, gap;
  bool add;
  std::vector<bf16> rows, columns;
  std::vector<float> start;

  static constexpr dim pitch = 40;

  trial(dim upper_rows, dim lower_rows, dim n, dim lines_apart, bool adds)
      : upper(upper_rows),
        lower(lower_rows),
        products(n),
        gap(lines_apart),
        add(adds),
        rows(static_cast<std::size_t>((upper + lower) * gap * 32 * (n + 1))),
        columns(static_cast<std::size_t>(n * 2 * 16 * 32)),
        start(static_cast<std::size_t>(32 * pitch)) {
    const auto whole = [](std::size_t i) { return static_cast<float>(static_cast<int>(i * 2654435761u >> 7 & 7) - 3); };
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = bf16(whole(i));
    for (std::size_t i = 0; i < columns.size(); ++i) columns[i] = bf16(whole(i + 12345));
    for (std::size_t i = 0; i < start.size(); ++i) start[i] = whole(i + 999) + 100;
  }

  /// What is where the sums are stored afterwards.
  template <class Tiles>
  std::vector<float> sums() const {
    std::vector<float> c = start;
    moe::arch::detail::tile_heights<Tiles>().set(upper, lower > 0 ? lower : 1);
    float* below = c.data() + upper * pitch;
    constexpr dim stride = pitch * dim{sizeof(float)}, line = 64;
    if (add) {
      Tiles::load0(c.data(), stride);
      Tiles::load1(c.data() + 16, stride);
      if (lower > 0) Tiles::load2(below, stride);
      if (lower > 0) Tiles::load3(below + 16, stride);
    } else {
      Tiles::zero0();
      Tiles::zero1();
      Tiles::zero2();
      Tiles::zero3();
    }
    for (dim p = 0; p < products; ++p) {
      const bf16 *left = rows.data() + p * (upper + lower) * gap * 32, *right = columns.data() + p * 2 * 16 * 32;
      Tiles::load4(left, gap * line);
      Tiles::load6(right, line);
      Tiles::add_halves0();
      Tiles::pass7(right + 16 * 32, line);
      Tiles::add_halves1();
      if (lower == 0) continue;
      Tiles::pass5(left + upper * gap * 32, gap * line);
      Tiles::add_halves2();
      Tiles::add_halves3();
    }
    Tiles::store0(c.data(), stride);
    Tiles::store1(c.data() + 16, stride);
    if (lower > 0) Tiles::store2(below, stride);
    if (lower > 0) Tiles::store3(below + 16, stride);
    Tiles::release();
    return c;
  }
};

using vector_tiles = moe::arch::detail::vector_tiles<moe::detail::build_level>;

}  // namespace

TEST_SUITE("backend/cpu/vector_tiles" * doctest::skip(!has_halves())) {
  TEST_CASE("tiles of vectors do what tiles do, of any height, however many are multiplied, and write nothing beside") {
    testing::emulated_tiles::faults = 0;
    for (dim upper = 1; upper <= 16; ++upper)
      for (const dim lower : {dim{0}, dim{1}, 17 - upper, dim{16}})
        for (const dim products : {0, 1, 16, 32, 33, 70})
          for (const dim gap : {1, 3})
            for (const bool add : {false, true}) {
              CAPTURE(upper);
              CAPTURE(lower);
              CAPTURE(products);
              CAPTURE(gap);
              CAPTURE(add);
              const trial t(upper, lower, products, gap, add);
              CHECK(t.sums<vector_tiles>() == t.sums<testing::emulated_tiles>());
            }
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE("what is not finite reaches the sums that it belongs to, and no others") {
    for (const float strange : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      trial t(16, 9, 40, 1, true);
      const std::vector<float> before = t.sums<vector_tiles>();
      constexpr dim row = 20, product = 35;  // of the lower block; after sums were put away once
      t.rows[static_cast<std::size_t>((product * 25 + row) * 32)] = bf16(strange);
      const std::vector<float> after = t.sums<vector_tiles>();
      dim reached = 0;
      for (dim r = 0; r < 32; ++r)
        for (dim j = 0; j < trial::pitch; ++j) {
          const auto at = static_cast<std::size_t>(r * trial::pitch + j);
          if (r == row && j < 32)
            reached += !std::isfinite(after[at]);
          else
            CHECK(after[at] == before[at]);
        }
      CHECK(reached == 32);  // infinity times zero is NaN
    }
  }
}

#endif
