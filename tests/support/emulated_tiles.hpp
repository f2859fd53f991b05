// SPDX-License-Identifier: Apache-2.0
/// The tile instructions of AMX in plain C++, as the processor's manual defines them: kernels that take `Tiles` run on any
/// machine. It notices a shape that is missing and a tile that is read beyond its rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "moe/backend/cpu/packed_amx.hpp"

#if defined(MOE_X86)

namespace testing {

struct tile_content {
  int rows = 0, bytes = 0;
  unsigned char data[16][64] = {};
};

class emulated_tiles {
 public:
  static inline int faults = 0;  ///< uses of tiles without a shape, or of shapes that do not go together

  static void shape(const moe::arch::detail::tile_shapes& s) noexcept {
    for (int t = 0; t < 8; ++t) {
      faults += s.palette != 1 || s.rows[t] > 16 || s.bytes_per_row[t] > 64;
      tile[t] = {};
      tile[t].rows = s.rows[t];
      tile[t].bytes = s.bytes_per_row[t];
    }
  }
  static void release() noexcept {
    for (auto& t : tile) t = {};
  }
  static void compiler_fence() noexcept {}

#define TESTING_TILE(n) \
  static void load##n(const void* p, std::ptrdiff_t stride) noexcept { load(tile[n], p, stride); }
 TESTING_TILE(0)
 TESTING_TILE(1) TESTING_TILE(2) TESTING_TILE(3) TESTING_TILE(4) TESTING_TILE(5) TESTING_TILE(6) TESTING_TILE(7)
#undef TESTING_TILE
  static void pass4(const void* p, std::ptrdiff_t stride) noexcept { load(tile[4], p, stride); }
  static void pass5(const void* p, std::ptrdiff_t stride) noexcept { load(tile[5], p, stride); }
  static void pass6(const void* p, std::ptrdiff_t stride) noexcept { load(tile[6], p, stride); }
  static void pass7(const void* p, std::ptrdiff_t stride) noexcept { load(tile[7], p, stride); }
#define TESTING_TILE(n, a, b)                                                                  \
  static void store##n(void* p, std::ptrdiff_t stride) noexcept { store(tile[n], p, stride); } \
  static void zero##n() noexcept { zero(tile[n]); }                                            \
  static void add_halves##n() noexcept { add_halves(tile[n], tile[a], tile[b]); }              \
  static void add_bytes##n() noexcept { add_bytes(tile[n], tile[a], tile[b]); }
     TESTING_TILE(0, 4, 6) TESTING_TILE(1, 4, 7) TESTING_TILE(2, 5, 6) TESTING_TILE(3, 5, 7)
#undef TESTING_TILE

         private : using content = tile_content;
  static inline content tile[8];

  static void load(content& t, const void* p, std::ptrdiff_t stride) noexcept {
    faults += t.rows == 0;
    for (int r = 0; r < t.rows; ++r)
      std::memcpy(t.data[r], static_cast<const char*>(p) + r * stride, static_cast<std::size_t>(t.bytes));
  }
  static void store(const content& t, void* p, std::ptrdiff_t stride) noexcept {
    faults += t.rows == 0;
    for (int r = 0; r < t.rows; ++r)
      std::memcpy(static_cast<char*>(p) + r * stride, t.data[r], static_cast<std::size_t>(t.bytes));
  }
  static void zero(content& t) noexcept { std::memset(t.data, 0, sizeof t.data); }
  static bool fit(const content& c, const content& a, const content& b) noexcept {
    const bool good = c.rows > 0 && c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows;
    faults += !good;
    return good;
  }
  static void add_halves(content& c, const content& a, const content& b) noexcept {
    if (!fit(c, a, b)) return;
    for (int m = 0; m < c.rows; ++m)
      for (int k = 0; k < a.bytes / 4; ++k)
        for (int n = 0; n < c.bytes / 4; ++n) {
          moe::bf16 x[2], y[2];
          float sum;
          std::memcpy(x, a.data[m] + 4 * k, 4);
          std::memcpy(y, b.data[k] + 4 * n, 4);
          std::memcpy(&sum, c.data[m] + 4 * n, 4);
          sum += static_cast<float>(x[0]) * static_cast<float>(y[0]);
          sum += static_cast<float>(x[1]) * static_cast<float>(y[1]);
          std::memcpy(c.data[m] + 4 * n, &sum, 4);
        }
  }
  /// Signed times unsigned.
  static void add_bytes(content& c, const content& a, const content& b) noexcept {
    if (!fit(c, a, b)) return;
    for (int m = 0; m < c.rows; ++m)
      for (int k = 0; k < a.bytes / 4; ++k)
        for (int n = 0; n < c.bytes / 4; ++n) {
          std::int32_t sum;
          std::memcpy(&sum, c.data[m] + 4 * n, 4);
          for (int i = 0; i < 4; ++i) sum += static_cast<signed char>(a.data[m][4 * k + i]) * int{b.data[k][4 * n + i]};
          std::memcpy(c.data[m] + 4 * n, &sum, 4);
        }
  }
};

}  // namespace testing

#endif
