// SPDX-License-Identifier: Apache-2.0
/// The tile instructions of halves on 512-bit vectors, for processors that multiply pairs of halves but have no tiles: what
/// is written for `Tiles` (packed_amx.hpp) runs there as well.
#pragma once

#include <iterator>

#include "moe/backend/cpu/packed_amx.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// Tiles of this thread. Loads and products are noted down and done where sums are stored, so that these stay in registers
/// meanwhile: until then nobody writes to what was loaded. Sums 0 and 1, and 2 and 3, are of the same rows: one follows the
/// other in every instruction. Every row of a tile is a line long.
template <int Build>
class vector_tiles {
  struct place {
    const std::byte* at = nullptr;
    dim stride = 0;
  };
  struct product {
    place left;
    const std::byte* right[2];
  };
  struct two_sums {
    place start[2];  ///< null: zeros
    dim rows = 0, count = 0;
    product products[32];
    std::byte* to[2];
    dim stride[2];
    alignas(64) std::byte near[2][tile_bytes];  ///< where there are more products
  };
  struct state {
    two_sums sums[2];
    place operands[4];  ///< tiles 4 .. 7
  };

 public:
  static void shape(const tile_shapes& s) noexcept {
    tiles_.sums[0].rows = s.rows[0];
    tiles_.sums[1].rows = s.rows[2];
  }
  static void release() noexcept {}
  static void compiler_fence() noexcept {}

#define MOE_EACH_TILE(n)                                                 \
  static void load##n(const void* p, dim stride) noexcept {              \
    tiles_.operands[n - 4] = {static_cast<const std::byte*>(p), stride}; \
  }                                                                      \
  static void pass##n(const void* p, dim stride) noexcept { load##n(p, stride); }
  MOE_EACH_TILE(4)
  MOE_EACH_TILE(5)
  MOE_EACH_TILE(6)
  MOE_EACH_TILE(7)
#undef MOE_EACH_TILE
#define MOE_EACH_TILE(n)                                                                      \
  static void load##n(const void* p, dim stride) noexcept { start<n / 2, n % 2>(p, stride); } \
  static void zero##n() noexcept { start<n / 2, n % 2>(nullptr, 0); }                         \
  static void add_halves##n() noexcept { add<n / 2, n % 2>(); }                               \
  static void store##n(void* p, dim stride) noexcept { store<n / 2, n % 2>(p, stride); }
  MOE_EACH_TILE(0)
  MOE_EACH_TILE(1)
  MOE_EACH_TILE(2)
  MOE_EACH_TILE(3)
#undef MOE_EACH_TILE

 private:
  template <int Rows, int Side>
  static void start(const void* p, dim stride) noexcept {
    two_sums& s = tiles_.sums[Rows];
    s.start[Side] = {static_cast<const std::byte*>(p), stride};
    s.count = 0;
  }
  template <int Rows, int Side>
  static void add() noexcept {
    two_sums& s = tiles_.sums[Rows];
    if (Side == 0 && s.count == std::ssize(s.products)) {
      for (int side = 0; side < 2; ++side) {
        s.to[side] = s.near[side];
        s.stride[side] = line_bytes;
      }
      add_rows<8>(s, 0);
      for (int side = 0; side < 2; ++side) s.start[side] = {s.near[side], line_bytes};
      s.count = 0;
    }
    s.products[s.count].left = tiles_.operands[Rows];
    s.products[s.count].right[Side] = tiles_.operands[2 + Side].at;
    s.count += Side;
  }
  template <int Rows, int Side>
  static void store(void* p, dim stride) noexcept {
    two_sums& s = tiles_.sums[Rows];
    s.to[Side] = static_cast<std::byte*>(p);
    s.stride[Side] = stride;
    if (Side == 1) add_rows<8>(s, 0);
  }

  /// Rows `row` and on: M at a time, the rest in fewer.
  template <int M>
  static void add_rows(const two_sums& s, dim row) noexcept {
    for (; row + M <= s.rows; row += M) add_block<M>(s, row);
    if constexpr (M > 1) add_rows<M / 2>(s, row);
  }
  template <int M>
  MOE_TARGET(MOE_AVX512_BF16)
  MOE_NO_INLINE static void add_block(const two_sums& s, dim row) noexcept {
    __m512 sum[2][M];
    MOE_UNROLL
    for (int side = 0; side < 2; ++side) {
      const place& from = s.start[side];
      MOE_UNROLL
      for (int m = 0; m < M; ++m)
        sum[side][m] = from.at == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(from.at + (row + m) * from.stride);
    }
    for (dim i = 0; i < s.count; ++i) {
      const product& p = s.products[i];
      const std::byte *first = p.right[0], *second = p.right[1];
      const dim stride = p.left.stride;
      // Rows above and below the middle, so that all of them are in reach of two pointers.
      const std::byte *upper = p.left.at + row * stride, *lower = upper + M / 2 * stride;
      MOE_NO_UNROLL
      for (int step = 0; step < 16; ++step, first += line_bytes, second += line_bytes, upper += 4, lower += 4) {
        const __m512bh w = pairs_of_halves(_mm512_loadu_si512(first)), v = pairs_of_halves(_mm512_loadu_si512(second));
        MOE_UNROLL
        for (int m = 0; m < M; ++m) {
          std::int32_t two;
          std::memcpy(&two, m < M / 2 ? upper + m * stride : lower + (m - M / 2) * stride, 4);
          const __m512bh x = pairs_of_halves(_mm512_set1_epi32(two));
          sum[0][m] = _mm512_dpbf16_ps(sum[0][m], w, x);
          sum[1][m] = _mm512_dpbf16_ps(sum[1][m], v, x);
        }
      }
    }
    MOE_UNROLL
    for (int side = 0; side < 2; ++side) {
      MOE_UNROLL
      for (int m = 0; m < M; ++m) _mm512_storeu_ps(s.to[side] + (row + m) * s.stride[side], sum[side][m]);
    }
  }

  static inline thread_local state tiles_{};
};

/// f(tiles), for the instructions that code written for `Tiles` multiplies with.
template <class Tiles, class F>
void on_tiles(Tiles tiles, F f) noexcept {
  f(tiles);
}

/// Tiles of the level in use, amx or avx512_bf16. What is compiled for these has but the products themselves twice.
template <int Build>
struct tiles_in_use {
  static void shape(const tile_shapes& s) noexcept {
    on_tiles(tiles_in_use(), [&](auto tiles) noexcept { tiles.shape(s); });
  }
  static void release() noexcept {
    on_tiles(tiles_in_use(), [](auto tiles) noexcept { tiles.release(); });
  }
};
template <int Build, class F>
void on_tiles(tiles_in_use<Build>, F f) noexcept {
  if (cpu_level_in_use() == cpu_level::amx)
    f(hardware_tiles());
  else
    f(vector_tiles<Build>());
}

}  // namespace moe::arch::detail

#endif
